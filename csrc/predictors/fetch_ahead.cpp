#include "predictors/fetch_ahead.h"

#include <algorithm>
#include <span>

namespace moe_offload {

Ahead fetch_ahead(Pager& pager, int32_t layer, const Ranking& ranking, const Chances& chances,
                  const AheadLimits& limits, std::vector<int32_t>& started) {
    const std::vector<int32_t> likely = ranking.likely(chances, limits.threshold, limits.most);
    const auto unlikely = [&](int32_t expert) {
        return std::find(likely.begin(), likely.end(), expert) == likely.end();
    };
    if (std::any_of(started.begin(), started.end(), unlikely)) {
        pager.cancel_prefetches(layer, likely);
        std::erase_if(started, unlikely);
    }
    Ahead found;
    found.any_likely = !likely.empty();
    if (likely.empty()) return found;
    found.absent = pager.expect(layer, likely);
    const auto chosen = std::span(found.absent).first(std::min(limits.budget, found.absent.size()));
    found.chosen = chosen.size();
    if (!chosen.empty()) found.begun = pager.prefetch(layer, chosen);
    for (const int32_t expert : chosen.first(found.begun))
        if (std::find(started.begin(), started.end(), expert) == started.end())
            started.push_back(expert);
    return found;
}

void tell_policy(Pager& pager, int32_t layer, const Ranking& ranking) {
    std::vector<float> chance;
    chance.reserve(ranking.order().size());
    for (const int32_t expert : ranking.order())
        chance.push_back(ranking.chance()[static_cast<size_t>(expert)]);
    pager.predict(layer, ranking.order(), chance);
}

}  // namespace moe_offload
