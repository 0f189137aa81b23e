// Everything a pager was asked, in order: what a replay needs to repeat a live run exactly, and the
// form every trace is turned into. Flat arrays, so that a run of millions of events moves between
// Python and C++ as a few buffers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace moe_offload {

enum class EventKind : uint8_t {
    kRequest = 0,   // a layer's working set; values: router weight per expert, or none
    kPrefetch = 1,  // copies likely to be needed
    kPredict = 2,   // values: probability per expert; count: visits ahead
    kSequence = 3,  // what follows belongs to new prompts
    kFill = 4,      // into free slots
    kExpect = 5,    // residents that no prefetch may evict before the layer's next request
    kRoutes = 6,    // of the layer's next request: experts of each of `count` tokens, [tokens, A]
};

struct EventLog {
    std::vector<uint8_t> kinds;              // [events]
    std::vector<int32_t> layers;             // [events]
    std::vector<int32_t> counts;             // [events] tokens of a request, visits ahead
    std::vector<int64_t> expert_offsets{0};  // [events + 1]
    std::vector<int32_t> experts;            // of all events, one after the other
    std::vector<int64_t> value_offsets{0};   // [events + 1]
    std::vector<float> values;

    void add(EventKind kind, int32_t layer, std::span<const int32_t> ids,
             std::span<const float> event_values, int32_t count) {
        kinds.push_back(static_cast<uint8_t>(kind));
        layers.push_back(layer);
        counts.push_back(count);
        experts.insert(experts.end(), ids.begin(), ids.end());
        values.insert(values.end(), event_values.begin(), event_values.end());
        expert_offsets.push_back(static_cast<int64_t>(experts.size()));
        value_offsets.push_back(static_cast<int64_t>(values.size()));
    }
};

}  // namespace moe_offload
