// From a prediction to copies: what the prefetch driver asks of a pager about one layer, in one
// call. A layer of a small model leaves some microseconds for all of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "paging/pager.h"
#include "predictors/ranking.h"

namespace moe_offload {

// What is worth fetching: of the `most` best experts those with a chance of at least `threshold`,
// and of the absent among them the first `budget`.
struct AheadLimits {
    double threshold = 0.5;
    size_t most = 0, budget = 0;
};

struct Ahead {
    bool any_likely = false;
    std::vector<int32_t> absent;  // of the likely ones, when asked
    size_t chosen = 0;            // of these, how many were to be fetched
    size_t begun = 0;             // and how many found a slot
};

// Fetches what is likely and absent. `started` are the prefetches of this layer that the present
// call of the model began: those no longer likely are cancelled and leave it, new ones join it.
// Throws what Pager::prefetch throws.
Ahead fetch_ahead(Pager& pager, int32_t layer, const Ranking& ranking, const Chances& chances,
                  const AheadLimits& limits, std::vector<int32_t>& started);

// For policies that evict by predicted next use: every expert of the layer with its chance.
void tell_policy(Pager& pager, int32_t layer, const Ranking& ranking);

}  // namespace moe_offload
