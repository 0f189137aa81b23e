// The order of copies, without threads: demand before prefetch, chunk by chunk.
#include <algorithm>
#include <functional>

#include "check.h"
#include "fake_source.h"
#include "paging/copy_queue.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 64;

std::shared_ptr<CopyJob> job(int32_t expert, Priority priority) {
    auto job = std::make_shared<CopyJob>();
    job->expert = expert;
    job->priority = priority;
    job->on_done = [](const CopyResult&) {};
    return job;
}

CopyQueue queue(size_t chunks_per_page, size_t max_prefetch_chunks = 100) {
    return {std::make_shared<FakeSource>(kBytes, chunks_per_page), 4096, max_prefetch_chunks};
}

// Takes and finishes one chunk after the other until nothing is left: the experts in that order.
std::vector<int32_t> run(CopyQueue& queue) {
    std::vector<int32_t> order;
    while (auto step = queue.take()) {
        order.push_back(step->job->expert);
        if (const auto report = queue.finish(*step, step->error, 0)) report();
    }
    return order;
}

void a_demand_goes_between_the_chunks_of_a_prefetch() {
    CopyQueue q = queue(3);
    q.push(job(1, Priority::kPrefetch));
    const auto first = q.take();
    q.push(job(2, Priority::kPrefetch));
    q.push(job(3, Priority::kDemand));
    CHECK(!q.finish(*first, nullptr, 0));
    CHECK_EQ(run(q), (std::vector<int32_t>{3, 3, 3, 1, 1, 2, 2, 2}));
}

void prefetches_leave_room_for_demands() {
    CopyQueue q = queue(2, 2);
    q.push(job(1, Priority::kPrefetch));
    q.push(job(2, Priority::kPrefetch));
    const auto a = q.take(), b = q.take();
    CHECK(a && b);
    CHECK(!q.ready());  // two prefetch chunks are in flight, a third may not start
    CHECK(!q.take());
    q.push(job(3, Priority::kDemand));
    CHECK(q.ready());
    CHECK_EQ(q.take()->job->expert, 3);
    CHECK_EQ(q.take()->job->expert, 3);
    CHECK(!q.take());
    CHECK(q.finish(*a, nullptr, 0) == nullptr);
    CHECK_EQ(q.take()->job->expert, 2);
}

void a_read_that_has_arrived_makes_room_for_the_next_prefetch() {
    CopyQueue q = queue(3, 1);
    q.push(job(1, Priority::kPrefetch));
    auto a = q.take();
    CHECK(!q.ready());
    q.arrived(*a);  // its bytes are still to be copied
    const auto b = q.take();
    CHECK(a && b);
    CHECK(q.finish(*a, nullptr, 0) == nullptr);
    CHECK(!q.ready());  // counted once: the second read is in flight
    CHECK(q.finish(*b, nullptr, 0) == nullptr);
    const auto c = q.take();
    CHECK(c && q.finish(*c, nullptr, 0) != nullptr);
}

void a_promoted_prefetch_is_a_demand() {
    CopyQueue q = queue(2, 1);
    const auto p1 = job(1, Priority::kPrefetch), p2 = job(2, Priority::kPrefetch);
    q.push(p1);
    q.push(p2);
    const auto first = q.take();
    q.promote(p2);
    q.promote(p1);
    q.promote(p1);  // twice changes nothing
    CHECK(q.ready());
    CHECK_EQ(run(q), (std::vector<int32_t>{2, 2, 1}));
    CHECK(q.finish(*first, nullptr, 0));
}

void cancelling() {
    CopyQueue q = queue(2);
    const auto queued = job(1, Priority::kPrefetch), running = job(2, Priority::kPrefetch),
               demand = job(3, Priority::kDemand);
    q.push(running);
    const auto step = q.take();
    q.push(queued);
    q.push(demand);
    CHECK(q.cancel(queued) == CopyEngine::Cancelled::kGone);
    CHECK(q.cancel(queued) == CopyEngine::Cancelled::kTooLate);
    CHECK(q.cancel(running) == CopyEngine::Cancelled::kWillReport);
    CHECK(q.cancel(demand) == CopyEngine::Cancelled::kTooLate);
    CHECK(q.finish(*step, nullptr, 0));
    CHECK(running->result.cancelled);
    CHECK_EQ(running->result.bytes, kBytes / 2);
    CHECK_EQ(run(q), (std::vector<int32_t>{3, 3}));
}

// No chunk of a job starts before the page in its slot is away; it may be promoted or cancelled
// meanwhile.
void a_page_is_sent_back_before_the_next_one_comes() {
    CopyQueue q = queue(2);
    const auto swap_back = std::make_shared<SwapBack>(kBytes);
    std::byte slot[kBytes] = {};
    const auto swapping = [&](int32_t expert) {
        auto prefetch = job(expert, Priority::kPrefetch);
        prefetch->leaving = slot;
        prefetch->swap_back = swap_back;
        q.push(prefetch);
        return prefetch;
    };
    const auto promoted = swapping(1), cancelled = swapping(2);
    const auto a = q.take(), b = q.take();
    CHECK(a->send_back && b->send_back && a->chunk == nullptr);
    CHECK(!q.take());  // both pages are on their way out
    q.push(job(3, Priority::kDemand));
    q.promote(promoted);
    CHECK(q.cancel(promoted) == CopyEngine::Cancelled::kTooLate);
    CHECK(q.cancel(cancelled) == CopyEngine::Cancelled::kWillReport);
    CHECK(q.cancel(cancelled) == CopyEngine::Cancelled::kTooLate);
    CHECK(!q.finish(*a, nullptr, 0));
    CHECK(q.finish(*b, nullptr, 0) != nullptr);
    CHECK(cancelled->result.cancelled);
    CHECK_EQ(cancelled->result.swap_back_bytes, kBytes);
    CHECK_EQ(cancelled->result.bytes, 0u);
    CHECK_EQ(run(q), (std::vector<int32_t>{1, 1, 3, 3}));

    const auto unsent = swapping(4);
    CHECK(q.cancel(unsent) == CopyEngine::Cancelled::kGone);
    CHECK(unsent->leaving == slot);  // the page is in the slot still
    const auto failing = swapping(5);
    const auto step = q.take();
    CHECK(q.finish(*step, std::make_exception_ptr(std::bad_alloc()), 0) != nullptr);
    CHECK(failing->result.error);
    CHECK_EQ(failing->result.swap_back_bytes, 0u);
    CHECK(!q.take());
}

