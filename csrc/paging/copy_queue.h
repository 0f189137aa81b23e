// Which chunk is copied next: what the host engines have in common.
//
// Two queues, demand before prefetch. A job is cut into chunks and they are handed out one by one,
// so several reads of one page are in flight at once (that is the disk's queue depth). At most
// `max_prefetch_chunks` of prefetches are in flight, which leaves a demand that many chunks to wait
// for and no more, however deep the queue of demands is allowed to be.
//
// A job that has a page to send back is first handed out for that alone, and its chunks when that
// is done: the page may lie anywhere in the slot, under any of them.
//
// Holds no lock: the engine's mutex guards it and every job in it.
#pragma once

#include <deque>
#include <optional>
#include <random>

#include "copy_engine.h"

namespace moe_offload {

class CopyQueue {
  public:
    // How much longer than chunk_bytes the chunks are that are read straight into their slot. They
    // need no bounce buffers, and few long reads keep a disk busier than many short ones while the
    // cores compute (docs/architecture.md, *Bytes*). Those of prefetches are in a demand's way.
    static constexpr size_t kDemandChunks = 16, kPrefetchChunks = 4;

    // One chunk to copy, or the page to send back (`send_back`, no chunk). With neither there is
    // nothing to copy (an empty page, or `error`): finish it at once.
    struct Step {
        std::shared_ptr<CopyJob> job;
        const Chunk* chunk = nullptr;
        bool send_back = false;
        std::exception_ptr error;
        int64_t delay_us = 0;   // chaos: wait before copying
        bool prefetch = false;  // counts against max_prefetch_chunks until arrived or finished
    };

    CopyQueue(std::shared_ptr<const PageSource> source, size_t chunk_bytes,
              size_t max_prefetch_chunks);

    void push(std::shared_ptr<CopyJob> job);
    void promote(const std::shared_ptr<CopyJob>& job);
    CopyEngine::Cancelled cancel(const std::shared_ptr<CopyJob>& job);
    void clear();
    void set_chaos(const Chaos& chaos);

    // The next chunk; nullopt when nothing may start now.
    std::optional<Step> take();
    bool ready() const;  // take() would give one
    // The step's read has ended, so no demand waits for it; finish follows.
    void arrived(Step& step);
    // Books a step that ended. Returns the job's report when it was the last one: the caller runs
    // it with no lock held. After sending back, chunks of the job may start.
    std::function<void()> finish(const Step& step, std::exception_ptr error, uint64_t disk_bytes);

  private:
    using Jobs = std::deque<std::shared_ptr<CopyJob>>;

    void remove(const std::shared_ptr<CopyJob>& job);

    const std::shared_ptr<const PageSource> source_;
    const size_t chunk_bytes_;
    const size_t max_prefetch_chunks_;
    Jobs demand_, prefetch_;  // jobs with chunks left to start
    size_t prefetch_in_flight_ = 0;
    Chaos chaos_;
    std::mt19937_64 random_;
};

}  // namespace moe_offload
