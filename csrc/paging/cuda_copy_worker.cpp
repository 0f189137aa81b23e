// The CUDA copy engine's own threads: the worker, which polls, feeds prefetches to the link and
// reports, and the one that pins host memory.
#include <sys/prctl.h>
#include <algorithm>
#include <chrono>
#include <utility>

#include "clock.h"
#include "cuda_copy_engine.h"

namespace moe_offload {
namespace {

constexpr auto kPollInterval = std::chrono::microseconds(20);
constexpr auto kStopTimeout = std::chrono::seconds(30);

}  // namespace

void CudaCopyEngine::work() {
    ::prctl(PR_SET_TIMERSLACK, 1000);  // ns; by default a sleep of 20 us takes 70
    Lock lock(mutex_);
    while (!stopping_) {
        try {
            poll();
            advance(lock);
        } catch (...) {
            // The device failed. Whoever waits for a copy learns why; nothing can be saved.
            if (!broken_) broken_ = std::current_exception();
            for (Stream* stream : {&demand_, &prefetch_})
                for (const Landing& landing : std::exchange(stream->landing, {}))
                    if (landing.report) landed_.push_back(landing.transfer);
            in_flight_.clear();
            in_flight_bytes_ = 0;
            for (auto* queue : {&demands_, &prefetches_})
                for (const TransferPtr& transfer : std::exchange(*queue, {}))
                    done_.push_back(transfer);
        }
        report(lock);
        if (stopping_) break;
        if (!done_.empty() || !landed_.empty() || !unlocks_.empty()) continue;
        // Waits for work; while there is some, for the next look at the events of copies.
        if (demands_.empty() && prefetches_.empty() && in_flight_.empty() &&
            demand_.landing.empty() && prefetch_.landing.empty())
            changed_.wait(lock);
        else
            changed_.wait_for(lock, kPollInterval);
    }
}

// Looks which copies have landed.
void CudaCopyEngine::poll() {
    for (Stream* stream : {&demand_, &prefetch_})
        while (!stream->landing.empty() && stream->landing.front().fence->passed()) {
            const Landing landing = std::move(stream->landing.front());
            stream->landing.pop_front();
            landing.transfer->landed_ns = now_ns();
            if (landing.report)
                landed_.push_back(landing.transfer);
            else
                give_back(landing.transfer);
        }
    while (!in_flight_.empty() && in_flight_.front().first->passed()) {
        in_flight_bytes_ -= in_flight_.front().second;
        in_flight_.pop_front();
    }
}

// Enqueues what may be enqueued now.
void CudaCopyEngine::advance(Lock& lock) {
    while (!stopping_ && (!demands_.empty() || !prefetches_.empty())) {
        if (chaos_.max_delay_us > 0) {
            const auto delay =
                std::uniform_int_distribution<int64_t>(0, chaos_.max_delay_us)(random_);
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(delay));
            lock.lock();
            if (stopping_) return;
            poll();
        }
        const bool demand = !demands_.empty();
        std::deque<TransferPtr>& queue = demand ? demands_ : prefetches_;
        if (queue.empty()) continue;
        if (!demand && (!demand_.landing.empty() || in_flight_bytes_ + options_.chunk_bytes / 2 >
                                                        std::max<size_t>(options_.chunk_bytes, 1)))
            return;
        if (chaos_.reorder && queue.size() > 1)
            std::swap(queue.front(), queue[random_() % queue.size()]);
        const TransferPtr transfer = queue.front();
        Stream& stream = demand ? demand_ : prefetch_;
        try {
            begin(*transfer, stream);
            const size_t nbytes =
                transfer->finished_issuing()
                    ? 0
                    : issue_next(*transfer, stream, std::max<size_t>(options_.chunk_bytes / 2, 1));
            if (nbytes == 0 && !transfer->finished_issuing()) return;  // no staging buffer is free
            if (!demand) {
                in_flight_.emplace_back(events_->record(stream.handle), nbytes);
                in_flight_bytes_ += nbytes;
            }
            if (!transfer->finished_issuing()) continue;
            queue.erase(std::find(queue.begin(), queue.end(), transfer));
            finish_issue(transfer, stream, true);
            done_.push_back(transfer);
        } catch (...) {
            if (const auto found = std::find(queue.begin(), queue.end(), transfer);
                found != queue.end())
                queue.erase(found);
            fail(transfer, std::current_exception());
        }
        if (demand) return;  // it is reported before the next is staged
    }
}

