// Eviction policies against plain re-implementations that are too slow to be wrong.
#include <cmath>
#include <map>
#include <random>

#include "check.h"
#include "paging/policies/lfu.h"
#include "paging/policies/lru.h"
#include "paging/policies/static.h"

using namespace moe_offload;

namespace {

const EvictionPolicy::MayEvict kAny = [](PageIndex) { return true; };

void lru_evicts_the_page_used_longest_ago() {
    Lru lru(4);
    for (const PageIndex page : {2u, 0u, 3u}) lru.insert(page);
    lru.touch(2);
    CHECK_EQ(lru.victim(kAny), 0u);
    CHECK_EQ(lru.victim([](PageIndex page) { return page != 0; }), 3u);
    lru.erase(0);
    CHECK_EQ(lru.victim(kAny), 3u);
    CHECK_EQ(lru.victim([](PageIndex) { return false; }), kNoPage);
}

void empty_policies_have_no_victim() {
    CHECK_EQ(Lru(3).victim(kAny), kNoPage);
    CHECK_EQ(Lfu(3, 10).victim(kAny), kNoPage);
    CHECK_EQ(Static(3, {1}).victim(kAny), kNoPage);
}

void static_never_offers_a_kept_page() {
    Static fixed(4, {0, 2});
    for (const PageIndex page : {0u, 1u, 2u, 3u}) fixed.insert(page);
    CHECK_EQ(fixed.victim(kAny), 1u);
    fixed.touch(1);
    CHECK_EQ(fixed.victim(kAny), 3u);
    CHECK_EQ(fixed.victim([](PageIndex page) { return page == 0; }), kNoPage);
}

// The definition: score = sum over uses of 2^(-age / half life).
void lfu_agrees_with_its_definition() {
    constexpr size_t kPages = 12;
    constexpr double kHalfLife = 7.0;
    Lfu lfu(kPages, kHalfLife);
    std::vector<std::vector<int>> uses(kPages);
    std::vector<bool> resident(kPages, false);
    std::mt19937 random(1);
    int now = 0;
    for (int step = 0; step < 20000; ++step) {
        const auto page = static_cast<PageIndex>(std::min(random() % 16, random() % 12));
        if (resident[page] && random() % 4 == 0) {
            lfu.erase(page);
            resident[page] = false;
            continue;
        }
        resident[page] ? lfu.touch(page) : lfu.insert(page);
        resident[page] = true;
        uses[page].push_back(++now);
        if (uses[page].size() > 200) uses[page].erase(uses[page].begin());
        if (step % 10 != 0) continue;
        std::map<PageIndex, double> scores;
        double lowest = 1e300;
        for (PageIndex p = 0; p < kPages; ++p) {
            if (!resident[p]) continue;
            for (const int at : uses[p]) scores[p] += std::exp2(-(now - at) / kHalfLife);
            lowest = std::min(lowest, scores[p]);
        }
        // 200 uses back the weight is below 2^-28, so cutting the history costs less than 1e-8.
        const PageIndex victim = lfu.victim(kAny);
        CHECK(resident[victim]);
        CHECK(scores[victim] <= lowest * (1 + 1e-6) + 1e-8);
    }
}

void lfu_survives_the_rescaling_of_its_scores() {
    Lfu lfu(2, 0.05);  // weight grows by 2^20 per use: overflows a double within 52 uses
    lfu.insert(0);
    lfu.insert(1);
    for (int i = 0; i < 1000; ++i) {
        lfu.touch(1);
        CHECK_EQ(lfu.victim(kAny), 0u);
        lfu.touch(0);
        CHECK_EQ(lfu.victim(kAny), 1u);
    }
}

void unknown_policy_is_refused() {
    CHECK_THROWS(std::invalid_argument, "lru, lfu, static, got mru", make_policy("mru", 4, {}));
}

}  // namespace

int main() {
    RUN(lru_evicts_the_page_used_longest_ago);
    RUN(empty_policies_have_no_victim);
    RUN(static_never_offers_a_kept_page);
    RUN(lfu_agrees_with_its_definition);
    RUN(lfu_survives_the_rescaling_of_its_scores);
    RUN(unknown_policy_is_refused);
}
