// Failed copies, early exits, bad requests, closing, forks: they reach who is concerned, and the
// pager goes on.
#include <sys/wait.h>
#include <unistd.h>
#include <chrono>
#include <set>
#include <thread>

#include "pager_pool.h"

using namespace moe_offload;

namespace {

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

}  // namespace

int main() {
    RUN(failures_reach_the_waiter_and_leave_the_pager_usable);
    RUN(a_failed_fill_is_reported_by_drain_once);
    RUN(a_ticket_may_be_closed_at_any_point);
    RUN(pages_a_closed_ticket_never_fetched_are_fetched_by_who_wants_them);
    RUN(leaving_early_does_not_take_a_page_from_the_ticket_that_fetches_it);
    RUN(bad_requests_are_refused_and_change_nothing);
    RUN(waits_are_bounded);
    RUN(closing_wakes_who_waits_and_refuses_everybody_after);
    RUN(a_forked_child_is_refused_and_can_exit);
}