// Tells the pager and the host tier what happened, with no lock held.
void CudaCopyEngine::report(Lock& lock) {
    while (!stopping_ && (!done_.empty() || !landed_.empty() || !unlocks_.empty())) {
        if (!done_.empty()) {
            const TransferPtr transfer = std::move(done_.front());
            done_.pop_front();
            const auto on_done = std::move(transfer->job->on_done);
            transfer->job->on_done = nullptr;
            CopyResult result = transfer->job->result;
            if (broken_ && !result.error) result.error = broken_;
            if (result.error || result.cancelled) {
                result.end_ns = now_ns();
                if (!result.fence) give_back(transfer);
            }
            lock.unlock();
            if (on_done) on_done(result);
            lock.lock();
        } else if (!landed_.empty()) {
            const TransferPtr transfer = std::move(landed_.front());
            landed_.pop_front();
            give_back(transfer);
            const auto on_landed = std::move(transfer->job->on_landed);
            transfer->job->on_landed = nullptr;
            CopyResult result = transfer->job->result;
            result.end_ns = transfer->landed_ns;
            if (broken_) result.error = broken_;
            lock.unlock();
            if (on_landed) on_landed(result);
            lock.lock();
        } else {
            const auto want = std::move(unlocks_.front());
            unlocks_.pop_front();
            lock.unlock();
            tier_->unlock(want);
            lock.lock();
        }
    }
}

// Registers host memory piece by piece: the tensors of a live model where they lie, or the frames,
// whose pages the kernel is asked for first.
void CudaCopyEngine::pin_everything() {
    constexpr size_t kChunk = PinnedRanges::kChunkBytes;
    try {
        for (size_t offset = 0; offset < arena_.nbytes() && !stopping_; offset += kChunk) {
            const size_t nbytes = std::min(kChunk, arena_.nbytes() - offset);
            arena_.populate(offset, nbytes);
            if (!pins_.pin(arena_.data() + offset, nbytes)) break;
        }
        auto ranges = source_->ranges();  // none for files
        std::sort(ranges.begin(), ranges.end());
        // Experts of one tensor touch: one registration for many of them, not one for each.
        for (size_t i = 0; i < ranges.size() && !stopping_;) {
            const std::byte* begin = ranges[i].first;
            const std::byte* end = begin + ranges[i].second;
            for (++i; i < ranges.size() && ranges[i].first <= end + PinnedRanges::kPageBytes &&
                      size_t(ranges[i].first + ranges[i].second - begin) <= kChunk;
                 ++i)
                end = std::max(end, ranges[i].first + ranges[i].second);
            bool more = true;
            for (; begin < end && more && !stopping_; begin += kChunk)
                more = pins_.pin(begin, std::min(kChunk, size_t(end - begin)));
            if (!more) break;
        }
    } catch (const DeviceError&) {  // not to be pinned is slow, not wrong
    }
    pinning_ = false;
}

void CudaCopyEngine::stop() {
    {
        const Lock lock(mutex_);
        if (stopping_.exchange(true)) return;
    }
    changed_.notify_all();
    if (tier_) tier_->stop();
    if (pinner_.joinable()) pinner_.join();
    if (worker_.joinable()) worker_.join();
    // Nothing may be written into slots or read from host memory and slots after this returns.
    const auto deadline = std::chrono::steady_clock::now() + kStopTimeout;
    try {
        for (Stream* stream : {&demand_, &prefetch_})
            if (stream->handle != nullptr) recorded_.push_back(events_->record(stream->handle));
        for (const FencePtr& fence : recorded_)
            while (!fence->passed() && std::chrono::steady_clock::now() < deadline)
                std::this_thread::sleep_for(kPollInterval);
    } catch (const DeviceError&) {  // a failed device runs nothing any more
    }
    const Lock lock(mutex_);
    demands_.clear();
    prefetches_.clear();
    done_.clear();
    landed_.clear();
    unlocks_.clear();
    recorded_.clear();
    in_flight_.clear();
    demand_.landing.clear();
    prefetch_.landing.clear();
    transfers_.clear();
    for (Staging& staging : staging_) staging.busy = nullptr;
    // Pinned memory is dear: it goes back when the pager is closed, not when it is destroyed.
    pins_.release();
    staging_pins_.release();
    arena_.release();
    staging_memory_.release();
    try {
        const CudaContext::Current current(*context_);
        for (Stream* stream : {&demand_, &prefetch_})
            if (stream->handle != nullptr)
                context_->driver().stream_destroy(std::exchange(stream->handle, nullptr));
    } catch (const DeviceError&) {  // the context is gone, and its streams with it
    }
}

}  // namespace moe_offload
