// Eviction policies against plain re-implementations that are too slow to be wrong.
#include <cmath>
#include <map>
#include <random>

#include "check.h"
#include "paging/policies/belady.h"
#include "paging/policies/forecast.h"
#include "paging/policies/lfu.h"
#include "paging/policies/lru.h"
#include "paging/policies/per_layer.h"
#include "paging/policies/published.h"
#include "paging/policies/static.h"

using namespace moe_offload;

namespace {

const EvictionPolicy::MayEvict kAny = [](PageIndex) { return true; };

void lru_evicts_the_page_used_longest_ago() {
    Lru lru(4);
    for (const PageIndex page : {2u, 0u, 3u}) lru.insert(page);
    lru.touch(2);
    CHECK_EQ(lru.victim(kNoPage, kAny), 0u);
    CHECK_EQ(lru.victim(kNoPage, [](PageIndex page) { return page != 0; }), 3u);
    lru.erase(0);
    CHECK_EQ(lru.victim(kNoPage, kAny), 3u);
    CHECK_EQ(lru.victim(kNoPage, [](PageIndex) { return false; }), kNoPage);
}

void empty_policies_have_no_victim() {
    CHECK_EQ(Lru(3).victim(kNoPage, kAny), kNoPage);
    CHECK_EQ(Lfu(3, 10).victim(kNoPage, kAny), kNoPage);
    CHECK_EQ(Static(3, {1}).victim(kNoPage, kAny), kNoPage);
}

void static_never_offers_a_kept_page() {
    Static fixed(4, {0, 2});
    for (const PageIndex page : {0u, 1u, 2u, 3u}) fixed.insert(page);
    CHECK_EQ(fixed.victim(kNoPage, kAny), 1u);
    fixed.touch(1);
    CHECK_EQ(fixed.victim(kNoPage, kAny), 3u);
    CHECK_EQ(fixed.victim(kNoPage, [](PageIndex page) { return page == 0; }), kNoPage);
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
        const PageIndex victim = lfu.victim(kNoPage, kAny);
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
        CHECK_EQ(lfu.victim(kNoPage, kAny), 0u);
        lfu.touch(0);
        CHECK_EQ(lfu.victim(kNoPage, kAny), 1u);
    }
}

PolicySetting layers_of(int32_t layers, int32_t experts, size_t slots = 4) {
    PolicySetting setting;
    setting.num_experts.assign(size_t(layers), experts);
    setting.num_slots = slots;
    return setting;
}

// One call of a layer, all pages resident or becoming so.
void visit(EvictionPolicy& policy, int32_t layer, std::vector<PageIndex> pages,
           std::vector<float> weights = {}, int32_t tokens = 1) {
    policy.request({layer, pages, weights, tokens, 0});
}

void per_layer_quotas_share_all_slots_and_no_layer_is_left_without() {
    struct Case {
        std::vector<int32_t> experts;
        size_t slots;
        std::vector<size_t> quotas;
    };
    for (const Case& c :
         {Case{{8, 8, 8}, 6, {2, 2, 2}}, Case{{8, 8, 8}, 8, {3, 3, 2}},
          Case{{2, 8, 8}, 12, {2, 5, 5}}, Case{{8, 8, 8}, 2, {1, 1, 1}}, Case{{4, 4}, 9, {4, 4}}}) {
        PolicySetting setting;
        setting.num_experts = c.experts;
        setting.num_slots = c.slots;
        const auto policy = make_policy("lru-per-layer", setting);
        const auto stride = PageIndex(setting.experts_per_layer());
        for (size_t layer = 0; layer < c.experts.size(); ++layer) {
            size_t taken = 0;
            for (PageIndex page = PageIndex(layer) * stride;
                 taken < size_t(c.experts[layer]) && policy->may_take_free_slot(page); ++page)
                policy->insert(page), ++taken;
            CHECK_EQ(taken, c.quotas[layer]);
        }
    }
}

