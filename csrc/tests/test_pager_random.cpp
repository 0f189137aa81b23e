// Thousands of random requests: against a textbook LRU, under every timing, under failures.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <list>
#include <random>
#include <set>
#include <thread>

#include "pager_pool.h"

using namespace moe_offload;

namespace {

// A plain list of pages, least recently used first, is the oracle of what must be resident.
void residents_agree_with_a_textbook_lru() {
    constexpr size_t kSlots = 7;
    // No admission limit. What is evicted is sent back, and nothing else.
    Pool pool(kSlots, 3, 8, 2, kSlots, "lru", {}, 20'000, true, true);
    std::list<std::pair<int32_t, int32_t>> oracle;
    uint64_t hits = 0, evictions = 0;
    std::mt19937 random(11);
    for (int step = 0; step < 3000; ++step) {
        const auto layer = int32_t(random() % 3);
        std::vector<int32_t> experts(8);
        for (int32_t i = 0; i < 8; ++i) experts[size_t(i)] = i;
        std::shuffle(experts.begin(), experts.end(), random);
        experts.resize(random() % 6);
        pool.forward(layer, experts);
        // Hits move to the end first: the working set is locked before anything is evicted.
        std::vector<int32_t> missed;
        for (const int32_t expert : experts) {
            const auto found = std::find(oracle.begin(), oracle.end(), std::pair(layer, expert));
            if (found == oracle.end()) {
                missed.push_back(expert);
                continue;
            }
            ++hits;
            oracle.erase(found);
            oracle.emplace_back(layer, expert);
        }
        std::vector<std::pair<int32_t, int32_t>> evicted;
        for (const int32_t expert : missed) {
            if (oracle.size() == kSlots) evicted.push_back(oracle.front()), oracle.pop_front();
            oracle.emplace_back(layer, expert);
        }
        evictions += evicted.size();
        std::sort(evicted.begin(), evicted.end());
        std::sort(pool.sent_back.begin(), pool.sent_back.end());
        CHECK_EQ(std::exchange(pool.sent_back, {}), evicted);
        CHECK_EQ(pool.residents(), Pages(oracle.begin(), oracle.end()));
    }
    CHECK_EQ(pool.total().hits, hits);
    CHECK_EQ(pool.total().evictions, evictions);
    CHECK_EQ(pool.total().swap_back_bytes, evictions * kBytes);
}

// The same requests under different timing: the same decisions, counters and residents.
void decisions_do_not_depend_on_timing() {
    for (const std::string& policy : policy_names(true)) {
        std::vector<LayerCounters> reference;
        Pages residents;
        for (const uint64_t seed : {0u, 1u, 2u}) {
            Pool pool(5, 3, 8, seed == 2 ? 1 : 3, 0, policy, {1, 9}, 20'000, false, true);
            if (seed > 0) pool.pager->set_chaos({seed, 100, true, 0.0}, 0.0);
            std::mt19937 random(5);
            for (int step = 0; step < 200; ++step) {
                std::vector<int32_t> experts;
                for (int32_t e = 0; e < 8; ++e)
                    if (random() % 8 < unsigned(step % 7)) experts.push_back(e);
                const auto layer = int32_t(random() % 3);
                // Every other request is of many tokens: more than a share of it is a scan.
                pool.forward(layer, experts, step % 2 == 0 ? 9 : 1);
            }
            std::vector<LayerCounters> counters = pool.pager->counters();
            for (LayerCounters& layer : counters) layer.stall_ns = layer.overlap_ns = 0;
            if (seed == 0) reference = counters, residents = pool.residents();
            CHECK(std::memcmp(counters.data(), reference.data(),
                              counters.size() * sizeof(LayerCounters)) == 0);
            CHECK_EQ(pool.residents(), residents);
            CHECK(pool.total().swap_back_bytes > 0);
        }
    }
}

// Prompts that read each layer while the one before is computed, single tokens in between. All that
// may depend on timing is whether a page was met in its slot or on its way there.
void reading_ahead_does_not_depend_on_timing() {
    for (const std::string& policy : policy_names(true)) {
        std::vector<std::vector<uint64_t>> reference;
        Pages residents;
        for (const uint64_t seed : {0u, 1u, 2u}) {
            Pool pool(13, 3, 16, seed == 2 ? 1 : 3, 0, policy, {1, 17});
            if (seed > 0) pool.pager->set_chaos({seed, 100, true, 0.0}, 0.0);
            std::mt19937 random(6);
            for (int step = 0; step < 60; ++step)
                for (int32_t layer = 0; layer < 3; ++layer) {
                    std::vector<int32_t> experts;
                    for (int32_t e = 0; e < 16; ++e)
                        if (step % 4 == 0 || random() % 8 == 0) experts.push_back(e);
                    const bool prompt = step % 4 == 0;
                    pool.forward(layer, experts, prompt ? 99 : 1,
                                 prompt && layer < 2 ? layer + 1 : -1);
                }
            pool.pager->drain();
            std::vector<std::vector<uint64_t>> counted;
            for (const LayerCounters& c : pool.pager->counters())
                counted.push_back({c.lookups, c.hits + c.joined_prefetches, c.demand_misses,
                                   c.bypasses, c.evictions, c.demand_bytes, c.prefetch_bytes_used,
                                   c.prefetch_bytes_wasted});
            if (seed == 0) reference = counted, residents = pool.residents();
            CHECK_EQ(counted, reference);
            CHECK_EQ(pool.residents(), residents);
            if (policy == "lru") CHECK(pool.total().prefetch_bytes_used > 0);
        }
    }
}

// Random acquires, prefetches, cancels and failures on several threads, under chaos. `fail` is 0 or
// large enough to be met: at 0.05 one in some hundred runs met no failure, so a run has about a
// hundred copies, and at 0.2 the chance is that to the power of four (0.8 = 0.95^4.35).
void random_requests_under_hostile_timing(int threads, size_t slots, const std::string& policy,
                                          double fail, int steps, bool shifted) {
    const bool swap_back = slots % 4 == 2 || slots == 24;
    Pool pool(slots, 3, 8, 3, 0, policy, {0, 8}, 20'000, shifted, swap_back);
    pool.pager->set_chaos({slots, 30, true, fail}, 0.05);
    std::atomic<int> failures = 0;
    std::vector<std::thread> workers;
    for (int worker = 0; worker < threads; ++worker)
        workers.emplace_back([&, worker] {
            std::mt19937 random(unsigned(worker) * 7919u + unsigned(slots));
            for (int step = 0; step < steps; ++step) {
                const auto layer = int32_t(random() % 3);
                std::vector<int32_t> experts;
                for (int32_t e = 0; e < 8; ++e)
                    if (random() % 3 == 0) experts.push_back(e);
                std::shuffle(experts.begin(), experts.end(), random);
                try {
                    if (random() % 4 == 0) pool.pager->prefetch(layer, experts);
                    if (random() % 4 == 0) {
                        const std::vector<float> likely(experts.size(), 0.5F);
                        pool.pager->predict(layer, experts, likely, int32_t(random() % 3));
                    }
                    if (random() % 32 == 0) pool.pager->begin_sequence();
                    if (random() % 16 == 0)
                        pool.pager->cancel_prefetches(int32_t(random() % 4) - 1);
                    if (random() % 8 == 0)
                        pool.pager->prefetch(layer, pool.pager->expect(layer, experts));
                    if (random() % 8 == 0) {  // an exception between acquire and release
                        const auto ticket = pool.pager->acquire(layer, experts);
                        if (random() % 2 == 0) ticket->next();
                    } else {  // of few experts or, more than a share, a scan
                        const int32_t ahead = random() % 2 == 0 ? -1 : (layer + 1) % 3;
                        pool.forward(layer, experts, int32_t(random() % 3), ahead);
                    }
                } catch (const PageReadError&) {
                    ++failures;
                }
            }
        });
    for (std::thread& worker : workers) worker.join();
    pool.pager->set_chaos({}, 0.0);
    pool.pager->drain();
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    CHECK_EQ(failures > 0, fail > 0);
    std::set<SlotIndex> used;
    for (const auto& [layer, expert, slot] : pool.pager->residents()) {
        CHECK(used.insert(slot).second);
        CHECK(pool.holds(slot, layer, expert));
    }
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.lookups, sum.hits + sum.joined_prefetches + sum.demand_misses);
    CHECK_EQ(sum.swap_back_bytes, pool.sent_back.size() * kBytes);
    CHECK_EQ(sum.swap_back_bytes > 0, swap_back);
    for (int32_t layer = 0; layer < 3; ++layer) pool.forward(layer, {0, 1, 2, 3, 4, 5, 6, 7});
}

void random_requests() {
    for (const std::string& policy : policy_names(true))
        for (const size_t slots : {4u, 6u, 13u, 24u}) {
            random_requests_under_hostile_timing(1, slots, policy, 0.0, 100, true);
            random_requests_under_hostile_timing(1, slots, policy, 0.2, 100, false);
            random_requests_under_hostile_timing(3, slots, policy, 0.0, 80, false);
            random_requests_under_hostile_timing(3, slots, policy, 0.2, 80, true);
        }
    for (const bool shifted : {false, true})
        random_requests_under_hostile_timing(4, 2, "lru", 0.02, 300, shifted);
}

}  // namespace

int main() {
    RUN(residents_agree_with_a_textbook_lru);
    RUN(decisions_do_not_depend_on_timing);
    RUN(reading_ahead_does_not_depend_on_timing);
    RUN(random_requests);
}
