// The simulator and the live pager take the same decisions; Belady's line is the optimum.
#include <algorithm>
#include <map>
#include <random>
#include <set>

#include "check.h"
#include "fake_source.h"
#include "paging/host_copy_engine.h"
#include "paging/pager.h"
#include "paging/simulator.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 64;

EventView view(const EventLog& log) {
    return {log.kinds,   log.layers,        log.counts, log.expert_offsets,
            log.experts, log.value_offsets, log.values};
}

void forward(Pager& pager, int32_t layer, const std::vector<int32_t>& experts,
             const std::vector<float>& weights, int32_t tokens, bool reads_ahead) {
    const auto ticket = pager.acquire(layer, experts, weights, tokens);
    for (auto ready = ticket->next(); !ready.empty(); ready = ticket->next()) {
        std::vector<int32_t> indices;
        for (const ReadyPage& page : ready) indices.push_back(page.index);
        ticket->release(indices);
        if (reads_ahead) pager.read_ahead(layer + 1);
    }
    if (reads_ahead) pager.drain();
}

// Decode steps with a prompt now and then, pages read ahead, prefetches, predictions: live,
// recorded, replayed.
void a_recorded_run_is_repeated_exactly() {
    for (const std::string& policy : policy_names(true))
        for (const size_t num_slots : {2u, 5u, 9u, 24u}) {
            PolicySetting setting{.num_experts = {8, 8, 6},
                                  .num_slots = num_slots,
                                  .kept = {1, 9},
                                  .next_request = {}};
            if (policy == "static" && num_slots < 4) continue;
            PagerOptions options;
            options.num_experts = setting.num_experts;
            options.layer_names.assign(3, "experts");
            std::vector<std::byte> slots(num_slots * kBytes);
            options.slots = slots.data();
            options.num_slots = num_slots;
            options.slot_stride = kBytes;
            auto source = std::make_shared<FakeSource>(kBytes);
            auto pager = std::make_shared<Pager>(options, make_policy(policy, setting),
                                                 std::make_unique<HostCopyEngine>(source, 2, 4096));
            pager->set_recording(true);
            std::mt19937 random{unsigned(num_slots)};
            for (int step = 0; step < 120; ++step) {
                const bool prompt = step % 40 == 0;
                if (prompt) pager->begin_sequence();
                for (int32_t layer = 0; layer < 3; ++layer) {
                    std::vector<int32_t> ids(size_t(setting.num_experts[size_t(layer)]));
                    for (size_t i = 0; i < ids.size(); ++i) ids[i] = int32_t(i);
                    std::shuffle(ids.begin(), ids.end(), random);
                    if (random() % 3 == 0) {
                        const std::vector<int32_t> likely(ids.begin(), ids.begin() + 3);
                        pager->predict(layer, likely, std::vector<float>{0.9F, 0.5F, 0.1F});
                        if (random() % 2 == 0) pager->expect(layer, likely);
                        if (random() % 2 == 0) pager->prefetch(layer, likely);
                        pager->drain();
                    }
                    std::shuffle(ids.begin(), ids.end(), random);
                    if (!prompt) ids.resize(random() % 4);
                    std::vector<float> weights;
                    for (size_t i = 0; i < ids.size(); ++i)
                        weights.push_back(float(random() % 100) / 100.0F);
                    forward(*pager, layer, ids, weights, prompt ? 9 : 1, prompt && layer < 2);
                }
            }
            const EventLog log = pager->recorded();
            Simulator simulator(policy, setting, 0);
            simulator.run(view(log), {}, {});
            const std::vector<LayerCounters> live = pager->counters();
            for (size_t layer = 0; layer < 3; ++layer) {
                const LayerCounters& replayed = simulator.counters()[layer];
                CHECK_EQ(replayed.acquires, live[layer].acquires);
                CHECK_EQ(replayed.lookups, live[layer].lookups);
                CHECK_EQ(replayed.hits, live[layer].hits);
                CHECK_EQ(replayed.prefetch_hits, live[layer].prefetch_hits);
                CHECK_EQ(replayed.demand_misses, live[layer].demand_misses);
                CHECK_EQ(replayed.bypasses, live[layer].bypasses);
                CHECK_EQ(replayed.evictions, live[layer].evictions);
                CHECK_EQ(simulator.wasted_prefetches()[layer] * kBytes,
                         live[layer].prefetch_bytes_wasted);
            }
            std::vector<PageIndex> residents;
            for (const auto& [layer, expert, slot] : pager->residents())
                residents.push_back(PageIndex(layer * 8 + expert));
            std::sort(residents.begin(), residents.end());
            CHECK_EQ(simulator.residents(), residents);
        }
}

