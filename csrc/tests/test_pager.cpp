// The pager's contract: working sets stay locked, every page arrives once and exact, what does not
// fit streams, and policies decide what stays.
#include <atomic>
#include <set>
#include <thread>

#include "pager_pool.h"

using namespace moe_offload;

namespace {

void misses_then_hits() {
    Pool pool(8);
    pool.forward(0, {1, 2, 3});
    pool.forward(0, {3, 2});
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.demand_misses, 3u);
    CHECK_EQ(sum.hits, 2u);
    CHECK_EQ(sum.demand_bytes, 3 * kBytes);
    CHECK_EQ(sum.evictions, 0u);
    CHECK_EQ(pool.residents(), (Pages{{0, 1}, {0, 2}, {0, 3}}));
}

void an_empty_request_is_fine() {
    Pool pool(2);
    CHECK(pool.pager->acquire(0, {})->next().empty());
}

void resident_pages_are_delivered_before_late_ones_arrive() {
    Pool pool(4);
    pool.forward(0, {1});
    pool.source->set_gate(false);
    const std::vector<int32_t> experts{0, 1};
    const auto ticket = pool.pager->acquire(0, experts);
    const auto ready = ticket->next();  // does not wait for expert 0
    CHECK_EQ(ready.size(), 1u);
    CHECK_EQ(ready[0].index, 1);
    pool.source->set_gate(true);
    CHECK_EQ(ticket->next().at(0).index, 0);
    CHECK(ticket->next().empty());
}

void a_working_set_larger_than_the_pool_streams_through_it() {
    for (const size_t slots : {2u, 3u, 5u}) {
        Pool pool(slots);
        for (int round = 0; round < 3; ++round)
            for (int32_t layer = 0; layer < 2; ++layer)
                pool.forward(layer, {0, 1, 2, 3, 4, 5, 6, 7});
        CHECK(pool.total().bypasses > 0);
        CHECK_EQ(pool.total().lookups, 48u);
    }
}

void pages_whose_slots_are_waited_for_are_delivered_first() {
    Pool pool(5);
    pool.forward(0, {0, 1});
    pool.source->set_gate(false);
    const std::vector<int32_t> experts{0, 1, 2, 3, 4, 5, 6, 7};  // six misses, three slots
    const auto ticket = pool.pager->acquire(0, experts);
    auto ready = ticket->next();
    CHECK_EQ(ready.size(), 1u);  // not both: a page that somebody waits behind may land meanwhile
    CHECK_EQ(ready[0].index, 0);
    pool.source->set_gate(true);
    pool.pager->drain();
    ready = ticket->next();
    CHECK_EQ(ready.size(), 3u);
    std::vector<int32_t> indices;
    for (const ReadyPage& page : ready) {
        CHECK(page.index >= 2);
        indices.push_back(page.index);
    }
    CHECK_EQ(ticket->next().at(0).index, 1);  // nobody waits for a slot any more but for those
    ticket->release(indices);
    pool.pager->drain();
    CHECK_EQ(ticket->next().size(), 3u);
    CHECK(ticket->next().empty());
}

// A prompt that touches every expert of a layer may keep no more than the layer's even share.
void large_working_sets_leave_the_other_layers_their_pages() {
    Pool pool(8);
    pool.forward(0, {0, 1, 2, 3});
    pool.forward(1, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK_EQ(pool.residents(),
             (Pages{{0, 0}, {0, 1}, {0, 2}, {0, 3}, {1, 4}, {1, 5}, {1, 6}, {1, 7}}));
    CHECK_EQ(pool.total().bypasses, 4u);
    CHECK_EQ(pool.total().evictions, 0u);
}

void no_page_of_a_live_ticket_is_evicted() {
    Pool pool(4, 2, 8, 2, 8);
    const std::vector<int32_t> held{0, 1}, other{2, 3, 4, 5, 6};
    const auto ticket = pool.pager->acquire(0, held);
    std::vector<ReadyPage> pages;
    while (pages.size() < 2)
        for (const ReadyPage& page : ticket->next()) pages.push_back(page);
    for (int round = 0; round < 20; ++round) {
        pool.forward(1, other);
        for (const auto& [index, slot] : pages) CHECK(pool.holds(slot, 0, held[size_t(index)]));
    }
}

void tickets_that_find_no_slot_wait_for_those_that_have_them() {
    Pool pool(2);
    const std::vector<int32_t> held{0, 1};
    const auto ticket = pool.pager->acquire(0, held);
    std::vector<int32_t> indices;
    while (indices.size() < 2)
        for (const ReadyPage& page : ticket->next()) indices.push_back(page.index);
    std::atomic<bool> done = false;
    std::thread other([&] {
        pool.forward(1, {3, 4, 5});
        done = true;
    });
    while (pool.pager->num_live_tickets() < 2) std::this_thread::yield();
    CHECK(!done);
    ticket->release(indices);
    other.join();
    CHECK(done);
}

void fill_takes_free_slots_only() {
    Pool pool(3);
    pool.forward(0, {7});
    const std::vector<std::pair<int32_t, int32_t>> pages{{0, 0}, {1, 0}, {0, 1}, {1, 1}};
    CHECK_EQ(pool.pager->fill(pages), 2u);
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 0}, {0, 7}, {1, 0}}));
}

void the_static_set_stays() {
    Pool pool(4, 2, 8, 2, 0, "static", {0, 8});  // expert 0 of both layers
    for (int round = 0; round < 5; ++round) {
        pool.forward(0, {0, 1, 2, 3, 4, 5});
        pool.forward(1, {0, 6, 7});
    }
    CHECK_EQ(pool.total().demand_misses - 2, pool.total().lookups - 2 - pool.total().hits);
    const auto residents = pool.residents();
    CHECK(residents.contains({0, 0}) && residents.contains({1, 0}));
    CHECK(pool.total().hits >= 8);
}

