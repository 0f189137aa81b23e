// The pager's contract: working sets stay locked, streams are exact, demands join and pre-empt,
// failures reach who waits and harm nobody else, and decisions do not depend on timing.
#include <sys/wait.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <list>
#include <map>
#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "fake_source.h"
#include "paging/host_copy_engine.h"
#include "paging/pager.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 64;
constexpr size_t kStride = 128;

// A pager over fake pages, its slots, and checks of what is in them.
struct Pool {
    std::shared_ptr<FakeSource> source = std::make_shared<FakeSource>(kBytes, 2);
    std::vector<std::byte> slots;
    std::shared_ptr<Pager> pager;

    explicit Pool(size_t num_slots, int layers = 2, int experts = 8, int threads = 2,
                  size_t admit_limit = 0, const std::string& policy = "lru",
                  std::vector<PageIndex> kept = {}, int64_t timeout_ms = 20'000)
        : slots(num_slots * kStride, std::byte{0}) {
        PagerOptions options;
        options.num_experts.assign(size_t(layers), experts);
        options.layer_names.assign(size_t(layers), "model.experts");
        options.slots = slots.data();
        options.num_slots = num_slots;
        options.slot_stride = kStride;
        options.admit_limit = admit_limit;
        options.wait_timeout_ns = timeout_ms * 1'000'000;
        const PolicySetting setting{.num_experts = options.num_experts,
                                    .num_slots = num_slots,
                                    .kept = std::move(kept),
                                    .next_request = {}};
        pager = std::make_shared<Pager>(std::move(options), make_policy(policy, setting),
                                        std::make_unique<HostCopyEngine>(source, threads, 4096));
    }

    bool holds(SlotIndex slot, int32_t layer, int32_t expert) const {
        return FakeSource::holds(slots.data() + size_t(slot) * kStride, kBytes, layer, expert);
    }

    // One layer's forward: every page must arrive once and stay intact until it is released.
    void forward(int32_t layer, const std::vector<int32_t>& experts) {
        const auto ticket = pager->acquire(layer, experts);
        std::set<int32_t> seen;
        while (true) {
            const auto ready = ticket->next();
            if (ready.empty()) break;
            std::vector<int32_t> indices;
            for (const auto& [index, slot] : ready) {
                CHECK(seen.insert(index).second);
                CHECK(holds(slot, layer, experts[size_t(index)]));
                indices.push_back(index);
            }
            std::this_thread::yield();
            for (const auto& [index, slot] : ready)
                CHECK(holds(slot, layer, experts[size_t(index)]));
            ticket->release(indices);
        }
        CHECK_EQ(seen.size(), experts.size());
    }

    LayerCounters total() const {
        LayerCounters sum;
        for (const LayerCounters& layer : pager->counters()) {
            sum.lookups += layer.lookups;
            sum.hits += layer.hits;
            sum.prefetch_hits += layer.prefetch_hits;
            sum.joined_prefetches += layer.joined_prefetches;
            sum.demand_misses += layer.demand_misses;
            sum.bypasses += layer.bypasses;
            sum.evictions += layer.evictions;
            sum.demand_bytes += layer.demand_bytes;
            sum.prefetch_bytes_used += layer.prefetch_bytes_used;
            sum.prefetch_bytes_wasted += layer.prefetch_bytes_wasted;
            sum.fill_bytes += layer.fill_bytes;
            sum.stall_ns += layer.stall_ns;
        }
        return sum;
    }

    std::set<std::pair<int32_t, int32_t>> residents() const {
        std::set<std::pair<int32_t, int32_t>> pages;
        for (const auto& [layer, expert, slot] : pager->residents()) pages.emplace(layer, expert);
        return pages;
    }
};

using Pages = std::set<std::pair<int32_t, int32_t>>;

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

void failures_reach_the_waiter_and_leave_the_pager_usable() {
    Pool pool(4);
    pool.source->set_failing(1, 5, true);
    CHECK_THROWS(PageReadError, "reading layer 1 (model.experts) expert 5: the disk is on fire",
                 pool.forward(1, {2, 5}));
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    pool.pager->drain();
    CHECK_EQ(pool.residents().count({1, 5}), 0u);
    pool.forward(0, {5, 6, 7});
    pool.source->set_failing(1, 5, false);
    pool.forward(1, {2, 5});
}

void a_failed_fill_is_reported_by_drain_once() {
    Pool pool(4);
    pool.source->set_failing(0, 1, true);
    const std::vector<std::pair<int32_t, int32_t>> pages{{0, 0}, {0, 1}, {0, 2}};
    CHECK_EQ(pool.pager->fill(pages), 3u);
    CHECK_THROWS(PageReadError, "expert 1", pool.pager->drain());
    pool.pager->drain();
    CHECK_EQ(pool.residents(), (Pages{{0, 0}, {0, 2}}));
    CHECK_EQ(pool.total().fill_bytes, 2 * kBytes);
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

void a_ticket_may_be_closed_at_any_point() {
    Pool pool(2, 1, 8);
    const std::vector<int32_t> experts{0, 1, 2, 3, 4};
    for (int stop = 0; stop < 5; ++stop) {
        const auto ticket = pool.pager->acquire(0, experts);
        for (int i = 0; i < stop; ++i)
            for (const ReadyPage& page : ticket->next()) {
                const std::vector<int32_t> index{page.index};
                ticket->release(index);
            }
        ticket->close();
        ticket->close();
        CHECK_THROWS(StateError, "after close", ticket->next());
    }
    pool.pager->drain();
    pool.forward(0, experts);
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
}

// Ticket B wants a page that ticket A has scheduled behind others and then never fetches.
void pages_a_closed_ticket_never_fetched_are_fetched_by_who_wants_them() {
    Pool pool(2, 1, 8);
    const std::vector<int32_t> many{0, 1, 2, 3}, one{3};
    auto a = pool.pager->acquire(0, many);
    const auto b = pool.pager->acquire(0, one);
    a->close();
    const auto ready = b->next();
    CHECK_EQ(ready.size(), 1u);
    CHECK(pool.holds(ready[0].slot, 0, 3));
}

// Ticket B joined a page that A still has to fetch and gives up: A must not notice.
void leaving_early_does_not_take_a_page_from_the_ticket_that_fetches_it() {
    Pool pool(2, 1, 8);
    const std::vector<int32_t> many{0, 1, 2, 3}, one{3};
    const auto a = pool.pager->acquire(0, many);
    pool.pager->acquire(0, one)->close();
    std::set<int32_t> seen;
    for (auto ready = a->next(); !ready.empty(); ready = a->next())
        for (const auto& [index, slot] : ready) {
            CHECK(pool.holds(slot, 0, many[size_t(index)]));
            const std::vector<int32_t> released{index};
            a->release(released);
            seen.insert(index);
        }
    CHECK_EQ(seen.size(), 4u);
}

void bad_requests_are_refused_and_change_nothing() {
    Pool pool(4);
    const std::vector<int32_t> twice{1, 1}, high{8}, low{-1}, fine{1};
    CHECK_THROWS(std::invalid_argument, "distinct experts, got 1 twice",
                 pool.pager->acquire(0, twice));
    CHECK_THROWS(std::invalid_argument, "has experts [0, 8), got 8", pool.pager->acquire(0, high));
    CHECK_THROWS(std::invalid_argument, "got -1", pool.pager->prefetch(0, low));
    CHECK_THROWS(std::invalid_argument, "layer in [0, 2), got 2", pool.pager->acquire(2, fine));
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    CHECK_EQ(pool.total().lookups, 0u);
    const auto ticket = pool.pager->acquire(0, fine);
    const std::vector<int32_t> index{0};
    CHECK_THROWS(std::invalid_argument, "was not delivered", ticket->release(index));
    ticket->next();
    ticket->release(index);
    CHECK_THROWS(std::invalid_argument, "released before", ticket->release(index));
    CHECK_THROWS(std::invalid_argument, "at least 2 slots, got 1", Pool(1));
}

void waits_are_bounded() {
    Pool pool(2, 1, 8, 1, 0, "lru", {}, 50);
    pool.source->set_gate(false);
    const std::vector<int32_t> experts{0};
    const auto ticket = pool.pager->acquire(0, experts);
    CHECK_THROWS(StateError, "waited 50 ms for 1 experts of layer 0", ticket->next());
    CHECK_THROWS(StateError, "still in flight", pool.pager->drain());
    pool.source->set_gate(true);
    CHECK_EQ(ticket->next().size(), 1u);  // the copy was not lost
}

void closing_wakes_who_waits_and_refuses_everybody_after() {
    Pool pool(2);
    pool.source->set_gate(false);
    const std::vector<int32_t> experts{0};
    const auto ticket = pool.pager->acquire(0, experts);
    std::thread closer([&] {
        pool.source->wait_for_arrivals(1);
        std::thread opener([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            pool.source->set_gate(true);
        });
        pool.pager->close();
        opener.join();
    });
    CHECK_THROWS(StateError, "closed", ticket->next());
    closer.join();
    pool.pager->close();
    CHECK_THROWS(StateError, "used after close", pool.pager->acquire(0, experts));
    CHECK_THROWS(StateError, "used after close", pool.pager->prefetch(0, experts));
}

void a_forked_child_is_refused_and_can_exit() {
    Pool pool(2);
    pool.forward(0, {1});
    const pid_t child = ::fork();
    if (child == 0) {
        bool refused = false;
        try {
            const std::vector<int32_t> experts{1};
            pool.pager->acquire(0, experts);
        } catch (const StateError& error) {
            refused = std::string(error.what()).find("forked child") != std::string::npos;
        }
        pool.pager.reset();  // must not try to join threads that do not exist here
        ::_exit(refused ? 0 : 1);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    CHECK_EQ(WEXITSTATUS(status), 0);
    pool.forward(0, {1});
}

// A plain list of pages, least recently used first, is the oracle of what must be resident.
void residents_agree_with_a_textbook_lru() {
    constexpr size_t kSlots = 7;
    Pool pool(kSlots, 3, 8, 2, kSlots);  // no admission limit
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
        for (const int32_t expert : missed) {
            if (oracle.size() == kSlots) oracle.pop_front(), ++evictions;
            oracle.emplace_back(layer, expert);
        }
        CHECK_EQ(pool.residents(), Pages(oracle.begin(), oracle.end()));
    }
    CHECK_EQ(pool.total().hits, hits);
    CHECK_EQ(pool.total().evictions, evictions);
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
    const EventLog log = pool.pager->recorded();
    CHECK_EQ(log.kinds, (std::vector<uint8_t>{3, 1, 2, 0}));
    CHECK_EQ(log.layers, (std::vector<int32_t>{0, 1, 1, 0}));
    CHECK_EQ(log.counts, (std::vector<int32_t>{0, 0, 2, 7}));
    CHECK_EQ(log.experts, (std::vector<int32_t>{5, 2, 3, 2, 3}));
    CHECK_EQ(log.expert_offsets, (std::vector<int64_t>{0, 0, 1, 3, 5}));
    CHECK_EQ(log.value_offsets, (std::vector<int64_t>{0, 0, 0, 2, 4}));
    pool.pager->set_recording(false);
    CHECK(pool.pager->recorded().kinds.empty());
}

// The same requests under different timing: the same decisions, counters and residents.
void decisions_do_not_depend_on_timing() {
    for (const std::string& policy : policy_names(true)) {
        std::vector<LayerCounters> reference;
        Pages residents;
        for (const uint64_t seed : {0u, 1u, 2u}) {
            Pool pool(5, 3, 8, seed == 2 ? 1 : 3, 0, policy, {1, 9});
            if (seed > 0) pool.pager->set_chaos({seed, 100, true, 0.0}, 0.0);
            std::mt19937 random(5);
            for (int step = 0; step < 200; ++step) {
                std::vector<int32_t> experts;
                for (int32_t e = 0; e < 8; ++e)
                    if (random() % 8 < unsigned(step % 7)) experts.push_back(e);
                pool.forward(int32_t(random() % 3), experts);
            }
            std::vector<LayerCounters> counters = pool.pager->counters();
            for (LayerCounters& layer : counters) layer.stall_ns = layer.overlap_ns = 0;
            if (seed == 0) reference = counters, residents = pool.residents();
            CHECK(std::memcmp(counters.data(), reference.data(),
                              counters.size() * sizeof(LayerCounters)) == 0);
            CHECK_EQ(pool.residents(), residents);
        }
    }
}

// Random acquires, prefetches, cancels and failures on several threads, under chaos. `fail` is 0 or
// large enough to be met: at 0.05 one in some hundred runs met no failure, so a run has about a
// hundred copies, and at 0.2 the chance is that to the power of four (0.8 = 0.95^4.35).
void random_requests_under_hostile_timing(int threads, size_t slots, const std::string& policy,
                                          double fail, int steps) {
    Pool pool(slots, 3, 8, 3, 0, policy, {0, 8});
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
                    } else {
                        pool.forward(layer, experts);
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
    for (int32_t layer = 0; layer < 3; ++layer) pool.forward(layer, {0, 1, 2, 3, 4, 5, 6, 7});
}

void random_requests() {
    for (const std::string& policy : policy_names(true))
        for (const size_t slots : {4u, 6u, 13u, 24u}) {
            random_requests_under_hostile_timing(1, slots, policy, 0.0, 100);
            random_requests_under_hostile_timing(1, slots, policy, 0.2, 100);
            random_requests_under_hostile_timing(3, slots, policy, 0.0, 80);
            random_requests_under_hostile_timing(3, slots, policy, 0.2, 80);
        }
    random_requests_under_hostile_timing(4, 2, "lru", 0.02, 300);
}

}  // namespace

int main() {
    RUN(misses_then_hits);
    RUN(an_empty_request_is_fine);
    RUN(resident_pages_are_delivered_before_late_ones_arrive);
    RUN(a_working_set_larger_than_the_pool_streams_through_it);
    RUN(large_working_sets_leave_the_other_layers_their_pages);
    RUN(no_page_of_a_live_ticket_is_evicted);
    RUN(tickets_that_find_no_slot_wait_for_those_that_have_them);
    RUN(a_prefetched_page_is_a_hit_and_is_counted_as_such);
    RUN(a_demand_joins_the_prefetch_that_is_under_way);
    RUN(stale_prefetches_are_cancelled_when_their_layer_is_routed);
    RUN(unused_prefetches_count_as_wasted_when_evicted);
    RUN(prefetches_do_not_evict_each_other_and_make_way_for_demands);
    RUN(a_prefetch_in_vain_makes_room_once_its_layer_was_routed);
    RUN(an_expected_page_is_kept_from_prefetches_until_its_layer_is_routed);
    RUN(cancelling_keeps_what_is_still_predicted);
    RUN(failures_reach_the_waiter_and_leave_the_pager_usable);
    RUN(a_failed_fill_is_reported_by_drain_once);
    RUN(fill_takes_free_slots_only);
    RUN(the_static_set_stays);
    RUN(a_ticket_may_be_closed_at_any_point);
    RUN(pages_a_closed_ticket_never_fetched_are_fetched_by_who_wants_them);
    RUN(leaving_early_does_not_take_a_page_from_the_ticket_that_fetches_it);
    RUN(bad_requests_are_refused_and_change_nothing);
    RUN(waits_are_bounded);
    RUN(closing_wakes_who_waits_and_refuses_everybody_after);
    RUN(a_forked_child_is_refused_and_can_exit);
    RUN(residents_agree_with_a_textbook_lru);
    RUN(pages_not_worth_a_slot_pass_through_one);
    RUN(a_hit_may_be_the_victim_once_it_was_used);
    RUN(a_quota_is_kept_by_demands_prefetches_and_fills);
    RUN(a_recorded_run_lists_every_request);
    RUN(decisions_do_not_depend_on_timing);
    RUN(random_requests);
}
