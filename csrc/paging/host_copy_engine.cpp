#include "host_copy_engine.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace moe_offload {

HostCopyEngine::HostCopyEngine(std::shared_ptr<const PageSource> source, int num_threads,
                               size_t chunk_bytes)
    : source_(std::move(source)),
      queue_(source_, chunk_bytes, static_cast<size_t>(std::max(1, num_threads / 2))) {
    threads_.reserve(static_cast<size_t>(num_threads));
    for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { work(); });
}

HostCopyEngine::~HostCopyEngine() { stop(); }

void HostCopyEngine::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        queue_.clear();
    }
    work_ready_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void HostCopyEngine::submit(std::shared_ptr<CopyJob> job) {
    {
        std::lock_guard lock(mutex_);
        if (stopping_) return;  // dropped, as everything that was queued
        queue_.push(std::move(job));
    }
    work_ready_.notify_all();  // every idle worker can take a chunk of the same job
}

void HostCopyEngine::promote(const std::shared_ptr<CopyJob>& job) {
    {
        std::lock_guard lock(mutex_);
        queue_.promote(job);
    }
    work_ready_.notify_all();  // workers that prefetches may not use can help a demand
}

CopyEngine::Cancelled HostCopyEngine::cancel(const std::shared_ptr<CopyJob>& job) {
    std::lock_guard lock(mutex_);
    return queue_.cancel(job);
}

void HostCopyEngine::set_chaos(const Chaos& chaos) {
    std::lock_guard lock(mutex_);
    queue_.set_chaos(chaos);
}

void HostCopyEngine::work() {
    Scratch scratch;
    std::unique_lock lock(mutex_);
    while (true) {
        // Waits for a chunk that may start, or for stop().
        work_ready_.wait(lock, [this] { return stopping_ || queue_.ready(); });
        if (stopping_) return;
        const CopyQueue::Step step = *queue_.take();
        lock.unlock();
        std::exception_ptr error = step.error;
        uint64_t disk_bytes = 0;
        try {
            if (step.delay_us > 0)
                std::this_thread::sleep_for(std::chrono::microseconds(step.delay_us));
            if (step.send_back) step.job->swap_back->send(step.job->leaving);
            if (step.chunk != nullptr)
                disk_bytes = source_->read(step.job->layer, step.job->expert, *step.chunk,
                                           step.job->slot, scratch);
        } catch (...) {
            error = std::current_exception();
        }
        lock.lock();
        if (step.send_back) work_ready_.notify_all();  // its chunks may start
        if (step.prefetch) work_ready_.notify_one();   // another prefetch chunk may start
        if (const auto report = queue_.finish(step, error, disk_bytes)) {
            lock.unlock();
            report();
            lock.lock();
        }
    }
}

}  // namespace moe_offload
