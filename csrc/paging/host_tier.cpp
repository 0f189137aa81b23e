#include "host_tier.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe_offload {
namespace {

PolicySetting lru_setting(size_t num_layers, size_t experts_per_layer, size_t num_frames) {
    PolicySetting setting;
    setting.num_experts.assign(num_layers, static_cast<int32_t>(experts_per_layer));
    setting.num_slots = num_frames;
    return setting;
}

}  // namespace

HostTier::HostTier(std::unique_ptr<CopyEngine> reader, std::byte* frames, size_t num_frames,
                   size_t frame_bytes, size_t num_layers, size_t experts_per_layer)
    : frames_(frames),
      frame_bytes_(frame_bytes),
      experts_per_layer_(experts_per_layer),
      max_prefetch_frames_(num_frames / 2),
      table_(num_layers * experts_per_layer, num_frames,
             make_policy("lru", lru_setting(num_layers, experts_per_layer, num_frames))),
      state_(num_frames),
      reader_(std::move(reader)) {
    if (num_frames < kMinFrames || frames == nullptr)
        throw std::invalid_argument("HostTier: expected at least " + std::to_string(kMinFrames) +
                                    " frames, got " + std::to_string(num_frames));
}

PageIndex HostTier::page_of(const HostWant& want) const {
    return static_cast<PageIndex>(static_cast<size_t>(want.layer) * experts_per_layer_ +
                                  static_cast<size_t>(want.expert));
}

bool HostTier::fetch(const std::shared_ptr<HostWant>& want) {
    const std::lock_guard lock(mutex_);
    if (place(want)) return state_[static_cast<size_t>(want->frame)].ready;
    (want->priority == Priority::kDemand ? demands_ : prefetches_).push_back(want);
    return false;
}

// Finds or takes a frame for the page and locks it; false when there is none to be had now.
// A frame that is not ready has the request among its waiting ones afterwards.
bool HostTier::place(const std::shared_ptr<HostWant>& want) {
    const bool prefetch = want->priority == Priority::kPrefetch;
    if (prefetch && num_prefetch_locks_ >= max_prefetch_frames_) return false;
    const PageIndex page = page_of(*want);
    SlotIndex frame = table_.slot_of(page);
    if (frame != kNoSlot) {
        table_.touch(page);
        Frame& state = state_[static_cast<size_t>(frame)];
        lock_frame(*want, frame);
        ++counters_.hits;
        if (state.ready) return true;
        state.waiting.push_back(want);  // somebody reads it already
        if (!prefetch && state.read) reader_->promote(state.read);
        return true;
    }
    const auto placed = table_.place(page, nullptr, true);
    if (!placed) return false;
    if (placed->evicted != kNoPage) ++counters_.evictions;
    ++counters_.misses;
    frame = placed->slot;
    lock_frame(*want, frame);
    Frame& state = state_[static_cast<size_t>(frame)];
    state.ready = false;
    state.waiting.push_back(want);
    start_read(page, frame, want->priority);
    return true;
}

void HostTier::lock_frame(HostWant& want, SlotIndex frame) {
    want.frame = frame;
    table_.pin(frame);
    if (want.priority == Priority::kPrefetch) ++num_prefetch_locks_;
}

void HostTier::start_read(PageIndex page, SlotIndex frame, Priority priority) {
    auto job = std::make_shared<CopyJob>();
    job->layer = static_cast<int32_t>(page / experts_per_layer_);
    job->expert = static_cast<int32_t>(page % experts_per_layer_);
    job->slot = address(frame);
    job->priority = priority;
    job->on_done = [this, page, frame](const CopyResult& result) { on_read(page, frame, result); };
    table_.pin(frame);  // by the read itself
    state_[static_cast<size_t>(frame)].read = job;
    reader_->submit(std::move(job));
}