void the_first_error_ends_a_job() {
    CopyQueue q = queue(4);
    const auto bad = job(1, Priority::kDemand), good = job(2, Priority::kDemand);
    q.push(bad);
    q.push(good);
    const auto a = q.take(), b = q.take();
    CHECK(!q.finish(*a, std::make_exception_ptr(PageReadError("first")), 4096));
    const auto report = q.finish(*b, std::make_exception_ptr(PageReadError("second")), 0);
    CHECK(report != nullptr);
    CHECK_THROWS(PageReadError, "first", std::rethrow_exception(bad->result.error));
    CHECK_EQ(bad->result.bytes, 0u);
    CHECK_EQ(bad->result.disk_bytes, 4096u);
    CHECK_EQ(run(q), (std::vector<int32_t>{2, 2, 2, 2}));
}

void chunks_that_are_read_straight_are_longer() {
    class Sized final : public PageSource {
        std::vector<Chunk> chunks(int32_t, int32_t, size_t chunk_bytes) const override {
            return {{0, 0, chunk_bytes, {}}};
        }
        bool straight(int32_t, int32_t expert, const std::byte*) const override {
            return expert < 10;
        }
        uint64_t read(int32_t, int32_t, const Chunk&, std::byte*, Scratch&) const override {
            return 0;
        }
    };
    CopyQueue q(std::make_shared<Sized>(), 4096, 9);
    const auto length = [&](int32_t expert, Priority priority, bool promoted = false) {
        const auto one = job(expert, priority);
        q.push(one);
        if (promoted) q.promote(one);
        const auto step = q.take();
        CHECK(step && step->job == one);
        const uint64_t nbytes = step->chunk->nbytes;
        CHECK(q.finish(*step, nullptr, 0));
        return nbytes;
    };
    CHECK_EQ(length(1, Priority::kDemand), 4096 * CopyQueue::kDemandChunks);
    CHECK_EQ(length(2, Priority::kPrefetch, true), 4096 * CopyQueue::kDemandChunks);
    CHECK_EQ(length(3, Priority::kPrefetch), 4096 * CopyQueue::kPrefetchChunks);
    CHECK_EQ(length(11, Priority::kDemand), uint64_t{4096});
    CHECK_EQ(length(12, Priority::kPrefetch), uint64_t{4096});
}

void an_unknown_page_is_one_step_with_an_error() {
    class Empty final : public PageSource {
        std::vector<Chunk> chunks(int32_t, int32_t, size_t) const override {
            throw std::invalid_argument("no such page");
        }
        uint64_t read(int32_t, int32_t, const Chunk&, std::byte*, Scratch&) const override {
            return 0;
        }
    };
    CopyQueue q(std::make_shared<Empty>(), 4096, 1);
    const auto lost = job(1, Priority::kDemand);
    q.push(lost);
    const auto step = q.take();
    CHECK(step->chunk == nullptr);
    CHECK(q.finish(*step, step->error, 0));
    CHECK_THROWS(std::invalid_argument, "no such page", std::rethrow_exception(lost->result.error));
}

void chaos_reorders_delays_and_fails() {
    CopyQueue q = queue(1);
    q.set_chaos({.seed = 5, .max_delay_us = 20, .reorder = true, .fail_probability = 0.3});
    std::vector<std::shared_ptr<CopyJob>> jobs;
    for (int32_t i = 0; i < 200; ++i) {
        jobs.push_back(job(i, Priority::kDemand));
        q.push(jobs.back());
    }
    const auto order = run(q);
    CHECK_EQ(order.size(), 200u);
    CHECK(!std::is_sorted(order.begin(), order.end()));
    const auto failed = std::count_if(jobs.begin(), jobs.end(),
                                      [](const auto& job) { return job->result.error != nullptr; });
    CHECK(failed > 20 && failed < 120);  // 60 expected; 20 and 120 are 6 and 9 sigma away
}

}  // namespace

int main() {
    RUN(a_demand_goes_between_the_chunks_of_a_prefetch);
    RUN(prefetches_leave_room_for_demands);
    RUN(a_read_that_has_arrived_makes_room_for_the_next_prefetch);
    RUN(a_promoted_prefetch_is_a_demand);
    RUN(cancelling);
    RUN(a_page_is_sent_back_before_the_next_one_comes);
    RUN(the_first_error_ends_a_job);
    RUN(chunks_that_are_read_straight_are_longer);
    RUN(an_unknown_page_is_one_step_with_an_error);
    RUN(chaos_reorders_delays_and_fails);
}
