// File to slot through io_uring: one thread that keeps many reads in flight.
//
// The thread pool needs a thread per read in flight, and each read wakes one; here the thread of
// the ring starts reads, sleeps until some have ended, starts the next and only then moves bounced
// bytes into the slot, so that the disk does not wait for copies. What was queued together is
// submitted by one system call. Built when liburing was found, and only for files: memory and
// callbacks have nothing to wait for and stay with the thread pool.
//
// Depth is for demands; prefetches keep kPrefetchDepth reads in flight. Those cannot be taken back,
// so they are what a demand has to wait for, and two reads of 1 MiB in huge pages already run the
// disk at its full rate (bench/results, roofs).
#pragma once

#include <memory>
#include <mutex>
#include <thread>

#include "copy_queue.h"
#include "file_source.h"

namespace moe_offload {

class UringCopyEngine final : public CopyEngine {
  public:
    static constexpr size_t kPrefetchDepth = 2;

    // Throws std::system_error when the kernel, a limit or a seccomp policy refuses io_uring: the
    // caller falls back to HostCopyEngine. queue_depth: reads in flight, >= 1.
    UringCopyEngine(std::shared_ptr<const FileSource> source, int queue_depth, size_t chunk_bytes);
    ~UringCopyEngine() override;

    std::string name() const override { return "io_uring"; }
    void submit(std::shared_ptr<CopyJob> job) override;
    void promote(const std::shared_ptr<CopyJob>& job) override;
    Cancelled cancel(const std::shared_ptr<CopyJob>& job) override;
    void set_chaos(const Chaos& chaos) override;
    void stop() override;

  private:
    struct Ring;  // the thread's own: liburing stays out of this header
    void work();
    void wake(bool sleeping);

    const std::unique_ptr<Ring> ring_;
    std::mutex mutex_;
    CopyQueue queue_;
    bool stopping_ = false;
    bool sleeping_ = false;  // the thread waits for the ring and has not been woken
    std::thread thread_;
};

}  // namespace moe_offload