// On a reader's thread.
void HostTier::on_read(PageIndex page, SlotIndex frame, const CopyResult& result) {
    Wants ready;
    {
        const std::lock_guard lock(mutex_);
        Frame& state = state_[static_cast<size_t>(frame)];
        state.read = nullptr;
        counters_.disk_bytes += result.disk_bytes;
        if (result.cancelled && !state.waiting.empty()) {
            // Cancelled, and wanted again before the cancelling was through.
            table_.unpin(frame);
            start_read(page, frame, Priority::kDemand);
            return;
        }
        ready.swap(state.waiting);
        if (result.error || result.cancelled) {
            for (const auto& want : ready) {
                if (want->priority == Priority::kPrefetch) --num_prefetch_locks_;
                table_.unpin(want->frame);
                want->frame = kNoSlot;
            }
            table_.drop(page);
        } else {
            state.ready = true;
        }
        table_.unpin(frame);
    }
    CopyResult share = result;  // what was read counts once
    for (const auto& want : ready) {
        want->on_ready(share);
        share.disk_bytes = 0;
    }
    Wants more;
    {
        const std::lock_guard lock(mutex_);
        serve_waiting(more);
    }
    for (const auto& want : more) want->on_ready({});
}

// Gives frames to requests that found none. `ready` gets those whose page is here by now.
void HostTier::serve_waiting(Wants& ready) {
    for (auto* queue : {&demands_, &prefetches_})
        while (!queue->empty()) {
            const std::shared_ptr<HostWant> want = queue->front();
            if (!place(want)) break;
            queue->pop_front();
            if (state_[static_cast<size_t>(want->frame)].ready) ready.push_back(want);
        }
}

bool HostTier::promote(const std::shared_ptr<HostWant>& want) {
    const std::lock_guard lock(mutex_);
    if (want->priority == Priority::kDemand) return false;
    if (want->frame != kNoSlot) --num_prefetch_locks_;
    want->priority = Priority::kDemand;
    if (want->frame != kNoSlot) {
        Frame& state = state_[static_cast<size_t>(want->frame)];
        if (!state.ready && state.read) reader_->promote(state.read);
        return false;  // on_ready runs, or ran, for what fetch answered false to
    }
    const auto found = std::find(prefetches_.begin(), prefetches_.end(), want);
    if (found == prefetches_.end()) return false;
    prefetches_.erase(found);
    if (place(want)) return state_[static_cast<size_t>(want->frame)].ready;
    demands_.push_back(want);
    return false;
}

bool HostTier::cancel(const std::shared_ptr<HostWant>& want) {
    const std::lock_guard lock(mutex_);
    for (auto* queue : {&demands_, &prefetches_})
        if (const auto found = std::find(queue->begin(), queue->end(), want);
            found != queue->end()) {
            queue->erase(found);
            return true;
        }
    if (want->frame == kNoSlot) return false;  // failed, on_ready is on its way
    const SlotIndex frame = want->frame;
    Frame& state = state_[static_cast<size_t>(frame)];
    const auto found = std::find(state.waiting.begin(), state.waiting.end(), want);
    if (found == state.waiting.end()) return false;
    state.waiting.erase(found);
    if (want->priority == Priority::kPrefetch) --num_prefetch_locks_;
    want->frame = kNoSlot;
    table_.unpin(frame);
    if (state.waiting.empty() && state.read &&
        reader_->cancel(state.read) == CopyEngine::Cancelled::kGone) {
        counters_.disk_bytes += state.read->result.disk_bytes;
        state.read = nullptr;
        table_.drop(page_of(*want));
        table_.unpin(frame);  // the read's own
    }
    return true;
}

void HostTier::unlock(const std::shared_ptr<HostWant>& want) {
    Wants ready;
    {
        const std::lock_guard lock(mutex_);
        if (want->priority == Priority::kPrefetch) --num_prefetch_locks_;
        table_.unpin(want->frame);
        want->frame = kNoSlot;
        serve_waiting(ready);
    }
    for (const auto& other : ready) other->on_ready({});
}

HostTier::Counters HostTier::counters() const {
    const std::lock_guard lock(mutex_);
    return counters_;
}

}  // namespace moe_offload
