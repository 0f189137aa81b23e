// The pager: which experts are in which slots, and what is being copied for whom.
//
// One pool of slots for pages of one layout, shared by all layers. All decisions are taken in
// `acquire` and `prefetch`, under one lock, from the request and the policy alone: what is
// evicted and what stays resident does not depend on how fast copies are. (Only concurrent
// tickets that together need more slots than there are make placement depend on timing; results
// never do.) They are SlotTable's, which the replay of a recorded log shares.
//
// Streaming: of the misses of one ticket at most `admit_limit` get slots; the others are chained
// behind them and pass through the same slots as those are released. By default the limit is a
// layer's even share of the pool, so one prompt that touches every expert of a layer cannot empty
// the cache of all the others. A policy that chooses what stays is not bound by the limit.
//
// Devices: a copy engine may report a copy that is only enqueued, with a fence (copy_engine.h).
// Then a page is *ready* when its copy is enqueued and *landed* when the fence has passed.
//  - A ticket with a stream gets ready pages: next() makes the stream wait for their fences, so the
//    host never waits for a copy. Pages that have landed are delivered first.
//  - A ticket without a stream belongs to a caller that reads slots with the host: it gets landed
//    pages only.
//  - release() records a fence on the ticket's stream: the slots' next copies start behind it, on
//    the device. So a slot may be given away while kernels enqueued earlier still read it, and what
//    is evicted does not depend on how far the device has got.
// With the host engine there are no fences, and ready is landed.
//
// Threads: any thread may call anything. Worker threads of the copy engine only run
// `on_copy_done`. No wait is unbounded: next() and drain() give up after wait_timeout_ns.
// A forked child has no worker threads: every call there raises StateError.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "copy_engine.h"
#include "counters.h"
#include "event_log.h"
#include "ticket.h"
#include "timeline.h"

namespace moe_offload {

struct PagerOptions {
    std::vector<int32_t> num_experts;      // [num_layers]
    std::vector<std::string> layer_names;  // [num_layers], for messages
    std::byte* slots = nullptr;            // [num_slots * slot_stride], outlives the pager
    size_t num_slots = 0;                  // >= kMinSlots
    size_t slot_stride = 0;
    // [num_layers * most experts of a layer], or {}: where in its slot each page begins, bytes from
    // the slot's start. See PageSource::shift.
    std::vector<uint32_t> shifts;
    size_t admit_limit = 0;  // misses of one ticket that may stay; 0: default_admit_limit
    // Each copy into a slot that holds a page first sends that one there; null: nothing goes back.
    // Engines of devices do not.
    std::shared_ptr<SwapBack> swap_back;
    int64_t wait_timeout_ns = 120'000'000'000;
};

// A page in a slot or on its way there. Shared by the page table and the tickets that want it.
struct Load {
    enum class State { kPending, kLoading, kReady, kFailed, kAbandoned };
    enum class Cause { kDemand, kPrefetch, kFill };
    PageIndex page = kNoPage;
    SlotIndex slot = kNoSlot;
    State state = State::kPending;
    Cause cause = Cause::kDemand;
    bool demanded = false;     // some ticket wanted it; a prefetch that never is was wasted
    uint64_t expected_at = 0;  // acquires of its layer + 1 when it was last expected, see expect
    uint64_t bytes = 0;
    int64_t begin_ns = 0, end_ns = 0;  // of the copy
    FencePtr fence;                    // kReady, and the bytes have not landed yet
    std::shared_ptr<CopyJob> job;      // while it is queued or running
    std::exception_ptr error;
};

class Pager : public std::enable_shared_from_this<Pager> {
  public:
    // Throws std::invalid_argument for sizes that do not fit together.
    Pager(PagerOptions options, std::unique_ptr<EvictionPolicy> policy,
          std::unique_ptr<CopyEngine> engine);
    ~Pager();
    Pager(const Pager&) = delete;
    Pager& operator=(const Pager&) = delete;

