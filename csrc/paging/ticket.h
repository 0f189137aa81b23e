// A layer's working set, locked in slots from acquire until release.
//
//     auto ticket = pager->acquire(layer, {3, 7, 12});
//     for (auto ready = ticket->next(); !ready.empty(); ready = ticket->next()) {
//         compute(ready);                   // {index into the request, slot}
//         ticket->release(indices of ready);
//     }
//
// Pages are delivered in the order they arrive; the first call of next() gives all that were
// resident, unless other pages wait for slots: then pages in these slots come first. On a device a
// ticket has the stream its pages are read on: next() delivers pages whose copies are enqueued, a
// few at a time, and has made the stream wait for them; release() may follow as soon as the kernels
// that read them are enqueued (pager.h). A working set larger than the free slots streams: released
// slots are refilled with the rest of the same ticket, so progress needs one slot and the result
// does not depend on the number of slots. One thread uses a ticket at a time; different tickets may
// live on different threads. The destructor closes.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "fence.h"
#include "slot_table.h"

namespace moe_offload {

class Pager;
struct Load;

struct ReadyPage {
    int32_t index;  // position in the experts given to acquire
    SlotIndex slot;
};

class Ticket {
  public:
    Ticket(std::shared_ptr<Pager> pager, int32_t layer, std::optional<StreamHandle> stream);
    ~Ticket();
    Ticket(const Ticket&) = delete;
    Ticket& operator=(const Ticket&) = delete;

    // Blocks until an undelivered page is resident; returns all that are, or
    // some of them when that lets copies start sooner; {} when every page was delivered. Throws
    // PageReadError when a page failed, StateError on timeout or use after close. After an
    // exception close the ticket; the pager stays usable.
    std::vector<ReadyPage> next();
    // Gives delivered pages back: their slots may be evicted or refilled from now on. Throws
    // std::invalid_argument for an index that was not delivered or was released before.
    void release(std::span<const int32_t> indices);
    // Gives everything back, delivered or not. Idempotent.
    void close();

    int32_t layer() const { return layer_; }
    size_t size() const { return items_.size(); }

  private:
    friend class Pager;
    struct Item {
        std::shared_ptr<Load> load;
        int32_t successor = -1;  // item whose page takes this slot when this one is released
        bool owns_load = false;  // this ticket has to start the copy, nobody else will
        bool delivered = false;
        bool released = false;
    };

    std::shared_ptr<Pager> pager_;
    int32_t layer_;
    std::optional<StreamHandle> stream_;  // none: the host reads the pages
    std::vector<Item> items_;
    size_t num_undelivered_ = 0;
    bool closed_ = false;
    int64_t opened_ns_ = 0;
    int64_t stall_ns_ = 0;  // waited in next
};

}  // namespace moe_offload
