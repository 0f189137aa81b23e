// A bounded record of what happened when, for export to the Chrome / Perfetto trace format.
// Holds the newest kCapacity events; older ones are dropped and counted. Guarded by the caller.
#pragma once

#include <cstdint>
#include <deque>

namespace moe_offload {

struct TimelineEvent {
    enum class Kind { kDemandCopy, kPrefetchCopy, kFillCopy, kStall, kTicket };
    Kind kind;
    int32_t layer;
    int32_t expert;  // -1 for stalls and tickets
    int32_t slot;    // -1 for stalls and tickets
    int64_t begin_ns, end_ns;
};

class Timeline {
  public:
    static constexpr size_t kCapacity = 1 << 16;

    void add(const TimelineEvent& event) {
        if (events_.size() == kCapacity) {
            events_.pop_front();
            ++dropped_;
        }
        events_.push_back(event);
    }
    void clear() {
        events_.clear();
        dropped_ = 0;
    }
    const std::deque<TimelineEvent>& events() const { return events_; }
    uint64_t dropped() const { return dropped_; }

  private:
    std::deque<TimelineEvent> events_;
    uint64_t dropped_ = 0;
};

}  // namespace moe_offload