    // Locks the pages of distinct `experts` of a layer and starts the copies of those missing.
    // Never blocks on a copy. Throws std::invalid_argument for ids out of range or repeated.
    // For the policy: each expert's router weight summed over the call's tokens ({}: not given),
    // and how many tokens these are (0: not given). `stream`: where the pages are read; none: by
    // the host. `routes` [num_tokens, A]: whose experts are whose, see LayerRequest.
    std::shared_ptr<Ticket> acquire(int32_t layer, std::span<const int32_t> experts,
                                    std::span<const float> weights = {}, int32_t num_tokens = 0,
                                    std::optional<StreamHandle> stream = std::nullopt,
                                    std::span<const int32_t> routes = {});

    // Starts copies of pages likely to be needed, behind all demands. Takes free slots and slots
    // of the policy's victims, never one that holds a prefetch whose layer was not routed since.
    // Returns how many copies were started. A page already resident or on its way costs nothing.
    size_t prefetch(int32_t layer, std::span<const int32_t> experts);
    // Starts copies of absent pages of a layer, in the order of experts, into free slots, until as
    // many are ahead as a scan streams through; evicts nothing. To be called after each release by
    // who has scanned the layer before and will want nearly all of this one: the slots that the
    // scan gives back are filled again while that layer is not yet routed. Returns how many copies
    // were started.
    size_t read_ahead(int32_t layer);
    // Which of these experts are neither resident nor on their way, in the order given. Those that
    // are resident are protected: until the layer's next acquire no prefetch evicts them. (Least
    // recently used are the very layers a prefetch is for, so without this the prefetch of one
    // predicted page would push out another that is here already.)
    std::vector<int32_t> expect(int32_t layer, std::span<const int32_t> experts);
    // Cancels prefetches of a layer (-1: all) that nobody has demanded, except those of experts
    // in `keep`. acquire does this for its own layer: once a layer is routed, the rest of its
    // prefetches are stale.
    void cancel_prefetches(int32_t layer, std::span<const int32_t> keep = {});
    // Tells the policy how likely a layer needs these experts at its next visit, or `visits_ahead`
    // visits later. Copies nothing.
    void predict(int32_t layer, std::span<const int32_t> experts,
                 std::span<const float> probabilities, int32_t visits_ahead = 0);
    // Tells the policy that what follows belongs to new prompts.
    void begin_sequence();

    // Starts copies into free slots only, evicting nothing; returns how many.
    size_t fill(std::span<const std::pair<int32_t, int32_t>> pages);
    // Waits until no copy is queued or in flight; rethrows the first error of fill.
    void drain();

    // Ends all copies and joins the worker threads. Idempotent. Tickets still open raise
    // StateError from then on.
    void close();

    std::vector<LayerCounters> counters() const;
    void reset_counters();
    std::pair<std::vector<TimelineEvent>, uint64_t> timeline() const;  // events, dropped
    std::vector<std::tuple<int32_t, int32_t, SlotIndex>> residents() const;
    size_t num_live_tickets() const;
    size_t admit_limit() const { return admit_limit_; }
    // [num_slots]: where the page in each slot begins, bytes from the slot's start; null when all
    // begin there. An entry belongs to the page a slot holds or waits for: it may be read for pages
    // that a ticket was given, until they are released.
    const uint32_t* slot_shifts() const {
        return options_.shifts.empty() ? nullptr : slot_shifts_.data();
    }
    bool uses_weights() const { return uses_weights_; }
    bool uses_routes() const { return uses_routes_; }
    std::string engine_name() const { return engine_->name(); }
    bool uses_predictions() const { return uses_predictions_; }
    const CopyEngine& engine() const { return *engine_; }

    // Keeps (true) or forgets (false) all requests from now on, for replay.
    void set_recording(bool recording);
    EventLog recorded() const;

    // See Chaos; additionally each acquire first evicts every unpinned page with this probability.
    void set_chaos(const Chaos& chaos, double evict_probability);

  private:
    friend class Ticket;
    using Lock = std::unique_lock<std::mutex>;