void per_layer_evicts_within_the_layer() {
    const auto policy = make_policy("lru-per-layer", layers_of(2, 4, 4));
    for (const PageIndex page : {4u, 0u, 5u, 1u}) policy->insert(page);
    CHECK_EQ(policy->victim(6, kAny), 4u);
    CHECK_EQ(policy->victim(2, kAny), 0u);
    policy->touch(0);
    CHECK_EQ(policy->victim(2, kAny), 1u);
    CHECK_EQ(policy->victim(2, [](PageIndex page) { return page >= 4; }), kNoPage);
}

void least_stale_lets_finished_layers_go_first() {
    LeastStale policy(layers_of(3, 4));
    for (const PageIndex page : {8u, 0u, 4u, 1u}) policy.insert(page);
    visit(policy, 1, {5});
    CHECK_EQ(policy.victim(5, kAny), 0u);  // layers 0 and 1 are done; page 8 is oldest but ahead
    CHECK_EQ(policy.victim(5, [](PageIndex page) { return page >= 8; }), 8u);
    visit(policy, 2, {9});
    CHECK_EQ(policy.victim(9, kAny), 8u);
}

void layer_ring_lets_go_of_what_was_computed_longest_ago() {
    LayerRing policy(layers_of(3, 4));
    for (const PageIndex page : {8u, 0u, 4u}) policy.insert(page);  // layers 2, 0, 1
    visit(policy, 1, {});
    CHECK_EQ(policy.victim(5, kAny), 4u);  // the present layer's turn is farthest
    CHECK_EQ(policy.victim(5, [](PageIndex page) { return page != 4; }), 0u);
    visit(policy, 2, {});
    CHECK_EQ(policy.victim(9, [](PageIndex page) { return page != 8; }), 4u);
}

void activation_ratio_is_moe_infinitys_formula() {
    ActivationRatio policy(layers_of(2, 4));
    for (const PageIndex page : {0u, 1u, 4u}) policy.insert(page);
    visit(policy, 0, {0, 1});
    visit(policy, 1, {4});
    visit(policy, 0, {0});
    // layer 0: 2/3 and 1/3 of activations, times 1; layer 1: 1/1 times 1/2.
    CHECK(std::abs(policy.worth(0) - (2.0 / 3 + 1e-4)) < 1e-12);
    CHECK(std::abs(policy.worth(4) - (1.0 + 1e-4) / 2) < 1e-12);
    CHECK_EQ(policy.victim(2, kAny), 1u);
    policy.sequence_begins();
    CHECK_EQ(policy.victim(2, kAny), 4u);  // nothing counted yet: deep layers first
}

void score_is_an_exponential_average_of_router_weights() {
    Score policy(layers_of(1, 4));
    CHECK(policy.uses_weights());
    std::vector<double> expected(4, 0.0);
    std::mt19937 random(3);
    for (int step = 0; step < 3000; ++step) {
        const auto a = PageIndex(random() % 4), b = PageIndex((a + 1 + random() % 3) % 4);
        const float weight = float(random() % 100) / 100.0F;
        visit(policy, 0, {a, b}, {weight * 2, (1 - weight) * 2}, 2);  // sums over two tokens
        for (PageIndex page = 0; page < 4; ++page) {
            const double score = page == a ? double(weight) : page == b ? 1 - double(weight) : 0.0;
            expected[page] = 0.05 * score + 0.95 * expected[page];
            CHECK(std::abs(policy.worth(page) - expected[page]) < 1e-6);
        }
    }
}

// The definition, summed visit by visit until the discount is nothing.
double expected_discount(int distance, int layers, std::vector<double> named, double rate) {
    double value = 0.0, absent = 1.0;
    for (int visit = 0; visit < 200; ++visit) {
        const double used = visit < int(named.size()) ? named[size_t(visit)] : rate;
        value += absent * used * std::pow(0.7, double(distance) / layers + visit);
        absent *= 1 - used;
    }
    return value;
}

