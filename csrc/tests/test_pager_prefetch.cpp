// What nobody waits for: prefetches are counted, joined, cancelled, and make way for demands.
#include <numeric>
#include <set>

#include "pager_pool.h"

using namespace moe_offload;

namespace {

void a_prefetched_page_is_a_hit_and_is_counted_as_such() {
    Pool pool(8);
    const std::vector<int32_t> experts{4, 5};
    CHECK_EQ(pool.pager->prefetch(1, experts), 2u);
    CHECK_EQ(pool.pager->prefetch(1, experts), 0u);  // on its way already
    pool.pager->drain();
    pool.forward(1, {4});
    pool.forward(1, {4});
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.hits, 2u);
    CHECK_EQ(sum.prefetch_hits, 1u);
    CHECK_EQ(sum.demand_misses, 0u);
    CHECK_EQ(sum.prefetch_bytes_used, kBytes);
    CHECK_EQ(sum.prefetch_bytes_wasted, 0u);  // expert 5 may still be used
}

void a_demand_joins_the_prefetch_that_is_under_way() {
    Pool pool(8, 2, 8, 1);
    pool.source->set_gate(false);
    const std::vector<int32_t> first{1}, second{2};
    pool.pager->prefetch(0, first);
    pool.pager->prefetch(1, second);
    pool.source->wait_for_arrivals(1);
    const auto ticket = pool.pager->acquire(1, second);
    pool.source->set_gate(true);
    CHECK_EQ(ticket->next().size(), 1u);
    pool.pager->drain();
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.joined_prefetches, 1u);
    CHECK_EQ(sum.demand_misses, 0u);
    CHECK_EQ(sum.demand_bytes, 0u);
    CHECK_EQ(sum.prefetch_bytes_used, kBytes);
    CHECK_EQ(pool.source->order().size(), 4u);   // two pages of two chunks: no byte moved twice
    CHECK_EQ(pool.source->order()[1].first, 1);  // promoted past the rest of the other prefetch
}

void stale_prefetches_are_cancelled_when_their_layer_is_routed() {
    Pool pool(8, 2, 8, 1);
    pool.source->set_gate(false);
    const std::vector<int32_t> running{1}, queued{2, 3};
    pool.pager->prefetch(0, running);
    pool.source->wait_for_arrivals(1);
    pool.pager->prefetch(1, queued);
    const std::vector<int32_t> wanted{3};
    const auto ticket = pool.pager->acquire(1, wanted);
    pool.source->set_gate(true);
    CHECK_EQ(ticket->next().size(), 1u);
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 1}, {1, 3}}));
}

void unused_prefetches_count_as_wasted_when_evicted() {
    Pool pool(2, 1, 8);
    const std::vector<int32_t> wrong{7};
    pool.pager->prefetch(0, wrong);
    pool.pager->drain();
    pool.forward(0, {0, 1});
    CHECK_EQ(pool.total().prefetch_bytes_wasted, kBytes);
    CHECK_EQ(pool.total().evictions, 1u);
}

void prefetches_do_not_evict_each_other_and_make_way_for_demands() {
    Pool pool(3, 1, 8, 1);
    const std::vector<int32_t> many{0, 1, 2, 3, 4};
    pool.source->set_gate(false);
    CHECK_EQ(pool.pager->prefetch(0, many), 3u);
    pool.source->wait_for_arrivals(1);
    const std::vector<int32_t> wanted{6, 7};
    const auto ticket = pool.pager->acquire(0, wanted);
    pool.source->set_gate(true);
    size_t delivered = 0;
    while (delivered < 2) delivered += ticket->next().size();
    CHECK_EQ(pool.total().joined_prefetches, 0u);
}

void a_prefetch_in_vain_makes_room_once_its_layer_was_routed() {
    Pool pool(2, 2, 8);
    const std::vector<int32_t> first{1, 2}, second{3};
    CHECK_EQ(pool.pager->prefetch(1, first), 2u);
    pool.pager->drain();
    CHECK_EQ(pool.pager->prefetch(0, second), 0u);  // both may still be used
    pool.pager->acquire(1, {});
    CHECK_EQ(pool.pager->prefetch(0, second), 1u);
    pool.pager->drain();
    CHECK_EQ(pool.residents().size(), 2u);
    CHECK_EQ(pool.residents().count({0, 3}), 1u);
    CHECK(pool.total().prefetch_bytes_wasted > 0);
}

void an_expected_page_is_kept_from_prefetches_until_its_layer_is_routed() {
    Pool pool(3, 2, 8);
    pool.forward(1, {0});  // least recently used
    pool.forward(0, {0});
    pool.forward(0, {1});
    const std::vector<int32_t> asked{5, 0, 6};
    CHECK_EQ(pool.pager->expect(1, asked), (std::vector<int32_t>{5, 6}));
    const std::vector<int32_t> missing{5};
    CHECK_EQ(pool.pager->prefetch(1, missing), 1u);
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 1}, {1, 0}, {1, 5}}));
    pool.pager->reset_counters();  // counters are not what the protection hangs on
    const std::vector<int32_t> more{6};
    CHECK_EQ(pool.pager->prefetch(1, more), 1u);  // 0:1 goes: the other two are not for prefetches
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{1, 0}, {1, 5}, {1, 6}}));
    CHECK_EQ(pool.pager->prefetch(0, missing), 0u);
    pool.forward(1, {5, 6});  // 1:0 was expected and is not used
    CHECK_EQ(pool.pager->prefetch(0, missing), 1u);
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 5}, {1, 5}, {1, 6}}));
}