// A policy that bypasses: what it holds to be worth less than every resident page passes through.
void pages_not_worth_a_slot_pass_through_one() {
    Pool pool(6, 2, 8, 2, 0, "forecast");
    for (int step = 0; step < 40; ++step) {
        pool.forward(0, {0, 1, 2});
        pool.forward(1, {0, 1});
    }
    pool.pager->reset_counters();
    pool.forward(0, {0, 5, 6, 7});  // three strangers, one slot that nobody needs
    CHECK_EQ(pool.total().bypasses, 2u);
    CHECK_EQ(pool.total().evictions, 0u);
    CHECK(pool.residents().contains({0, 2}) && pool.residents().contains({1, 1}));
}

// A page of the very request is the least valuable one: it is computed, then gives its slot.
void a_hit_may_be_the_victim_once_it_was_used() {
    Pool pool(4, 1, 8, 2, 0, "forecast");
    for (int step = 0; step < 40; ++step) pool.forward(0, {0, 1, 2});
    pool.forward(0, {0, 1, 2, 7});
    CHECK(pool.residents().contains({0, 7}));
    for (int step = 0; step < 40; ++step) pool.forward(0, {0, 1, 2});
    for (int step = 0; step < 20; ++step) pool.forward(0, {0, 1, 2, 6});
    CHECK_EQ(pool.residents(), (Pages{{0, 0}, {0, 1}, {0, 2}, {0, 6}}));
    pool.forward(0, {6, 5});
    CHECK_EQ(pool.residents().size(), 4u);
    CHECK(pool.residents().contains({0, 5}));
}

void a_quota_is_kept_by_demands_prefetches_and_fills() {
    Pool pool(6, 2, 8, 2, 0, "lru-per-layer");
    const std::vector<int32_t> many{0, 1, 2, 3, 4};
    std::vector<std::pair<int32_t, int32_t>> pages;
    for (const int32_t expert : many) pages.emplace_back(1, expert);
    CHECK_EQ(pool.pager->fill(pages), 3u);
    pool.pager->drain();
    CHECK_EQ(pool.pager->prefetch(0, many), 3u);
    pool.pager->drain();
    for (int round = 0; round < 3; ++round) pool.forward(0, {1, 2, 3, 4, 5});
    CHECK_EQ(pool.residents().size(), 6u);
    CHECK((pool.residents().contains({1, 0})));
    CHECK_EQ(pool.pager->counters()[1].evictions, 0u);
}

void a_recorded_run_lists_every_request() {
    Pool pool(4);
    pool.forward(0, {1});
    pool.pager->set_recording(true);
    const std::vector<int32_t> experts{2, 3}, one{5};
    const std::vector<float> weights{0.25F, 0.75F};
    pool.pager->begin_sequence();
    pool.pager->prefetch(1, one);
    pool.pager->predict(1, experts, weights, 2);
    pool.pager->acquire(0, experts, weights, 7);
    CHECK_THROWS(std::invalid_argument, "one value per expert, got 2 for 1",
                 pool.pager->acquire(0, one, weights, 7));
    CHECK_THROWS(std::invalid_argument, "one value per expert, got 2 for 1",
                 pool.pager->predict(0, one, weights));
    const std::vector<int32_t> routes{3, 2, -1, 2};
    CHECK_THROWS(std::invalid_argument, "as many routes for each of 3 tokens, got 4",
                 pool.pager->acquire(0, experts, {}, 3, std::nullopt, routes));
    CHECK_THROWS(std::invalid_argument, "as many routes for each of 0 tokens, got 4",
                 pool.pager->acquire(0, experts, {}, 0, std::nullopt, routes));
    pool.pager->acquire(0, experts, {}, 2, std::nullopt, routes);
    const EventLog log = pool.pager->recorded();
    CHECK_EQ(log.kinds, (std::vector<uint8_t>{3, 1, 2, 0, 6, 0}));
    CHECK_EQ(log.layers, (std::vector<int32_t>{0, 1, 1, 0, 0, 0}));
    CHECK_EQ(log.counts, (std::vector<int32_t>{0, 0, 2, 7, 2, 2}));
    CHECK_EQ(log.experts, (std::vector<int32_t>{5, 2, 3, 2, 3, 3, 2, -1, 2, 2, 3}));
    CHECK_EQ(log.expert_offsets, (std::vector<int64_t>{0, 0, 1, 3, 5, 9, 11}));
    CHECK_EQ(log.value_offsets, (std::vector<int64_t>{0, 0, 0, 2, 4, 4, 4}));
    pool.pager->set_recording(false);
    CHECK(pool.pager->recorded().kinds.empty());
}

}  // namespace

int main() {
    RUN(misses_then_hits);
    RUN(an_empty_request_is_fine);
    RUN(resident_pages_are_delivered_before_late_ones_arrive);
    RUN(a_working_set_larger_than_the_pool_streams_through_it);
    RUN(pages_whose_slots_are_waited_for_are_delivered_first);
    RUN(large_working_sets_leave_the_other_layers_their_pages);
    RUN(no_page_of_a_live_ticket_is_evicted);
    RUN(tickets_that_find_no_slot_wait_for_those_that_have_them);
    RUN(fill_takes_free_slots_only);
    RUN(the_static_set_stays);
    RUN(pages_not_worth_a_slot_pass_through_one);
    RUN(a_hit_may_be_the_victim_once_it_was_used);
    RUN(a_quota_is_kept_by_demands_prefetches_and_fills);
    RUN(a_recorded_run_lists_every_request);
}
