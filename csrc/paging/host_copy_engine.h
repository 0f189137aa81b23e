// Copies on worker threads: file to slot, memory to slot, or through a callback.
//
// Two queues, demand before prefetch. A job is cut into chunks and every worker takes the next
// chunk of the first job, so several reads of one page are in flight at once (that is the disk's
// queue depth) and a demand waits for at most one prefetch chunk per worker.
// One lock guards queues and job state; it is never held while bytes move.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>

#include "copy_engine.h"

namespace moe_offload {

class HostCopyEngine final : public CopyEngine {
  public:
    // Starts `num_threads` >= 1 workers that read from `source`.
    HostCopyEngine(std::shared_ptr<const PageSource> source, int num_threads, size_t chunk_bytes);
    ~HostCopyEngine() override;

    void submit(std::shared_ptr<CopyJob> job) override;
    void promote(const std::shared_ptr<CopyJob>& job) override;
    Cancelled cancel(const std::shared_ptr<CopyJob>& job) override;
    void set_chaos(const Chaos& chaos) override;
    void stop() override;

  private:
    using Queue = std::deque<std::shared_ptr<CopyJob>>;

    void work();
    std::shared_ptr<CopyJob> pick();
    void finish_chunk(const std::shared_ptr<CopyJob>& job, std::exception_ptr error, uint64_t bytes,
                      uint64_t disk_bytes, std::unique_lock<std::mutex>& lock);
    void remove(const std::shared_ptr<CopyJob>& job);

    const std::shared_ptr<const PageSource> source_;
    const size_t chunk_bytes_;

    std::mutex mutex_;
    std::condition_variable work_ready_;
    Queue demand_, prefetch_;  // jobs with chunks left to start
    bool stopping_ = false;
    Chaos chaos_;
    std::mt19937_64 random_;

    std::vector<std::thread> threads_;
};

}  // namespace moe_offload
