// The part of the pager that nobody waits for: prefetch, its cancellation, and the initial fill.
#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "errors.h"
#include "pager.h"

namespace moe_offload {

size_t Pager::prefetch(int32_t layer, std::span<const int32_t> experts) {
    check_usable();
    Lock lock(mutex_);
    check_request(layer, experts);
    if (log_) log_->add(EventKind::kPrefetch, layer, experts, {}, 0);
    const auto may_evict = [this](PageIndex candidate) {
        return loads_[candidate]->expected_at != visit(layer_of(candidate));
    };
    size_t started = 0;
    for (const int32_t expert : experts) {
        const PageIndex page = page_of(layer, expert);
        if (loads_[page]) continue;
        const auto placed = table_.place(page, may_evict, false);
        if (!placed) break;
        if (placed->evicted != kNoPage) {
            account_eviction(placed->evicted);
            loads_[placed->evicted] = nullptr;
        }
        start_prefetch(page, placed->slot);
        ++started;
    }
    return started;
}

size_t Pager::read_ahead(int32_t layer) {
    check_usable();
    Lock lock(mutex_);
    check_request(layer, {});
    const int32_t num_experts = options_.num_experts[static_cast<size_t>(layer)];
    size_t ahead = 0;  // already
    for (int32_t expert = 0; expert < num_experts; ++expert) {
        const auto& load = loads_[page_of(layer, expert)];
        if (load && load->cause == Load::Cause::kPrefetch && !load->demanded) ++ahead;
    }
    const size_t most = stream_slots(admit_limit_);
    size_t started = 0;
    for (int32_t expert = 0; expert < num_experts && ahead < most; ++expert) {
        const PageIndex page = page_of(layer, expert);
        if (loads_[page]) continue;
        const auto slot = table_.place_free(page);
        if (!slot) break;
        if (log_) log_->add(EventKind::kPrefetch, layer, std::span(&expert, 1), {}, 0);
        start_prefetch(page, *slot);
        ++ahead;
        ++started;
    }
    return started;
}

void Pager::start_prefetch(PageIndex page, SlotIndex slot) {
    const auto load = own(page, slot, Load::Cause::kPrefetch);
    load->expected_at = visit(layer_of(page));
    prefetching_.push_back(load);
    start(load);
}

// Number of the layer's coming acquire, from 1. reset_counters must not set it back.
uint64_t Pager::visit(int32_t layer) const { return visits_[static_cast<size_t>(layer)] + 1; }

std::vector<int32_t> Pager::expect(int32_t layer, std::span<const int32_t> experts) {
    check_usable();
    Lock lock(mutex_);
    check_request(layer, experts);
    if (log_) log_->add(EventKind::kExpect, layer, experts, {}, 0);
    std::vector<int32_t> absent;
    for (const int32_t expert : experts) {
        const auto& load = loads_[page_of(layer, expert)];
        if (load)
            load->expected_at = visit(layer);
        else
            absent.push_back(expert);
    }
    return absent;
}

void Pager::cancel_prefetches(int32_t layer, std::span<const int32_t> keep) {
    check_usable();
    Lock lock(mutex_);
    if (closed_) throw StateError("pager: used after close");
    for (size_t i = prefetching_.size(); i > 0; --i) {
        const auto load = prefetching_[i - 1].lock();
        if (!load || load->demanded || (layer >= 0 && layer_of(load->page) != layer)) continue;
        const bool kept = std::find(keep.begin(), keep.end(), expert_of(load->page)) != keep.end();
        if (!kept) cancel(load);
    }
}

void Pager::predict(int32_t layer, std::span<const int32_t> experts,
                    std::span<const float> probabilities, int32_t visits_ahead) {
    check_usable();
    Lock lock(mutex_);
    check_request(layer, experts);
    check_values(experts, probabilities);
    if (log_) log_->add(EventKind::kPredict, layer, experts, probabilities, visits_ahead);
    pages_.clear();
    for (const int32_t expert : experts) pages_.push_back(page_of(layer, expert));
    table_.policy().predict({layer, pages_, probabilities, visits_ahead});
}

void Pager::begin_sequence() {
    check_usable();
    Lock lock(mutex_);
    if (closed_) throw StateError("pager: used after close; load or offload the model again");
    if (log_) log_->add(EventKind::kSequence, 0, {}, {}, 0);
    table_.policy().sequence_begins();
}

size_t Pager::fill(std::span<const std::pair<int32_t, int32_t>> pages) {
    check_usable();
    Lock lock(mutex_);
    size_t started = 0;
    for (const auto& [layer, expert] : pages) {
        check_request(layer, std::span(&expert, 1));
        const PageIndex page = page_of(layer, expert);
        if (log_) log_->add(EventKind::kFill, layer, std::span(&expert, 1), {}, 0);
        if (loads_[page]) continue;
        if (table_.num_free() == 0) break;
        const auto slot = table_.place_free(page);
        if (!slot) continue;  // the layer's quota is full
        start(own(page, *slot, Load::Cause::kFill));
        ++started;
    }
    return started;
}

void Pager::drain() {
    check_usable();
    Lock lock(mutex_);
    const auto deadline =
        std::chrono::steady_clock::now() + std::chrono::nanoseconds(options_.wait_timeout_ns);
    uint64_t last_in_flight = num_in_flight_;
    auto patience = deadline;
    while (num_in_flight_ > 0 && !closed_) {
        // Waits for copies to end; gives up when none has ended for the whole timeout.
        if (changed_.wait_until(lock, patience) == std::cv_status::timeout &&
            num_in_flight_ == last_in_flight)
            throw StateError("pager: no copy ended within the wait timeout; " +
                             std::to_string(num_in_flight_) + " still in flight");
        if (num_in_flight_ != last_in_flight) {
            last_in_flight = num_in_flight_;
            patience = std::chrono::steady_clock::now() +
                       std::chrono::nanoseconds(options_.wait_timeout_ns);
        }
    }
    if (closed_) throw StateError("pager: closed while waiting for copies");
    if (fill_error_) std::rethrow_exception(std::exchange(fill_error_, nullptr));
}

bool Pager::reclaim_prefetch() {
    const size_t free_before = table_.num_free();
    while (!prefetching_.empty()) {
        const auto load = prefetching_.back().lock();
        prefetching_.pop_back();
        if (load && !load->demanded && load->state == Load::State::kLoading && cancel(load) &&
            table_.num_free() > free_before)
            return true;
    }
    return false;
}

// Stops a prefetch. The page is absent at once; its slot is free when nothing writes it any more.
bool Pager::cancel(const std::shared_ptr<Load>& load) {
    if (load->state != Load::State::kLoading || loads_[load->page] != load) return false;
    const auto answer = engine_->cancel(load->job);
    if (answer == CopyEngine::Cancelled::kTooLate) return false;
    forget(load->page);
    if (answer == CopyEngine::Cancelled::kGone) {
        LayerCounters& counters = counters_[static_cast<size_t>(layer_of(load->page))];
        counters.prefetch_bytes_wasted += load->job->result.bytes;
        counters.disk_bytes += load->job->result.disk_bytes;
        counters.swap_back_bytes += load->job->result.swap_back_bytes;
        if (load->job->leaving) whole_[static_cast<size_t>(load->slot)] = load->job->leaving;
        --num_in_flight_;
        table_.unpin(load->slot);
        changed_.notify_all();
    }
    load->state = Load::State::kFailed;
    load->job = nullptr;
    return true;
}

}  // namespace moe_offload