void cancelling_keeps_what_is_still_predicted() {
    Pool pool(8, 2, 8, 1);
    pool.source->set_gate(false);
    const std::vector<int32_t> running{1}, queued{2, 3}, still{3};
    pool.pager->prefetch(0, running);
    pool.source->wait_for_arrivals(1);
    pool.pager->prefetch(1, queued);
    pool.pager->cancel_prefetches(1, still);
    pool.source->set_gate(true);
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 1}, {1, 3}}));
}

// A prompt's scan of 32 experts with 24 slots in two layers: the slots that it streamed through are
// filled with the next layer's first absent pages, those pass through as misses do, and the cache
// is no smaller for it.
void what_is_read_ahead_of_a_scan_passes_through() {
    Pool pool(24, 2, 32);
    std::vector<int32_t> all(32);
    std::iota(all.begin(), all.end(), 0);
    const std::vector<int32_t> some(all.begin(), all.begin() + 12);
    pool.forward(0, some);
    pool.forward(1, some);
    CHECK_EQ(pool.pager->read_ahead(1), 0u);  // it evicts nothing
    pool.forward(0, all, 512, 1);             // 6 slots, one of them for a page that stays
    CHECK_EQ(pool.pager->read_ahead(1), 0u);
    pool.pager->drain();
    CHECK_EQ(pool.total().evictions, 6u);
    CHECK_EQ(pool.residents().size(), 24u);
    for (int32_t expert = 0; expert < 5; ++expert)  // the six oldest of layer 1 had been evicted
        CHECK(pool.residents().contains({1, expert}));
    CHECK(!pool.residents().contains({1, 5}));

    pool.pager->reset_counters();
    pool.forward(1, all, 512);
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.hits, 11u);
    CHECK_EQ(sum.prefetch_hits, 5u);
    CHECK_EQ(sum.demand_misses, 21u);
    CHECK_EQ(sum.bypasses, 20u);
    CHECK_EQ(sum.evictions, 1u);
    CHECK_EQ(sum.prefetch_bytes_used, 5 * kBytes);
    CHECK_EQ(pool.residents().size(), 19u);
    for (int32_t expert = 0; expert < 5; ++expert) CHECK(!pool.residents().contains({1, expert}));
}

// What was read ahead belongs to the scan that it was read for: pages have no slot of their own any
// more, and misses are chained behind them. A ticket that ends before it took one page gives all of
// it up: those slots are free, and so are those of the chains' first copies once these have ended.
void a_scan_closed_early_gives_up_what_was_read_ahead() {
    std::vector<int32_t> all(32);
    std::iota(all.begin(), all.end(), 0);
    for (const bool landed : {true, false}) {
        Pool pool(24, 2, 32, 1);
        pool.forward(0, all, 512);  // leaves a layer's share, its last 12
        Pages kept;
        for (int32_t expert = 20; expert < 32; ++expert) kept.emplace(0, expert);
        CHECK_EQ(pool.residents(), kept);
        pool.source->set_gate(landed);
        CHECK_EQ(pool.pager->read_ahead(1), 6u);
        if (landed) pool.pager->drain();
        pool.source->set_gate(false);
        pool.pager->reset_counters();
        {
            const auto ticket = pool.pager->acquire(1, all, {}, 512);
            CHECK_EQ(pool.pager->num_live_tickets(), 1u);
        }
        CHECK_EQ(pool.pager->num_live_tickets(), 0u);
        pool.source->set_gate(true);
        pool.pager->drain();

        const LayerCounters sum = pool.total();
        CHECK_EQ(sum.lookups, 32u);
        CHECK_EQ(sum.prefetch_hits, landed ? 6u : 0u);
        CHECK_EQ(sum.joined_prefetches, landed ? 0u : 6u);
        CHECK_EQ(sum.demand_misses, 26u);
        CHECK_EQ(sum.bypasses, 20u);
        CHECK_EQ(sum.evictions, 0u);
        CHECK_EQ(sum.demand_bytes, 6 * kBytes);  // of the six free slots; the others never began
        CHECK_EQ(sum.prefetch_bytes_used, landed ? 6 * kBytes : 0u);
        CHECK_EQ(sum.prefetch_bytes_wasted, landed ? 0u : 6 * kBytes);
        CHECK_EQ(pool.residents(), kept);

        // Twelve slots are free and none is pinned: prefetches may have all of them.
        const std::vector<int32_t> many(all.begin(), all.begin() + 24);
        const std::vector<int32_t> half(many.begin(), many.begin() + 12);
        CHECK_EQ(pool.pager->prefetch(1, half), 12u);
        pool.pager->drain();
        CHECK_EQ(pool.total().evictions, 0u);
        CHECK_EQ(pool.pager->prefetch(1, many), 12u);
        pool.pager->drain();
        CHECK_EQ(pool.total().evictions, 12u);
        Pages ahead;
        for (const int32_t expert : many) ahead.emplace(1, expert);
        CHECK_EQ(pool.residents(), ahead);
        pool.forward(1, all, 512);
        pool.forward(0, all, 512, 1);
        pool.forward(1, all, 512);
        CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    }
}

}  // namespace

int main() {
    RUN(a_prefetched_page_is_a_hit_and_is_counted_as_such);
    RUN(a_demand_joins_the_prefetch_that_is_under_way);
    RUN(stale_prefetches_are_cancelled_when_their_layer_is_routed);
    RUN(unused_prefetches_count_as_wasted_when_evicted);
    RUN(prefetches_do_not_evict_each_other_and_make_way_for_demands);
    RUN(a_prefetch_in_vain_makes_room_once_its_layer_was_routed);
    RUN(an_expected_page_is_kept_from_prefetches_until_its_layer_is_routed);
    RUN(cancelling_keeps_what_is_still_predicted);
    RUN(what_is_read_ahead_of_a_scan_passes_through);
    RUN(a_scan_closed_early_gives_up_what_was_read_ahead);
}