    void check_usable() const;
    void check_request(int32_t layer, std::span<const int32_t> experts);
    void check_values(std::span<const int32_t> experts, std::span<const float> values) const;
    PageIndex page_of(int32_t layer, int32_t expert) const;
    int32_t layer_of(PageIndex page) const;
    int32_t expert_of(PageIndex page) const;
    std::string describe(PageIndex page) const;
    uint64_t visit(int32_t layer) const;

    void evict_at_random();
    bool join(const std::shared_ptr<Load>& load, LayerCounters& counters);
    void schedule_misses(Ticket& ticket, const LayerRequest& request,
                         std::span<const int32_t> misses, std::span<const int32_t> fresh);
    bool place(PageIndex page, SlotIndex& slot);
    std::shared_ptr<Load> own(PageIndex page, SlotIndex slot, Load::Cause cause);
    void forget(PageIndex page);
    void account_eviction(PageIndex page);
    void start(const std::shared_ptr<Load>& load);
    bool cancel(const std::shared_ptr<Load>& load);
    void start_prefetch(PageIndex page, SlotIndex slot);
    bool reclaim_prefetch();
    void serve_starved();
    void on_copy_done(const std::weak_ptr<Load>& weak, PageIndex page, SlotIndex slot,
                      Load::Cause cause, const CopyResult& result);
    void on_copy_landed(const std::weak_ptr<Load>& weak, PageIndex page, SlotIndex slot,
                        Load::Cause cause, const CopyResult& result);
    void settle(const std::shared_ptr<Load>& load, PageIndex page, SlotIndex slot,
                Load::Cause cause, const CopyResult& result);

    std::vector<ReadyPage> next(Ticket& ticket);
    std::vector<ReadyPage> collect(Ticket& ticket);
    void keep_copies_coming(const Ticket& ticket, std::vector<int32_t>& landed) const;
    FencePtr record_use(const Ticket& ticket) const;
    void note_use(SlotIndex slot, const Ticket& ticket, const FencePtr& fence);
    void release(Ticket& ticket, std::span<const int32_t> indices);
    void close(Ticket& ticket);
    void account_overlap(const Ticket& ticket);
    void retry_abandoned(Ticket& ticket, Ticket::Item& item);

    const PagerOptions options_;
    const int32_t experts_per_layer_;  // stride of PageIndex
    size_t admit_limit_;
    const bool uses_weights_, uses_routes_, uses_predictions_;
    const int owner_pid_;

    mutable std::mutex mutex_;
    std::condition_variable changed_;  // a copy ended, a slot was released, or close()
    bool closed_ = false;
    SlotTable table_;
    std::vector<std::shared_ptr<Load>> loads_;  // [num_pages], null when absent
    // What a slot's next copy has to come after: its last copy, its last reader on each stream.
    struct SlotUse {
        FencePtr written;
        std::vector<std::pair<StreamHandle, FencePtr>> read;
    };
    std::vector<SlotUse> uses_;          // [num_slots]
    std::vector<uint32_t> slot_shifts_;  // [num_slots]
    // [num_slots]: the page whose bytes a slot holds whole, evicted or not, where it begins; null:
    // none, or it is on its way back. Only kept for swap_back.
    std::vector<const std::byte*> whole_;
    std::deque<std::weak_ptr<Load>> prefetching_;
    // Misses that found no slot because other tickets pin them all, first come first served.
    std::deque<std::pair<Ticket*, int32_t>> starved_;
    size_t num_in_flight_ = 0;
    size_t num_live_tickets_ = 0;
    std::vector<LayerCounters> counters_;
    std::vector<uint64_t> visits_;  // [num_layers], acquires since construction
    Timeline timeline_;
    std::unique_ptr<EventLog> log_;  // null: not recording
    std::exception_ptr fill_error_;
    double evict_probability_ = 0.0;
    std::mt19937_64 random_;
    std::vector<uint64_t> seen_;  // [num_pages], serial of the request that named the page
    uint64_t serial_ = 0;
    std::vector<PageIndex> pages_;  // scratch: the request as pages

    std::unique_ptr<CopyEngine> engine_;  // last: destroyed first
};

}  // namespace moe_offload
