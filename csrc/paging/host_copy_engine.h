// Copies on worker threads: file to slot, memory to slot, or through a callback. Works with every
// source and every kernel; uring_copy_engine.h reads files with less CPU time where it can.
//
// Every worker takes the next chunk of the first job, so several reads of one page are in flight at
// once. One lock guards queue and job state; it is never held while bytes move.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "copy_queue.h"

namespace moe_offload {

class HostCopyEngine final : public CopyEngine {
  public:
    // Starts `num_threads` >= 1 workers that read from `source`. Half of them at most copy
    // prefetches at a time.
    HostCopyEngine(std::shared_ptr<const PageSource> source, int num_threads, size_t chunk_bytes);
    ~HostCopyEngine() override;

    std::string name() const override { return "threads"; }
    void submit(std::shared_ptr<CopyJob> job) override;
    void promote(const std::shared_ptr<CopyJob>& job) override;
    Cancelled cancel(const std::shared_ptr<CopyJob>& job) override;
    void set_chaos(const Chaos& chaos) override;
    void stop() override;

  private:
    void work();

    const std::shared_ptr<const PageSource> source_;
    std::mutex mutex_;
    std::condition_variable work_ready_;
    CopyQueue queue_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace moe_offload
