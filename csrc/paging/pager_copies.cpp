// The pager's slots and copies: who gets a slot, what a copy waits for, and what its end changes.
#include <algorithm>
#include <exception>
#include <random>
#include <string>
#include <utility>

#include "errors.h"
#include "pager.h"

namespace moe_offload {
namespace {

TimelineEvent::Kind copy_kind(Load::Cause cause) {
    switch (cause) {
        case Load::Cause::kDemand:
            return TimelineEvent::Kind::kDemandCopy;
        case Load::Cause::kPrefetch:
            return TimelineEvent::Kind::kPrefetchCopy;
        default:
            return TimelineEvent::Kind::kFillCopy;
    }
}

}  // namespace

// --- slots ------------------------------------------------------------------------------------

std::shared_ptr<Load> Pager::own(PageIndex page, SlotIndex slot, Load::Cause cause) {
    auto load = std::make_shared<Load>();
    load->page = page;
    load->slot = slot;
    load->cause = cause;
    loads_[page] = load;
    return load;
}

void Pager::forget(PageIndex page) {
    loads_[page] = nullptr;
    table_.drop(page);
}

void Pager::account_eviction(PageIndex page) {
    LayerCounters& counters = counters_[static_cast<size_t>(layer_of(page))];
    ++counters.evictions;
    const Load& load = *loads_[page];
    if (load.cause == Load::Cause::kPrefetch && !load.demanded)
        counters.prefetch_bytes_wasted += load.bytes;
}

// A slot for a demanded page; unstarted prefetches are given up when nothing else is left.
bool Pager::place(PageIndex page, SlotIndex& slot) {
    auto placed = table_.place(page, nullptr, true);
    while (!placed && reclaim_prefetch()) placed = table_.place(page, nullptr, true);
    if (!placed) return false;
    if (placed->evicted != kNoPage) {
        account_eviction(placed->evicted);
        loads_[placed->evicted] = nullptr;
    }
    slot = placed->slot;
    return true;
}

void Pager::evict_at_random() {
    std::bernoulli_distribution evict(evict_probability_);
    for (PageIndex page = 0; page < loads_.size(); ++page)
        if (loads_[page] && loads_[page]->state == Load::State::kReady &&
            table_.pins(loads_[page]->slot) == 0 && evict(random_)) {
            account_eviction(page);
            forget(page);
        }
}

// --- copies -----------------------------------------------------------------------------------

void Pager::start(const std::shared_ptr<Load>& load) {
    load->state = Load::State::kLoading;
    table_.pin(load->slot);  // until on_copy_done: a slot being written is nobody's victim
    ++num_in_flight_;
    auto job = std::make_shared<CopyJob>();
    job->layer = layer_of(load->page);
    job->expert = expert_of(load->page);
    const auto slot = static_cast<size_t>(load->slot);
    if (!options_.shifts.empty()) slot_shifts_[slot] = options_.shifts[load->page];
    job->slot = options_.slots + slot * options_.slot_stride + slot_shifts_[slot];
    job->priority = load->cause == Load::Cause::kDemand ? Priority::kDemand : Priority::kPrefetch;
    if (options_.swap_back) {
        job->leaving = std::exchange(whole_[slot], nullptr);
        job->swap_back = options_.swap_back;
    }
    const SlotUse& use = uses_[slot];
    if (use.written) job->after.push_back(use.written);
    for (const auto& [stream, fence] : use.read) job->after.push_back(fence);
    job->on_done = [this, weak = std::weak_ptr(load), page = load->page, slot = load->slot,
                    cause = load->cause](const CopyResult& result) {
        on_copy_done(weak, page, slot, cause, result);
    };
    job->on_landed = [this, weak = std::weak_ptr(load), page = load->page, slot = load->slot,
                      cause = load->cause](const CopyResult& result) {
        on_copy_landed(weak, page, slot, cause, result);
    };
    load->job = job;
    if (engine_->enqueue(job)) settle(load, load->page, load->slot, load->cause, job->result);
}

// Runs on a worker thread of the engine.
void Pager::on_copy_done(const std::weak_ptr<Load>& weak, PageIndex page, SlotIndex slot,
                         Load::Cause cause, const CopyResult& result) {
    Lock lock(mutex_);
    settle(weak.lock(), page, slot, cause, result);
    while (!prefetching_.empty()) {  // forget those that are over
        const auto front = prefetching_.front().lock();
        if (front && front->state == Load::State::kLoading) break;
        prefetching_.pop_front();
    }
    serve_starved();
    changed_.notify_all();
}

// A copy is done, or enqueued when the result has a fence. `load` may be null or given up.
// Of the result only what is final when the copy is enqueued may be read.
void Pager::settle(const std::shared_ptr<Load>& load, PageIndex page, SlotIndex slot,
                   Load::Cause cause, const CopyResult& result) {
    const bool failed = result.error != nullptr || result.cancelled;
    LayerCounters& counters = counters_[static_cast<size_t>(layer_of(page))];
    counters.disk_bytes += result.disk_bytes;
    counters.swap_back_bytes += result.swap_back_bytes;
    if (options_.swap_back && !failed)
        whole_[static_cast<size_t>(slot)] = options_.slots +
                                            static_cast<size_t>(slot) * options_.slot_stride +
                                            slot_shifts_[static_cast<size_t>(slot)];
    if (cause == Load::Cause::kDemand)
        counters.demand_bytes += result.bytes;
    else if (cause == Load::Cause::kFill)
        counters.fill_bytes += result.bytes;
    else if (failed || !load)
        counters.prefetch_bytes_wasted += result.bytes;
    else if (load->demanded)
        counters.prefetch_bytes_used += result.bytes;
    std::exception_ptr error;
    if (result.error) {
        try {
            std::rethrow_exception(result.error);
        } catch (const std::exception& reason) {
            error = std::make_exception_ptr(
                PageReadError("reading " + describe(page) + ": " + reason.what()));
        }
        if (cause == Load::Cause::kFill && !fill_error_) fill_error_ = error;
    }
    // The copy came after everything the slot had been used for.
    if (result.fence) uses_[static_cast<size_t>(slot)] = {result.fence, {}};
    if (load) {
        load->job = nullptr;
        load->bytes = result.bytes;
        load->begin_ns = result.begin_ns;
        load->state = failed ? Load::State::kFailed : Load::State::kReady;
        load->fence = failed ? nullptr : result.fence;
        load->error = error;
        if (failed && loads_[page] == load) forget(page);
    }
    table_.unpin(slot);
    if (result.fence && !failed) return;  // in flight until on_copy_landed
    if (load) load->end_ns = result.end_ns;
    timeline_.add(
        {copy_kind(cause), layer_of(page), expert_of(page), slot, result.begin_ns, result.end_ns});
    --num_in_flight_;
}

// Runs on a worker thread of the engine. An error here means that the device itself failed.
void Pager::on_copy_landed(const std::weak_ptr<Load>& weak, PageIndex page, SlotIndex slot,
                           Load::Cause cause, const CopyResult& result) {
    const Lock lock(mutex_);
    if (const auto load = weak.lock()) {
        load->fence = nullptr;
        load->end_ns = result.end_ns;
        if (result.error && load->state == Load::State::kReady) {
            load->state = Load::State::kFailed;
            load->error = result.error;
            if (loads_[page] == load) forget(page);
        }
    }
    if (result.error && cause == Load::Cause::kFill && !fill_error_) fill_error_ = result.error;
    timeline_.add(
        {copy_kind(cause), layer_of(page), expert_of(page), slot, result.begin_ns, result.end_ns});
    --num_in_flight_;
    changed_.notify_all();
}

// Gives slots to misses that waited for other tickets to release theirs.
void Pager::serve_starved() {
    while (!starved_.empty() && !closed_) {
        const auto [ticket, index] = starved_.front();
        Ticket::Item& item = ticket->items_[static_cast<size_t>(index)];
        const PageIndex page = item.load->page;
        if (loads_[page]) {  // somebody else fetched it meanwhile
            item.load = loads_[page];
            item.owns_load = false;
            item.load->demanded = true;
            table_.touch(page);
            table_.pin(item.load->slot);
            if (item.load->job) engine_->promote(item.load->job);
        } else {
            SlotIndex slot = kNoSlot;
            if (!place(page, slot)) return;
            item.load->slot = slot;
            loads_[page] = item.load;
            table_.pin(slot);
            start(item.load);
        }
        starved_.pop_front();
    }
}

}  // namespace moe_offload
