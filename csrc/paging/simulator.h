// Replays the requests of a log against a policy: the live pager's decisions without its copies.
//
// Every copy is taken to end at once, everything else is SlotTable's doing, as in the pager. So for
// a recorded run the counters agree exactly with the live ones, where a live prefetch that was
// still on its way (joined) is a prefetch hit here, and none is ever cancelled.
#pragma once

#include "counters.h"
#include "event_log.h"
#include "slot_table.h"

namespace moe_offload {

// One event after another, as in EventLog; the caller keeps the arrays.
struct EventView {
    std::span<const uint8_t> kinds;
    std::span<const int32_t> layers, counts;
    std::span<const int64_t> expert_offsets;  // [events + 1]
    std::span<const int32_t> experts;
    std::span<const int64_t> value_offsets;  // [events + 1]
    std::span<const float> values;
};

class Simulator {
  public:
    // admit_limit 0: a layer's even share, as Pager. Throws std::invalid_argument.
    Simulator(const std::string& policy, const PolicySetting& setting, size_t admit_limit);

    // Replays all events; called again it continues. `misses` and `prefetches` [events], or empty:
    // how many copies each event caused. Throws std::invalid_argument for ids out of range or
    // repeated.
    void run(const EventView& events, std::span<int32_t> misses, std::span<int32_t> prefetches);

    // Counts as LayerCounters; bytes and times stay 0. A prefetched page that lost its slot unused
    // is in wasted_prefetches.
    const std::vector<LayerCounters>& counters() const { return counters_; }
    const std::vector<uint64_t>& prefetches() const { return prefetches_; }  // [layers] copies
    const std::vector<uint64_t>& wasted_prefetches() const { return wasted_; }
    std::vector<PageIndex> residents() const;

  private:
    int32_t request(int32_t layer, std::span<const float> weights, int32_t num_tokens);
    int32_t prefetch(int32_t layer);
    void count_eviction(PageIndex page);

    const PolicySetting setting_;
    const size_t stride_;
    const size_t admit_limit_;
    SlotTable table_;
    std::vector<LayerCounters> counters_;
    std::vector<uint64_t> prefetches_, wasted_;
    std::vector<uint64_t> expected_at_;  // [pages] 1 + acquires of its layer when last expected
    std::vector<bool> unused_;           // [pages] prefetched, not demanded yet
    std::vector<uint64_t> seen_;         // [pages] 1 + event that named the page
    uint64_t serial_ = 0;
    std::vector<PageIndex> pages_;
    std::vector<int32_t> routes_;  // of the next request
    std::vector<int32_t> misses_, fresh_;
    std::vector<SlotIndex> pinned_;
};

// For Belady: per look-up of the requests in `events`, the number of the request that uses the same
// page next, counted over requests; kNeverAgain when none does.
constexpr int64_t kNeverAgain = int64_t{1} << 60;
std::vector<int64_t> next_requests(const EventView& events, const PolicySetting& setting);

}  // namespace moe_offload
