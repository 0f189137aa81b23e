// The seam between policy and transport. The pager decides what goes where and when; a copy
// engine moves bytes. Host: worker threads (host_copy_engine.h) or io_uring (uring_copy_engine.h).
// CUDA: copy streams (cuda_copy_engine.h).
//
// Engines of devices report a copy when it is *enqueued*: the result then has a fence, and the slot
// may be read by any stream that was made to wait for it. Landing is reported later.
//
// Threads: submit, enqueue, promote and cancel may be called from any thread, also with the pager's
// lock held. `on_done` runs exactly once per submitted job, on a worker thread, with no engine lock
// held - unless cancel() answered kGone or enqueue() answered true, then never.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "fence.h"
#include "page_source.h"
#include "swap_back.h"

namespace moe_offload {

enum class Priority { kDemand, kPrefetch };

struct CopyResult {
    std::exception_ptr error;      // null on success; the first error of the job's chunks
    bool cancelled = false;        // stopped between chunks; the slot holds garbage
    uint64_t bytes = 0;            // page bytes moved
    uint64_t disk_bytes = 0;       // bytes read from storage, alignment included
    uint64_t swap_back_bytes = 0;  // sent back before the slot was written
    int64_t begin_ns = 0;          // first chunk started (steady clock)
    int64_t end_ns = 0;            // last chunk finished
    FencePtr fence;  // null: the bytes have landed; also behind a copy that was stopped
};

// One page on its way into one slot. Filled in by the pager, then owned by the engine until done.
struct CopyJob {
    int32_t layer = 0;
    int32_t expert = 0;
    std::byte* slot = nullptr;  // where the page begins, written by worker threads until on_done
    Priority priority = Priority::kDemand;
    std::function<void(const CopyResult&)> on_done;
    // Runs once when the fence of a successful result has passed, after on_done, likewise.
    std::function<void(const CopyResult&)> on_landed;
    std::vector<FencePtr> after;  // the slot may not be written before these have passed
    // The page that is sent back before the slot is written, and where to. Null: none. Host engines
    // only; they null `leaving` when it is done.
    const std::byte* leaving = nullptr;
    std::shared_ptr<SwapBack> swap_back;

    // Engine state, guarded by the engine's lock.
    std::vector<Chunk> chunks;
    size_t next_chunk = 0;
    size_t chunks_in_flight = 0;
    bool planned = false;
    bool sending_back = false;  // on a worker, in no queue
    bool stopped = false;       // cancelled or failed: no further chunk starts
    CopyResult result;
};

// Deliberately unkind behaviour for tests and `verify`: results must not depend on timing.
struct Chaos {
    uint64_t seed = 0;
    int64_t max_delay_us = 0;       // each chunk first sleeps a random time up to this
    bool reorder = false;           // queued jobs start in random order
    double fail_probability = 0.0;  // a job fails with PageReadError
    bool enabled() const { return max_delay_us > 0 || reorder || fail_probability > 0; }
};

class CopyEngine {
  public:
    enum class Cancelled { kGone, kWillReport, kTooLate };

    virtual ~CopyEngine() = default;
    virtual std::string name() const = 0;  // for reports: how bytes are moved
    // Queues the job behind others of its priority. Never blocks on a copy.
    virtual void submit(std::shared_ptr<CopyJob> job) = 0;
    // Submits, and where that needs no waiting enqueues at once, which saves the demand path a
    // change of threads. True: job->result is final and on_done will not run.
    virtual bool enqueue(const std::shared_ptr<CopyJob>& job) {
        submit(job);
        return false;
    }
    // A prefetch became a demand: move it ahead of all prefetches. No effect when done.
    virtual void promote(const std::shared_ptr<CopyJob>& job) = 0;
    // kGone: nothing is in flight, on_done will not run, job->result says what had been moved.
    // kWillReport: stops after the chunks in flight, on_done runs with cancelled set.
    // kTooLate: all chunks have started, or the job was demanded.
    virtual Cancelled cancel(const std::shared_ptr<CopyJob>& job) = 0;
    virtual void set_chaos(const Chaos& chaos) = 0;
    // Drops queued jobs without reporting them, waits for chunks in flight, joins all threads.
    virtual void stop() = 0;

    // A fence behind everything enqueued on the stream so far; null where slots are host memory.
    virtual FencePtr record(StreamHandle) { return nullptr; }
    // Later work of the stream runs after the fence. The host does not wait.
    virtual void wait(StreamHandle, const FencePtr&) {}
    // What the engine keeps count of, by name; bytes and numbers.
    virtual std::map<std::string, uint64_t> stats() const { return {}; }
    // What limits the engine, in words for people; empty when nothing does.
    virtual std::string limit() const { return {}; }
};

}  // namespace moe_offload
