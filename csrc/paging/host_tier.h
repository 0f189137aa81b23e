// The tier between disk and slots: pages in host memory, a bounded LRU of frames.
//
// A frame holds one page as a slot would. Pages are read into frames by another copy engine (the
// host's, over the same source), so priorities, chunking, cancelling, chaos and errors of reads are
// those of the CPU path. A frame is locked from the moment its page is wanted until the copy to
// the device has landed; the least recently wanted unlocked frame gives way.
//
// Prefetches may lock at most half of the frames, so that a demand always finds one.
//
// Threads: all calls from any thread. on_ready runs on a reader's thread, with no lock held.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "copy_engine.h"
#include "slot_table.h"

namespace moe_offload {

// One request for a page in host memory; belongs to the caller until ready.
struct HostWant {
    int32_t layer = 0;
    int32_t expert = 0;
    Priority priority = Priority::kDemand;
    SlotIndex frame = kNoSlot;  // locked once ready without error
    // What was read for this request: error, bytes and disk bytes. Not called after a successful
    // cancel, nor when fetch answered true.
    std::function<void(const CopyResult&)> on_ready;
};

class HostTier {
  public:
    struct Counters {
        uint64_t hits = 0, misses = 0, evictions = 0, disk_bytes = 0;
    };

    // frames: [num_frames * frame_bytes], outlives the tier. Needs kMinFrames of them.
    static constexpr size_t kMinFrames = 4;
    HostTier(std::unique_ptr<CopyEngine> reader, std::byte* frames, size_t num_frames,
             size_t frame_bytes, size_t num_layers, size_t experts_per_layer);

    // True: the page is here, want->frame is locked. False: on_ready follows.
    bool fetch(const std::shared_ptr<HostWant>& want);
    // A prefetch became a demand. True: the page is here now, as from fetch.
    bool promote(const std::shared_ptr<HostWant>& want);
    // True: the request is gone. False: it is ready or about to be, on_ready runs or ran.
    bool cancel(const std::shared_ptr<HostWant>& want);
    // The copy out of want->frame has landed.
    void unlock(const std::shared_ptr<HostWant>& want);

    std::byte* address(SlotIndex frame) const {
        return frames_ + static_cast<size_t>(frame) * frame_bytes_;
    }
    Counters counters() const;
    void set_chaos(const Chaos& chaos) { reader_->set_chaos(chaos); }
    void stop() { reader_->stop(); }

  private:
    using Wants = std::vector<std::shared_ptr<HostWant>>;
    struct Frame {
        bool ready = false;
        std::shared_ptr<CopyJob> read;  // while it is being filled
        Wants waiting;                  // for that read
    };

    PageIndex page_of(const HostWant& want) const;
    bool place(const std::shared_ptr<HostWant>& want);
    void start_read(PageIndex page, SlotIndex frame, Priority priority);
    void on_read(PageIndex page, SlotIndex frame, const CopyResult& result);
    void lock_frame(HostWant& want, SlotIndex frame);
    void serve_waiting(Wants& ready);

    std::byte* const frames_;
    const size_t frame_bytes_;
    const size_t experts_per_layer_;
    const size_t max_prefetch_frames_;

    mutable std::mutex mutex_;
    SlotTable table_;
    std::vector<Frame> state_;                                    // [num_frames]
    std::deque<std::shared_ptr<HostWant>> demands_, prefetches_;  // that found no frame
    size_t num_prefetch_locks_ = 0;
    Counters counters_;

    std::unique_ptr<CopyEngine> reader_;  // last: destroyed first
};

}  // namespace moe_offload
