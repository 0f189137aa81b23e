// A ticket's life: what the thread that computes a layer does with its working set.
#include "ticket.h"

#include <unistd.h>
#include <algorithm>
#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

#include "clock.h"
#include "errors.h"
#include "pager.h"

namespace moe_offload {

Ticket::Ticket(std::shared_ptr<Pager> pager, int32_t layer, std::optional<StreamHandle> stream)
    : pager_(std::move(pager)), layer_(layer), stream_(stream) {}

Ticket::~Ticket() { close(); }

std::vector<ReadyPage> Ticket::next() { return pager_->next(*this); }

void Ticket::release(std::span<const int32_t> indices) { pager_->release(*this, indices); }

void Ticket::close() { pager_->close(*this); }

std::vector<ReadyPage> Pager::next(Ticket& ticket) {
    check_usable();
    Lock lock(mutex_);
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::nanoseconds(options_.wait_timeout_ns);
    std::vector<ReadyPage> ready;
    int64_t stall_begin = 0;
    while (true) {
        if (closed_) throw StateError("ticket: the pager was closed");
        if (ticket.closed_) throw StateError("ticket: used after close");
        ready = collect(ticket);
        if (!ready.empty() || ticket.num_undelivered_ == 0) break;
        if (stall_begin == 0) stall_begin = now_ns();
        // Waits for a copy of this ticket to end, or for another ticket to give up slots.
        if (changed_.wait_until(lock, deadline) == std::cv_status::timeout)
            throw StateError("ticket: waited " +
                             std::to_string(options_.wait_timeout_ns / 1'000'000) + " ms for " +
                             std::to_string(ticket.num_undelivered_) + " experts of layer " +
                             std::to_string(ticket.layer_) +
                             ". Is a ticket of this thread unreleased, or the storage hung?");
    }
    if (stall_begin != 0) {
        const int64_t end = now_ns();
        counters_[static_cast<size_t>(ticket.layer_)].stall_ns +=
            static_cast<uint64_t>(end - stall_begin);
        ticket.stall_ns_ += end - stall_begin;
        timeline_.add({TimelineEvent::Kind::kStall, ticket.layer_, -1, -1, stall_begin, end});
    }
    return ready;
}

// The pages a ticket may have now: of those that landed; else, for a stream, some on their way.
std::vector<ReadyPage> Pager::collect(Ticket& ticket) {
    std::vector<int32_t> landed, coming;
    for (size_t i = 0; i < ticket.items_.size(); ++i) {
        Ticket::Item& item = ticket.items_[i];
        if (item.delivered) continue;
        if (item.load->state == Load::State::kFailed) {
            if (item.load->error) std::rethrow_exception(item.load->error);
            throw StateError("ticket: the copy of " + describe(item.load->page) + " was cancelled");
        }
        if (item.load->state == Load::State::kAbandoned) retry_abandoned(ticket, item);
        if (item.load->state != Load::State::kReady) continue;
        (item.load->fence ? coming : landed).push_back(static_cast<int32_t>(i));
    }
    if (landed.empty() && ticket.stream_ && !coming.empty()) {
        // In the order they were enqueued, a quarter at a time: the first are computed while the
        // last are copied, and there are not more launches than it takes to hide them.
        std::stable_sort(coming.begin(), coming.end(), [&](int32_t a, int32_t b) {
            return ticket.items_[static_cast<size_t>(a)].load->begin_ns <
                   ticket.items_[static_cast<size_t>(b)].load->begin_ns;
        });
        coming.resize((coming.size() + 3) / 4);
        for (const int32_t index : coming)
            engine_->wait(*ticket.stream_, ticket.items_[static_cast<size_t>(index)].load->fence);
        landed.swap(coming);
    }
    if (!ticket.stream_) keep_copies_coming(ticket, landed);
    std::vector<ReadyPage> ready;
    for (const int32_t index : landed) {
        Ticket::Item& item = ticket.items_[static_cast<size_t>(index)];
        item.delivered = true;
        --ticket.num_undelivered_;
        ready.push_back({index, item.load->slot});
    }
    return ready;
}

// Of the pages that landed, which to compute now, so that no copy waits for a slot longer than it
// must: those whose slots are waited for; while there are such pages on their way, a quarter of the
// others at a time, to fill the caller's time until they land. On a stream slots are waited for by
// the device, and the host is ahead of it.
void Pager::keep_copies_coming(const Ticket& ticket, std::vector<int32_t>& landed) const {
    const auto is_waited_for = [&](int32_t index) {
        return ticket.items_[static_cast<size_t>(index)].successor >= 0;
    };
    if (std::any_of(landed.begin(), landed.end(), is_waited_for))
        std::erase_if(landed, std::not_fn(is_waited_for));
    else if (std::any_of(ticket.items_.begin(), ticket.items_.end(), [](const Ticket::Item& item) {
                 return !item.delivered && item.successor >= 0;
             }))
        landed.resize((landed.size() + 3) / 4);
}

// The ticket that was to fetch this page closed before it did: ask for it ourselves.
void Pager::retry_abandoned(Ticket& ticket, Ticket::Item& item) {
    const PageIndex page = item.load->page;
    table_.unpin(item.load->slot);
    item.load = std::make_shared<Load>();
    item.load->page = page;
    item.load->demanded = true;
    item.owns_load = true;
    starved_.emplace_back(&ticket, static_cast<int32_t>(&item - ticket.items_.data()));
    serve_starved();
}

void Pager::release(Ticket& ticket, std::span<const int32_t> indices) {
    check_usable();
    Lock lock(mutex_);
    if (closed_) throw StateError("ticket: the pager was closed");
    if (ticket.closed_) throw StateError("ticket: used after close");
    const FencePtr fence = record_use(ticket);
    for (const int32_t index : indices) {
        const bool known = index >= 0 && static_cast<size_t>(index) < ticket.items_.size();
        if (!known || !ticket.items_[static_cast<size_t>(index)].delivered ||
            ticket.items_[static_cast<size_t>(index)].released)
            throw std::invalid_argument("ticket: index " + std::to_string(index) +
                                        " was not delivered, or was released before");
        Ticket::Item& item = ticket.items_[static_cast<size_t>(index)];
        item.released = true;
        note_use(item.load->slot, ticket, fence);
        if (item.successor >= 0) start(ticket.items_[static_cast<size_t>(item.successor)].load);
        table_.unpin(item.load->slot);
    }
    serve_starved();
    changed_.notify_all();
}

// A fence behind the kernels that read this ticket's pages.
FencePtr Pager::record_use(const Ticket& ticket) const {
    return ticket.stream_ ? engine_->record(*ticket.stream_) : nullptr;
}

void Pager::note_use(SlotIndex slot, const Ticket& ticket, const FencePtr& fence) {
    if (!fence) return;
    auto& read = uses_[static_cast<size_t>(slot)].read;
    // A later fence of the same stream stands for the earlier ones.
    std::erase_if(read, [&](const auto& use) { return use.first == *ticket.stream_; });
    read.emplace_back(*ticket.stream_, fence);
}

void Pager::close(Ticket& ticket) {
    if (::getpid() != owner_pid_) return;
    Lock lock(mutex_);
    if (ticket.closed_) return;
    ticket.closed_ = true;
    --num_live_tickets_;
    account_overlap(ticket);
    std::erase_if(starved_, [&](const auto& entry) { return entry.first == &ticket; });
    FencePtr fence;
    const bool in_use = !closed_ && std::any_of(ticket.items_.begin(), ticket.items_.end(),
                                                [](const Ticket::Item& item) {
                                                    return item.delivered && !item.released;
                                                });
    try {
        if (in_use) fence = record_use(ticket);
    } catch (const DeviceError&) {  // destructors end here; the next call on the device reports it
    }
    for (Ticket::Item& item : ticket.items_) {
        Load& load = *item.load;
        if (item.released || load.slot == kNoSlot) continue;
        item.released = true;
        if (item.delivered) note_use(load.slot, ticket, fence);
        // Chained behind others and never started: nobody will fetch it now.
        if (item.owns_load && load.state == Load::State::kPending) {
            if (loads_[load.page] == item.load) forget(load.page);
            load.state = Load::State::kAbandoned;
        }
        table_.unpin(load.slot);
    }
    timeline_.add(
        {TimelineEvent::Kind::kTicket, ticket.layer_, -1, -1, ticket.opened_ns_, now_ns()});
    serve_starved();
    changed_.notify_all();
}

// Time during which this ticket's copies were under way and nobody waited for them.
void Pager::account_overlap(const Ticket& ticket) {
    int64_t begin = 0, end = 0;
    for (const Ticket::Item& item : ticket.items_) {
        const Load& load = *item.load;
        // Copies that ended before the ticket opened were hits.
        if (load.state != Load::State::kReady || load.end_ns <= ticket.opened_ns_) continue;
        const int64_t from = std::max(load.begin_ns, ticket.opened_ns_);
        begin = begin == 0 ? from : std::min(begin, from);
        end = std::max(end, load.end_ns);
    }
    counters_[static_cast<size_t>(ticket.layer_)].overlap_ns +=
        static_cast<uint64_t>(std::max<int64_t>(0, end - begin - ticket.stall_ns_));
}

}  // namespace moe_offload