using Sets = std::vector<std::vector<int32_t>>;

uint64_t misses(const std::string& policy, const Sets& requests, size_t num_slots, int32_t pages) {
    EventLog log;
    for (const auto& request : requests) log.add(EventKind::kRequest, 0, request, {}, 1);
    PolicySetting setting{
        .num_experts = {pages}, .num_slots = num_slots, .kept = {}, .next_request = {}};
    if (policy.starts_with("belady")) setting.next_request = next_requests(view(log), setting);
    Simulator simulator(policy, setting, 0);
    simulator.run(view(log), {}, {});
    return simulator.counters()[0].demand_misses;
}

// Every schedule of every cache content, by dynamic programming over sets of pages. A content may
// follow if it holds only what was there or was just asked for, and fits; without bypass it holds
// the whole request.
uint64_t fewest_misses(const Sets& requests, size_t num_slots, int32_t pages, bool bypass) {
    std::map<uint32_t, uint64_t> best{{0, 0}};
    for (const auto& request : requests) {
        uint32_t asked = 0;
        for (const int32_t page : request) asked |= 1u << page;
        std::map<uint32_t, uint64_t> next;
        for (const auto& [content, cost] : best) {
            const uint32_t missed = asked & ~content;
            const int count = __builtin_popcount(missed);
            for (uint32_t after = 0; after < 1u << pages; ++after) {
                if ((after & ~(content | asked)) != 0) continue;
                if (size_t(__builtin_popcount(after)) > num_slots) continue;
                if (!bypass && (after & asked) != asked) continue;
                const uint64_t total = cost + uint64_t(count);
                const auto [entry, fresh] = next.emplace(after, total);
                if (!fresh) entry->second = std::min(entry->second, total);
            }
        }
        best = std::move(next);
    }
    uint64_t least = ~uint64_t{0};
    for (const auto& [content, cost] : best) least = std::min(least, cost);
    return least;
}

void belady_is_the_optimum_of_brute_force_and_nobody_beats_it() {
    constexpr int32_t kPages = 7;
    std::mt19937 random(17);
    for (int trial = 0; trial < 300; ++trial) {
        const size_t num_slots = 2 + random() % 4;
        const bool large = trial % 3 == 0;  // also requests that do not fit: only bypass can
        Sets requests;
        for (int i = 0; i < 14; ++i) {
            std::vector<int32_t> ids;
            for (int32_t page = 0; page < kPages; ++page) ids.push_back(page);
            std::shuffle(ids.begin(), ids.end(), random);
            ids.resize(1 + random() % (large ? size_t(kPages) : num_slots));
            requests.push_back(ids);
        }
        const uint64_t bypass = fewest_misses(requests, num_slots, kPages, true);
        CHECK_EQ(misses("belady-bypass", requests, num_slots, kPages), bypass);
        if (!large) {
            const uint64_t plain = fewest_misses(requests, num_slots, kPages, false);
            CHECK_EQ(misses("belady", requests, num_slots, kPages), plain);
            CHECK(bypass <= plain);
        }
        for (const std::string& policy : policy_names(true))
            CHECK(misses(policy, requests, num_slots, kPages) >= bypass);
    }
}

void bad_events_are_refused() {
    const PolicySetting setting{
        .num_experts = {4, 2}, .num_slots = 2, .kept = {}, .next_request = {}};
    const auto run = [&](int32_t layer, std::vector<int32_t> ids, uint8_t kind = 0) {
        EventLog log;
        log.add(static_cast<EventKind>(kind), layer, ids, {}, 1);
        Simulator("lru", setting, 0).run(view(log), {}, {});
    };
    CHECK_THROWS(std::invalid_argument, "event 0 names layer 2 of 2", run(2, {0}));
    CHECK_THROWS(std::invalid_argument, "event 0 names expert 3 of 2 in layer 1", run(1, {3}));
    CHECK_THROWS(std::invalid_argument, "event 0 names expert 1 twice", run(0, {1, 2, 1}));
    CHECK_THROWS(std::invalid_argument, "event 0 has the unknown kind 9", run(0, {1}, 9));
    CHECK_THROWS(std::invalid_argument, "at least 2 slots, got 1",
                 Simulator("lru", {{4}, 1, {}, {}}, 0));
}

}  // namespace

int main() {
    RUN(a_recorded_run_is_repeated_exactly);
    RUN(belady_is_the_optimum_of_brute_force_and_nobody_beats_it);
    RUN(bad_events_are_refused);
}
