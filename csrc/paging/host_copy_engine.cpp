#include "host_copy_engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "clock.h"
#include "errors.h"

namespace moe_offload {

HostCopyEngine::HostCopyEngine(std::shared_ptr<const PageSource> source, int num_threads,
                               size_t chunk_bytes)
    : source_(std::move(source)), chunk_bytes_(chunk_bytes) {
    threads_.reserve(static_cast<size_t>(num_threads));
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
}

HostCopyEngine::~HostCopyEngine() { stop(); }

void HostCopyEngine::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        demand_.clear();
        prefetch_.clear();
    }
    work_ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void HostCopyEngine::submit(std::shared_ptr<CopyJob> job) {
    {
        std::lock_guard lock(mutex_);
        if (stopping_) return;  // dropped, as everything that was queued
        (job->priority == Priority::kDemand ? demand_ : prefetch_).push_back(std::move(job));
    }
    work_ready_.notify_all();  // every idle worker can take a chunk of the same job
}

void HostCopyEngine::promote(const std::shared_ptr<CopyJob>& job) {
    std::lock_guard lock(mutex_);
    if (job->priority == Priority::kDemand) return;
    job->priority = Priority::kDemand;
    const auto found = std::find(prefetch_.begin(), prefetch_.end(), job);
    if (found == prefetch_.end()) return;  // all its chunks have started
    prefetch_.erase(found);
    demand_.push_back(job);
}

CopyEngine::Cancelled HostCopyEngine::cancel(const std::shared_ptr<CopyJob>& job) {
    std::lock_guard lock(mutex_);
    const auto found = std::find(prefetch_.begin(), prefetch_.end(), job);
    if (found == prefetch_.end()) return Cancelled::kTooLate;
    prefetch_.erase(found);
    if (job->chunks_in_flight == 0) return Cancelled::kGone;
    job->stopped = true;
    job->result.cancelled = true;
    return Cancelled::kWillReport;
}

void HostCopyEngine::set_chaos(const Chaos& chaos) {
    std::lock_guard lock(mutex_);
    chaos_ = chaos;
    random_.seed(chaos.seed);
}

std::shared_ptr<CopyJob> HostCopyEngine::pick() {
    Queue& queue = demand_.empty() ? prefetch_ : demand_;
    if (queue.empty()) return nullptr;
    if (chaos_.reorder && queue.size() > 1)
        std::swap(queue.front(), queue[random_() % queue.size()]);
    return queue.front();
}

void HostCopyEngine::remove(const std::shared_ptr<CopyJob>& job) {
    for (Queue* queue : {&demand_, &prefetch_}) {
        const auto found = std::find(queue->begin(), queue->end(), job);
        if (found != queue->end()) queue->erase(found);
    }
}

void HostCopyEngine::work() {
    Scratch scratch;
    std::unique_lock lock(mutex_);
    while (true) {
        // Waits for a job with chunks left, or for stop().
        work_ready_.wait(lock,
                         [this] { return stopping_ || !demand_.empty() || !prefetch_.empty(); });
        if (stopping_) return;
        const std::shared_ptr<CopyJob> job = pick();
        std::exception_ptr error;
        if (!job->planned) {
            job->planned = true;
            job->result.begin_ns = now_ns();
            try {
                job->chunks = source_->chunks(job->layer, job->expert, chunk_bytes_);
                if (std::bernoulli_distribution(chaos_.fail_probability)(random_))
                    throw PageReadError("injected failure (chaos)");
            } catch (...) {
                error = std::current_exception();
                job->chunks.clear();
            }
        }
        if (job->next_chunk >= job->chunks.size()) {  // nothing to read, or planning failed
            remove(job);
            ++job->chunks_in_flight;
            finish_chunk(job, error, 0, 0, lock);
            continue;
        }
        const Chunk& chunk = job->chunks[job->next_chunk++];
        if (job->next_chunk == job->chunks.size()) remove(job);
        ++job->chunks_in_flight;
        int64_t delay_us = 0;
        if (chaos_.max_delay_us > 0)
            delay_us = std::uniform_int_distribution<int64_t>(0, chaos_.max_delay_us)(random_);

        lock.unlock();
        uint64_t disk_bytes = 0;
        try {
            if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
            disk_bytes = source_->read(job->layer, job->expert, chunk, job->slot, scratch);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        finish_chunk(job, error, error ? 0 : chunk.nbytes, disk_bytes, lock);
    }
}

// Called with the lock held; drops it around on_done and takes it again.
void HostCopyEngine::finish_chunk(const std::shared_ptr<CopyJob>& job, std::exception_ptr error,
                                  uint64_t bytes, uint64_t disk_bytes,
                                  std::unique_lock<std::mutex>& lock) {
    --job->chunks_in_flight;
    job->result.bytes += bytes;
    job->result.disk_bytes += disk_bytes;
    if (error && !job->result.error) {
        job->result.error = error;
        job->stopped = true;
        remove(job);
    }
    const bool all_started = job->stopped || job->next_chunk >= job->chunks.size();
    if (job->chunks_in_flight > 0 || !all_started) return;
    job->result.end_ns = now_ns();
    const auto on_done = std::move(job->on_done);
    job->on_done = nullptr;
    lock.unlock();
    on_done(job->result);
    lock.lock();
}

}  // namespace moe_offload
