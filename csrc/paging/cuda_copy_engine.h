// Copies from host memory into slots on a CUDA device, through the driver.
//
//     disk --reader--> frame (host tier)  --chunks, copy stream-->  slot --event--> compute stream
//     tensors of a live model, pinned in place ---^
//
// Two non-blocking streams, one for demands and one for prefetches: the device has one engine per
// direction, so the second exists only to let a demand overtake. A demand whose page lies in
// pinned host memory is enqueued by the thread that asks, in one call per contiguous run.
// Prefetches are enqueued by the worker, chunk by chunk: at most `chunk_bytes` of them are in
// flight, as two halves so that the link does not idle between, and none is added while a demand is
// under way (stream priorities do not apply to copies). So a demand waits for at most one chunk of
// prefetch.
//
// Completion: the worker polls events while copies are in flight. Not cuLaunchHostFunc: it would
// hold up the copy stream for each callback, may call nothing of the driver, and runs on a thread
// of the driver's; a poll of 20 us is below the time of the half chunk still queued.
// Nobody waits for the worker to compute: compute streams wait for events.
//
// What could not be pinned goes through small pinned staging buffers, copied by the worker: slower,
// counted (staged_bytes) and explained (limit()).
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <unordered_map>

#include "cuda_events.h"
#include "host_tier.h"
#include "pinned_memory.h"

namespace moe_offload {

struct CudaCopyOptions {
    size_t chunk_bytes = size_t{8} << 20;  // most prefetch bytes a demand can find in its way
    size_t page_bytes = 0;                 // of a page, gaps between sections included
    size_t num_layers = 0, experts_per_layer = 0;
    size_t host_bytes = 0;          // frames between disk and slots; unused for sources in memory
    size_t pin_bytes = SIZE_MAX;    // most host memory to register
    bool pin_in_background = true;  // false: the constructor returns when all is pinned
};

class CudaCopyEngine final : public CopyEngine {
  public:
    static constexpr size_t kStagingBytes = size_t{512} << 10;
    static constexpr size_t kNumStaging = 8;

    // `reader` fills frames from `source`; null when the source is in memory. Throws DeviceError
    // when the device refuses, std::invalid_argument when host_bytes holds too few frames.
    CudaCopyEngine(std::shared_ptr<const CudaContext> context,
                   std::shared_ptr<const PageSource> source, std::unique_ptr<CopyEngine> reader,
                   const CudaCopyOptions& options);
    ~CudaCopyEngine() override;

    void submit(std::shared_ptr<CopyJob> job) override;
    bool enqueue(const std::shared_ptr<CopyJob>& job) override;
    void promote(const std::shared_ptr<CopyJob>& job) override;
    Cancelled cancel(const std::shared_ptr<CopyJob>& job) override;
    void set_chaos(const Chaos& chaos) override;
    void stop() override;
    FencePtr record(StreamHandle stream) override;
    void wait(StreamHandle stream, const FencePtr& fence) override;
    std::map<std::string, uint64_t> stats() const override;
    std::string limit() const override { return pins_.limit(); }
    std::string name() const override { return "cuda"; }

    // Bytes from one frame of the host tier to the next.
    static size_t frame_stride(size_t page_bytes);

  private:
    // A contiguous part of a page in host memory.
    struct Run {
        const std::byte* from;
        size_t page_offset, nbytes;
    };
    // A job on its way through here.
    struct Transfer {
        enum class State { kReading, kQueued, kIssued };
        std::shared_ptr<CopyJob> job;
        std::shared_ptr<HostWant> want;  // null for sources in memory
        std::vector<Run> runs;
        size_t next_run = 0, next_offset = 0;
        State state = State::kReading;
        const void* stream = nullptr;  // where its last chunk went; null before the first
        bool demand = false, stopped = false;
        int64_t landed_ns = 0;
        bool finished_issuing() const { return next_run == runs.size(); }
    };
    using TransferPtr = std::shared_ptr<Transfer>;
    struct Landing {
        FencePtr fence;
        TransferPtr transfer;
        bool report;
    };
    struct Stream {
        cuda::Stream handle = nullptr;
        std::deque<Landing> landing;  // in the order of the stream
    };
    struct Staging {
        std::byte* data = nullptr;
        FencePtr busy;
    };
    using Lock = std::unique_lock<std::mutex>;

    bool start(const std::shared_ptr<CopyJob>& job);
    void on_host_page(const TransferPtr& transfer, const CopyResult& read);
    bool on_host(const TransferPtr& transfer);
    void find_runs(Transfer& transfer) const;
    bool all_pinned(const Transfer& transfer) const;
    void begin(Transfer& transfer, Stream& stream);
    size_t issue_next(Transfer& transfer, Stream& stream, size_t max_bytes);
    void issue_rest(const TransferPtr& transfer);
    void finish_issue(const TransferPtr& transfer, Stream& stream, bool report);
    void fail(const TransferPtr& transfer, std::exception_ptr error);
    void give_back(const TransferPtr& transfer);

    void work();
    void poll();
    void advance(Lock& lock);
    void report(Lock& lock);
    void pin_everything();

    const std::shared_ptr<const CudaContext> context_;
    const std::shared_ptr<const PageSource> source_;
    const CudaCopyOptions options_;
    const std::shared_ptr<CudaEvents> events_;
    HostMemory arena_, staging_memory_;
    PinnedRanges pins_, staging_pins_;
    std::unique_ptr<HostTier> tier_;  // null for sources in memory

    mutable std::mutex mutex_;
    std::condition_variable changed_;  // work for the worker, or stop()
    Stream demand_, prefetch_;
    std::unordered_map<const CopyJob*, TransferPtr> transfers_;
    std::deque<TransferPtr> demands_;                    // that the worker has to stage
    std::deque<TransferPtr> prefetches_;                 // with chunks left to issue
    std::deque<std::pair<FencePtr, size_t>> in_flight_;  // chunks of prefetches and their bytes
    size_t in_flight_bytes_ = 0;
    Staging staging_[kNumStaging];
    size_t next_staging_ = 0;
    std::deque<TransferPtr> done_;                   // to report by on_done
    std::deque<TransferPtr> landed_;                 // to report by on_landed
    std::deque<std::shared_ptr<HostWant>> unlocks_;  // frames to give back
    std::deque<FencePtr> recorded_;                  // for readers of slots; stop() waits for them
    uint64_t copied_bytes_ = 0, staged_bytes_ = 0, num_copies_ = 0;
    std::exception_ptr broken_;  // the device failed: everything from then on fails alike
    Chaos chaos_;
    std::mt19937_64 random_;
    std::atomic<bool> stopping_ = false;
    std::atomic<bool> pinning_ = true;  // until pin_everything is through

    std::thread pinner_, worker_;
};

}  // namespace moe_offload