void forecast_is_the_expected_discount_of_the_next_use() {
    Forecast policy(layers_of(4, 2), 8, false);
    visit(policy, 0, {0});  // rate of page 0: the gain of one use
    const double gain = 1 - std::exp2(-1.0 / 32);
    CHECK(std::abs(policy.worth(0) - expected_discount(4, 4, {}, gain)) < 1e-6);
    const std::vector<PageIndex> pages{4};
    for (const auto& [probability, ahead] : {std::pair(0.75F, 0), std::pair(0.5F, 1)}) {
        const std::vector<float> probabilities{probability};
        policy.predict({2, pages, probabilities, ahead});
    }
    CHECK(std::abs(policy.worth(4) - expected_discount(2, 4, {0.75, 0.5}, 1e-4)) < 1e-6);
    visit(policy, 2, {5});  // the prediction for that visit is spent, the next one counts now
    CHECK(std::abs(policy.worth(4) - expected_discount(4, 4, {0.5}, 1e-4)) < 1e-6);
    CHECK(std::abs(policy.worth(5) - expected_discount(4, 4, {gain}, gain)) < 1e-6);
}

void predictive_takes_a_prediction_at_its_word() {
    Forecast policy(layers_of(2, 4), 1, true);
    for (const PageIndex page : {4u, 5u}) policy.insert(page);
    for (int step = 0; step < 50; ++step) visit(policy, 0, {0}), visit(policy, 1, {4});
    CHECK_EQ(policy.victim(0, kAny), 5u);
    const std::vector<PageIndex> pages{5};
    const std::vector<float> probabilities{0.9F};
    visit(policy, 0, {0});
    policy.predict({1, pages, probabilities, 0});
    CHECK_EQ(policy.victim(0, kAny), 4u);  // popular, but not in this pass
    visit(policy, 1, {6});                 // a misprediction: 5 is worth least at once
    CHECK_EQ(policy.victim(0, kAny), 5u);
}

void belady_evicts_what_is_used_last_and_bypass_keeps_what_is_used_first() {
    PolicySetting setting = layers_of(1, 8);
    setting.next_request = {5, 3, 9, 7};
    for (const bool bypass : {false, true}) {
        Belady policy(setting, bypass);
        visit(policy, 0, {0, 1, 2});
        for (const PageIndex page : {0u, 1u, 2u}) policy.insert(page);
        CHECK_EQ(policy.victim(3, kAny), 2u);
        visit(policy, 0, {3});
        CHECK_EQ(policy.admits(3, 2), true);
        CHECK_EQ(policy.admits(3, 0), !bypass);
        CHECK_EQ(policy.evicts_hits(), bypass);
    }
}

void every_name_makes_a_policy() {
    for (const std::string& name : policy_names(false)) CHECK(make_policy(name, layers_of(2, 4)));
    CHECK_EQ(policy_names(false).size(), policy_names(true).size() + 2);
}

void unknown_policy_is_refused() {
    CHECK_THROWS(std::invalid_argument, "belady-bypass, got mru", make_policy("mru", {}));
}

}  // namespace

int main() {
    RUN(lru_evicts_the_page_used_longest_ago);
    RUN(empty_policies_have_no_victim);
    RUN(static_never_offers_a_kept_page);
    RUN(lfu_agrees_with_its_definition);
    RUN(lfu_survives_the_rescaling_of_its_scores);
    RUN(per_layer_quotas_share_all_slots_and_no_layer_is_left_without);
    RUN(per_layer_evicts_within_the_layer);
    RUN(least_stale_lets_finished_layers_go_first);
    RUN(layer_ring_lets_go_of_what_was_computed_longest_ago);
    RUN(activation_ratio_is_moe_infinitys_formula);
    RUN(score_is_an_exponential_average_of_router_weights);
    RUN(forecast_is_the_expected_discount_of_the_next_use);
    RUN(predictive_takes_a_prediction_at_its_word);
    RUN(belady_evicts_what_is_used_last_and_bypass_keeps_what_is_used_first);
    RUN(every_name_makes_a_policy);
    RUN(unknown_policy_is_refused);
}
