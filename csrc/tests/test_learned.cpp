// The path memory and the forecast against slow definitions; `learned` and `auto` as caches.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <map>
#include <random>
#include <set>

#include "check.h"
#include "paging/policies/leader.h"
#include "paging/policies/learned.h"
#include "paging/policies/path_memory.h"
#include "paging/policies/path_predictor.h"
#include "paging/slot_table.h"

using namespace moe_offload;

namespace {

using Pass = std::vector<std::vector<PageIndex>>;  // [layers] experts, numbered from 0

PolicySetting setting_of(int32_t layers, int32_t experts, size_t slots) {
    PolicySetting setting;
    setting.num_experts.assign(size_t(layers), experts);
    setting.num_slots = slots;
    return setting;
}

std::vector<PageIndex> draw(std::mt19937& random, PageIndex experts, size_t count) {
    std::set<PageIndex> drawn;
    while (drawn.size() < count) drawn.insert(PageIndex(random() % experts));
    return {drawn.begin(), drawn.end()};
}

size_t shared(const std::vector<PageIndex>& a, const std::vector<PageIndex>& b) {
    return size_t(std::count_if(a.begin(), a.end(), [&](PageIndex page) {
        return std::find(b.begin(), b.end(), page) != b.end();
    }));
}

// Similarity by its definition, recomputed from all passes, with more rows than the ring holds.
// rows_at(t): rows of pass t.
void check_path_memory(const std::function<size_t(size_t)>& rows_at) {
    constexpr size_t kLayers = 3, kExperts = 70, kCapacity = 16;  // two words per layer
    struct Row {
        size_t pass, row;
        PathMemory::Entry entry;
        Pass layers;
        std::map<size_t, uint32_t> similarity;  // to stored rows, by their place in `stored`
    };
    PathMemory memory(kLayers, kExperts, kCapacity);
    std::mt19937 random(1);
    std::vector<Row> stored;  // all, the oldest first
    for (size_t t = 0; t < 60; ++t) {
        const size_t rows = rows_at(t), now = stored.size();
        memory.begin_pass(rows);
        CHECK_EQ(memory.num_rows(), rows);
        for (size_t r = 0; r < rows; ++r)
            stored.push_back({t, r, PathMemory::Entry((now + r) % kCapacity), Pass(kLayers), {}});
        const auto before_of = [&](size_t i) {  // the same sequence one pass earlier
            for (size_t j = 0; j < i; ++j)
                if (stored[j].pass + 1 == stored[i].pass && stored[j].row == stored[i].row)
                    return j;
            return i;
        };
        const size_t oldest = stored.size() - std::min(stored.size(), kCapacity);
        for (size_t i = now; i < stored.size(); ++i) {
            const size_t mine = before_of(i);
            for (size_t s = oldest; s < now; ++s) {
                const size_t its = before_of(s);
                auto& similarity = stored[i].similarity[s] = 0;
                if (mine != i && its != s && stored[mine].similarity.count(its))
                    similarity = stored[mine].similarity[its] * PathMemory::kFade / 256;
            }
        }
        for (size_t layer = 0; layer < kLayers; ++layer) {
            if (t % 7 == 3 && layer == 1) continue;  // a pass may leave a layer out
            std::vector<PageIndex> all;
            std::vector<int32_t> routes;
            for (size_t i = now; i < stored.size(); ++i) {
                stored[i].layers[layer] = all = draw(random, kExperts, 20);
                routes.insert(routes.end(), all.begin(), all.end());
            }
            memory.observe(layer, all, routes);
            for (size_t i = now; i < stored.size(); ++i) {
                std::vector<uint32_t> expected;
                for (auto& [s, similarity] : stored[i].similarity) {
                    similarity += PathMemory::kUnit * uint32_t(shared(stored[i].layers[layer],
                                                                      stored[s].layers[layer]));
                    if (similarity > 0) expected.push_back(similarity);
                }
                std::sort(expected.rbegin(), expected.rend());
                const auto nearest = memory.nearest(i - now, 5);
                CHECK_EQ(nearest.size(), std::min<size_t>(5, expected.size()));
                for (size_t k = 0; k < nearest.size(); ++k) {
                    CHECK_EQ(nearest[k].similarity, expected[k]);
                    const auto found =
                        std::find_if(stored.begin() + long(oldest), stored.begin() + long(now),
                                     [&](const Row& row) { return row.entry == nearest[k].entry; });
                    CHECK(found != stored.begin() + long(now));
                    CHECK_EQ(nearest[k].similarity,
                             stored[i].similarity[size_t(found - stored.begin())]);
                }
            }
        }
        for (size_t i = oldest; i < stored.size(); ++i) {
            auto next = memory.none();
            for (const Row& row : stored)
                if (row.pass == stored[i].pass + 1 && row.row == stored[i].row) next = row.entry;
            CHECK_EQ(memory.next(stored[i].entry), next);
            for (size_t layer = 0; layer < kLayers; ++layer) {
                size_t bits = 0;
                for (size_t word = 0; word < memory.words(); ++word)
                    bits += size_t(std::popcount(memory.experts(stored[i].entry, layer, word)));
                CHECK_EQ(bits, stored[i].layers[layer].size());
                for (const PageIndex expert : stored[i].layers[layer])
                    CHECK((memory.experts(stored[i].entry, layer, expert / 64) >> (expert % 64)) &
                          1);
            }
        }
    }
}

void path_memory_agrees_with_its_definition() {
    check_path_memory([](size_t) { return 1; });
}

void path_memory_follows_each_sequence_of_a_batch() {
    check_path_memory([](size_t) { return 3; });
    check_path_memory([](size_t t) { return t % 5 == 0 ? 1 : 2 + t % 4; });  // they come and go
}

// A request served as the pager does; returns its misses.
size_t serve(SlotTable& table, int32_t layer, const std::vector<PageIndex>& pages, size_t limit,
             int32_t num_tokens = 1, std::span<const int32_t> routes = {}) {
    LayerRequest request{layer, pages, {}, num_tokens, 0, routes};
    table.begin_request(request);
    std::vector<int32_t> misses;
    std::vector<SlotIndex> pinned;
    for (size_t i = 0; i < pages.size(); ++i) {
        const SlotIndex slot = table.slot_of(pages[i]);
        if (slot == kNoSlot) {
            misses.push_back(int32_t(i));
            continue;
        }
        table.pin(slot);
        table.touch(pages[i]);
        pinned.push_back(slot);
    }
    if (!misses.empty())
        for (const auto& admitted : table.admit(request, misses, {}, limit, {}))
            pinned.push_back(admitted.slot);
    for (const SlotIndex slot : pinned) table.unpin(slot);
    return misses.size();
}

struct Trace {
    int32_t layers, experts;
    std::vector<Pass> passes;
};

// Misses of each pass.
std::vector<size_t> replay(const Trace& trace, const std::string& policy, size_t slots) {
    const PolicySetting setting = setting_of(trace.layers, trace.experts, slots);
    SlotTable table(setting.num_pages(), slots, make_policy(policy, setting));
    std::vector<size_t> misses;
    for (const Pass& pass : trace.passes) {
        misses.push_back(0);
        for (int32_t layer = 0; layer < trace.layers; ++layer) {
            std::vector<PageIndex> pages = pass[size_t(layer)];
            for (PageIndex& page : pages) page += PageIndex(layer * trace.experts);
            misses.back() +=
                serve(table, layer, pages, default_admit_limit(slots, size_t(trace.layers)));
        }
    }
    return misses;
}

size_t total(const std::vector<size_t>& misses, size_t from = 0) {
    size_t sum = 0;
    for (size_t i = from; i < misses.size(); ++i) sum += misses[i];
    return sum;
}

// "Words" with fixed routing come in random "sentences" that repeat.
Trace text(uint32_t seed, size_t num_passes, size_t per_layer = 2) {
    std::mt19937 random(seed);
    Trace trace{4, 16, {}};
    std::vector<Pass> words(24);
    for (Pass& word : words)
        for (int32_t layer = 0; layer < trace.layers; ++layer)
            word.push_back(draw(random, PageIndex(trace.experts), per_layer));
    std::vector<std::vector<size_t>> sentences(6);
    for (auto& sentence : sentences)
        for (int i = 0; i < 12; ++i) sentence.push_back(random() % words.size());
    while (trace.passes.size() < num_passes)
        for (const size_t word : sentences[random() % sentences.size()])
            trace.passes.push_back(words[word]);
    trace.passes.resize(num_passes);
    return trace;
}

Trace noise(uint32_t seed, size_t num_passes, size_t per_layer) {
    std::mt19937 random(seed);
    Trace trace{4, 16, std::vector<Pass>(num_passes)};
    for (Pass& pass : trace.passes)
        for (int32_t layer = 0; layer < trace.layers; ++layer)
            pass.push_back(draw(random, PageIndex(trace.experts), per_layer));
    return trace;
}

void learned_recognises_repeated_text() {
    const Trace trace = text(5, 600);
    const size_t lru = std::min(total(replay(trace, "lru", 16), 300),
                                total(replay(trace, "lru-per-layer", 16), 300));
    const size_t learned = total(replay(trace, "learned", 16), 300);
    // Six sentences of twelve words: the next words are known, all but at a sentence's end.
    CHECK(learned * 10 < lru * 8);
    CHECK(total(replay(trace, "auto", 16), 300) * 10 < lru * 8);
}

// Four texts side by side, whose passes together hardly ever come again: told apart, each is
// recognised.
void learned_recognises_each_text_of_a_batch() {
    constexpr size_t kRows = 4, kPasses = 500;
    const Trace trace = text(5, kRows * kPasses);
    const PolicySetting setting = setting_of(trace.layers, trace.experts, 16);
    for (const char* name : {"learned", "auto"}) {
        std::array<size_t, 2> misses{};
        for (const bool told : {false, true}) {
            SlotTable table(setting.num_pages(), 16, make_policy(name, setting));
            CHECK(table.policy().uses_routes());
            for (size_t t = 0; t < kPasses; ++t)
                for (int32_t layer = 0; layer < trace.layers; ++layer) {
                    std::set<PageIndex> pages;
                    std::vector<int32_t> routes;
                    for (size_t row = 0; row < kRows; ++row)
                        for (const PageIndex e : trace.passes[row * kPasses + t][size_t(layer)]) {
                            routes.push_back(int32_t(e));
                            pages.insert(PageIndex(layer * trace.experts) + e);
                        }
                    if (!told) routes.clear();
                    const size_t missed =
                        serve(table, layer, {pages.begin(), pages.end()}, 4, kRows, routes);
                    if (t >= 200) misses[told] += missed;
                }
        }
        CHECK(misses[1] * 10 < misses[0] * 9);
    }
}

// Large batches: every layer uses most of its experts, some more often than others. Arriving pages
// must not push out what the next layers are about to need.
void learned_does_not_thrash_when_layers_use_most_of_their_experts() {
    std::mt19937 random(3);
    Trace trace{4, 16, std::vector<Pass>(300)};
    for (Pass& pass : trace.passes)
        for (int32_t layer = 0; layer < trace.layers; ++layer) {
            pass.emplace_back();
            for (PageIndex expert = 0; expert < 16; ++expert)
                if (random() % 16 < (expert < 4 ? 15u : 10u)) pass.back().push_back(expert);
        }
    // Per cent of the better LRU's misses. Without the distance to a page's layer 92.5 and 101.
    for (const auto& [slots, percent] : {std::pair{16u, 93u}, std::pair{32u, 98u}}) {
        const size_t best = std::min(total(replay(trace, "lru", slots)),
                                     total(replay(trace, "lru-per-layer", slots)));
        CHECK(total(replay(trace, "learned", slots)) * 100 < best * percent);
    }
}

// Also when nothing can be learned, when requests stream, and at the first passes.
void auto_is_not_worse_than_lru() {
    for (const size_t slots : {8u, 16u, 48u})
        for (const Trace& trace : {noise(7, 150, 1), noise(7, 150, 8), noise(7, 150, 15),
                                   text(9, 150, 2), text(9, 150, 8)}) {
            const size_t lru = total(replay(trace, "lru", slots));
            const size_t layered = total(replay(trace, "lru-per-layer", slots));
            const double best = double(std::min(lru, layered));
            // Three standard deviations of a count, which is what choosing by counts can cost.
            CHECK(double(total(replay(trace, "auto", slots))) <= best + 3.0 * std::sqrt(best));
        }
}

void the_same_requests_bring_the_same_decisions() {
    const Trace trace = text(11, 200);
    for (const char* policy : {"learned", "auto"})
        CHECK(replay(trace, policy, 20) == replay(trace, policy, 20));
}

void a_prompt_that_uses_every_expert_teaches_nothing() {
    const PolicySetting setting = setting_of(1, 8, 4);
    Learned policy(setting);
    std::vector<PageIndex> all(8);
    for (PageIndex page = 0; page < 8; ++page) all[page] = page;
    const std::vector<PageIndex> one{3};
    for (uint64_t step = 1; step < 40; ++step) policy.request({0, one, {}, 1, step});
    std::vector<double> before;
    for (const PageIndex page : all) before.push_back(policy.worth(page));
    CHECK(before[3] > 0.9 * 0.8);  // sure to be used, one pass from now
    CHECK_EQ(std::max_element(before.begin(), before.end()) - before.begin(), 3);
    policy.request({0, all, {}, 100, 40});
    for (const PageIndex page : all) CHECK_EQ(policy.worth(page), before[page]);
}

void auto_begins_with_learned_and_keeps_to_it_where_text_repeats() {
    const Trace trace = text(13, 400);
    const PolicySetting setting = setting_of(trace.layers, trace.experts, 16);
    Leader leader(setting);
    CHECK_EQ(leader.leading(), std::string("learned"));
    uint64_t step = 0;
    for (const Pass& pass : trace.passes) {
        ++step;
        for (int32_t layer = 0; layer < trace.layers; ++layer) {
            std::vector<PageIndex> pages = pass[size_t(layer)];
            for (PageIndex& page : pages) page += PageIndex(layer * trace.experts);
            leader.request({layer, pages, {}, 1, step});
        }
    }
    CHECK_EQ(leader.leading(), std::string("learned"));
}

// A prefetched page is worth nothing to the forecast, and yet it waits for its layer.
void prefetched_pages_stay_until_their_layer_is_routed() {
    for (const char* name : {"learned", "auto"}) {
        const PolicySetting setting = setting_of(2, 4, 4);
        SlotTable table(setting.num_pages(), 4, make_policy(name, setting));
        for (int pass = 0; pass < 50; ++pass) {
            serve(table, 0, {0, 1}, 2);
            serve(table, 1, {4, 5}, 2);
        }
        serve(table, 0, {0}, 2);
        CHECK(table.place(7, nullptr, false).has_value());
        serve(table, 0, {2, 3}, 2);  // a new pass; both need slots
        CHECK(table.slot_of(7) != kNoSlot);
        serve(table, 1, {4, 6}, 2);  // routed without it: the first to leave
        serve(table, 0, {0, 1}, 2);
        serve(table, 1, {5}, 2);
        CHECK_EQ(table.slot_of(7), kNoSlot);
    }
}

// `learned` and `auto` find their victim by shortcuts; Ranked's scan of all residents is the rule.
void victims_are_those_of_the_full_scan() {
    for (const char* name : {"learned", "auto"})
        for (const size_t slots : {6u, 16u, 40u}) {
            const Trace trace = text(23, 150);
            const PolicySetting setting = setting_of(trace.layers, trace.experts, slots);
            SlotTable table(setting.num_pages(), slots, make_policy(name, setting));
            const auto& policy = dynamic_cast<const Ranked&>(table.policy());
            std::mt19937 random(5);
            for (const Pass& pass : trace.passes)
                for (int32_t layer = 0; layer < trace.layers; ++layer) {
                    std::vector<PageIndex> pages = pass[size_t(layer)];
                    for (PageIndex& page : pages) page += PageIndex(layer * trace.experts);
                    serve(table, layer, pages, 2);
                    const auto ahead = PageIndex(random() % setting.num_pages());
                    if (table.slot_of(ahead) == kNoSlot && random() % 3 == 0)
                        table.place(ahead, nullptr, false);  // as a prefetch
                    for (int turn = 0; turn < 3; ++turn) {
                        const uint32_t kept = random();
                        const auto may_evict = [&](PageIndex page) {
                            return turn == 0 || (page * 2654435761u ^ kept) % 7 < 3;
                        };
                        CHECK_EQ(policy.victim(0, may_evict), policy.Ranked::victim(0, may_evict));
                    }
                }
        }
}

void path_predictor_names_what_followed() {
    PathPredictor predictor({8, 8});
    const Trace trace = text(17, 400);
    PathPredictor words(std::vector<int32_t>(size_t(trace.layers), trace.experts));
    size_t found = 0, named = 0, used = 0;
    for (size_t t = 0; t < trace.passes.size(); ++t)
        for (int32_t layer = 0; layer < trace.layers; ++layer) {
            const auto& experts = trace.passes[t][size_t(layer)];
            const auto chances = words.predict(layer);
            CHECK_EQ(chances.size(), size_t(trace.experts));
            if (t >= 300 && layer > 0)
                for (size_t expert = 0; expert < chances.size(); ++expert) {
                    CHECK(chances[expert] >= 0.0F && chances[expert] <= 1.0F);
                    const bool is_used = std::count(experts.begin(), experts.end(), expert) > 0;
                    used += is_used;
                    named += chances[expert] > 0.5F;
                    found += is_used && chances[expert] > 0.5F;
                }
            const std::vector<int32_t> ids(experts.begin(), experts.end());
            words.observe(layer, ids);
        }
    CHECK(found * 10 > used * 8);
    CHECK(found * 10 > named * 8);
    const std::vector<int32_t> bad{8};
    CHECK_THROWS(std::invalid_argument, "layer 1 has experts [0, 8), got 8",
                 predictor.observe(1, bad));
    CHECK_THROWS(std::invalid_argument, "a layer in [0, 2), got 2", predictor.predict(2));
    CHECK_THROWS(std::invalid_argument, "at least one expert", PathPredictor({}));
}

// Four texts side by side, see learned_recognises_each_text_of_a_batch.
void path_predictor_follows_each_text_of_a_batch() {
    constexpr size_t kRows = 4, kPasses = 500;
    const Trace trace = text(5, kRows * kPasses);
    std::array<size_t, 2> wrong{};  // experts named and not used, or used and not named
    for (const bool told : {false, true}) {
        PathPredictor predictor(std::vector<int32_t>(size_t(trace.layers), trace.experts));
        for (size_t t = 0; t < kPasses; ++t)
            for (int32_t layer = 0; layer < trace.layers; ++layer) {
                std::set<int32_t> used;
                std::vector<int32_t> routes;
                for (size_t row = 0; row < kRows; ++row)
                    for (const PageIndex e : trace.passes[row * kPasses + t][size_t(layer)]) {
                        routes.push_back(int32_t(e));
                        used.insert(int32_t(e));
                    }
                const auto chances = predictor.predict(layer);
                for (int32_t expert = 0; t >= 200 && expert < trace.experts; ++expert) {
                    const float chance = chances[size_t(expert)];
                    CHECK(chance >= 0.0F && chance <= 1.0F);
                    wrong[told] += (chance > 0.5F) != (used.count(expert) > 0);
                }
                if (!told) routes.clear();
                const std::vector<int32_t> ids(used.begin(), used.end());
                predictor.observe(layer, ids, kRows, routes);
            }
    }
    CHECK(wrong[1] * 2 < wrong[0]);
}

}  // namespace

int main() {
    RUN(path_memory_agrees_with_its_definition);
    RUN(path_memory_follows_each_sequence_of_a_batch);
    RUN(learned_recognises_each_text_of_a_batch);
    RUN(learned_recognises_repeated_text);
    RUN(learned_does_not_thrash_when_layers_use_most_of_their_experts);
    RUN(auto_is_not_worse_than_lru);
    RUN(the_same_requests_bring_the_same_decisions);
    RUN(a_prompt_that_uses_every_expert_teaches_nothing);
    RUN(auto_begins_with_learned_and_keeps_to_it_where_text_repeats);
    RUN(prefetched_pages_stay_until_their_layer_is_routed);
    RUN(victims_are_those_of_the_full_scan);
    RUN(path_predictor_names_what_followed);
    RUN(path_predictor_follows_each_text_of_a_batch);
}
