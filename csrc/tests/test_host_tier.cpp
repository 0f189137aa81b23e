// Pages in host memory: who is kept, who waits, what cancelling leaves behind.
#include <atomic>
#include <thread>

#include "check.h"
#include "fake_source.h"
#include "paging/host_copy_engine.h"
#include "paging/host_tier.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 64;

struct Tier {
    std::shared_ptr<FakeSource> source = std::make_shared<FakeSource>(kBytes, 2);
    std::vector<std::byte> frames;
    HostTier tier;

    explicit Tier(size_t num_frames)
        : frames(num_frames * kBytes),
          tier(std::make_unique<HostCopyEngine>(source, 1, 4096), frames.data(), num_frames, kBytes,
               1, 32) {}
    ~Tier() {
        source->set_gate(true);
        tier.stop();
    }
};

struct Want {
    std::shared_ptr<HostWant> want = std::make_shared<HostWant>();
    std::atomic<int> ready = 0, failed = 0;

    Want(int32_t expert, Priority priority = Priority::kDemand) {
        want->expert = expert;
        want->priority = priority;
        want->on_ready = [this](const CopyResult& result) {
            if (result.error) ++failed;
            ++ready;
        };
    }
    void wait() const {
        while (ready == 0) std::this_thread::yield();
    }
};

void fetch(Tier& t, int32_t expert) {
    Want want(expert);
    if (!t.tier.fetch(want.want)) want.wait();
    CHECK(FakeSource::holds(t.tier.address(want.want->frame), kBytes, 0, expert));
    t.tier.unlock(want.want);
}

void pages_are_read_once_and_the_least_recently_wanted_gives_way() {
    Tier t(4);
    for (const int32_t expert : {0, 1, 2, 3, 0, 1, 4, 0, 1, 2}) fetch(t, expert);
    const auto counters = t.tier.counters();
    CHECK_EQ(counters.misses, 6u);  // 0 1 2 3, 4 for 2, 2 for 3
    CHECK_EQ(counters.hits, 4u);
    CHECK_EQ(counters.evictions, 2u);
    CHECK_EQ(counters.disk_bytes, 6 * kBytes);
}

void locked_frames_stay_and_requests_wait_for_them_demands_first() {
    Tier t(4);
    Want held[] = {{0}, {1}, {2}, {3}};
    for (Want& want : held)
        if (!t.tier.fetch(want.want)) want.wait();
    Want late(5, Priority::kPrefetch), urgent(6);
    CHECK(!t.tier.fetch(late.want));
    CHECK(!t.tier.fetch(urgent.want));
    CHECK_EQ(t.source->order().size(), 8u);
    t.tier.unlock(held[2].want);
    urgent.wait();
    CHECK(FakeSource::holds(t.tier.address(urgent.want->frame), kBytes, 0, 6));
    CHECK_EQ(int(late.ready), 0);
    t.tier.unlock(held[0].want);
    late.wait();
    CHECK(FakeSource::holds(t.tier.address(held[1].want->frame), kBytes, 0, 1));
}

void two_requests_share_a_read() {
    Tier t(4);
    t.source->set_gate(false);
    Want first(7, Priority::kPrefetch), second(7);
    CHECK(!t.tier.fetch(first.want));
    CHECK(!t.tier.fetch(second.want));
    t.source->set_gate(true);
    first.wait(), second.wait();
    CHECK_EQ(first.want->frame, second.want->frame);
    CHECK_EQ(t.tier.counters().disk_bytes, kBytes);
}

void a_cancelled_read_frees_its_frame_and_may_be_wanted_again() {
    Tier t(4);
    t.source->set_gate(false);
    Want running(1, Priority::kPrefetch), queued(2, Priority::kPrefetch);
    CHECK(!t.tier.fetch(running.want));
    t.source->wait_for_arrivals(1);
    CHECK(!t.tier.fetch(queued.want));
    CHECK(t.tier.cancel(queued.want));   // gone: not begun
    CHECK(t.tier.cancel(running.want));  // its read stops after the chunk in flight
    Want again(1);
    CHECK(!t.tier.fetch(again.want));
    t.source->set_gate(true);
    again.wait();
    CHECK(FakeSource::holds(t.tier.address(again.want->frame), kBytes, 0, 1));
    CHECK_EQ(int(running.ready) + int(queued.ready), 0);
    t.tier.unlock(again.want);
    for (const int32_t expert : {10, 11, 12, 13}) fetch(t, expert);  // all frames are usable
}

void prefetches_lock_no_more_than_half_of_the_frames() {
    Tier t(4);
    Want ahead[] = {{1, Priority::kPrefetch}, {2, Priority::kPrefetch}, {3, Priority::kPrefetch}};
    for (Want& want : ahead) CHECK(!t.tier.fetch(want.want));
    ahead[0].wait(), ahead[1].wait();
    CHECK_EQ(t.source->order().size(), 4u);
    CHECK(!t.tier.promote(ahead[2].want));  // as a demand it finds a frame
    ahead[2].wait();
    CHECK_EQ(t.source->order().size(), 6u);
}

void failed_reads_are_reported_and_forgotten() {
    Tier t(4);
    t.source->set_failing(0, 9, true);
    Want bad(9);
    CHECK(!t.tier.fetch(bad.want));
    bad.wait();
    CHECK_EQ(int(bad.failed), 1);
    CHECK_EQ(bad.want->frame, kNoSlot);
    t.source->set_failing(0, 9, false);
    fetch(t, 9);
    CHECK_THROWS(std::invalid_argument, "at least 4 frames, got 3", Tier(3));
}

}  // namespace

int main() {
    RUN(pages_are_read_once_and_the_least_recently_wanted_gives_way);
    RUN(locked_frames_stay_and_requests_wait_for_them_demands_first);
    RUN(two_requests_share_a_read);
    RUN(a_cancelled_read_frees_its_frame_and_may_be_wanted_again);
    RUN(prefetches_lock_no_more_than_half_of_the_frames);
    RUN(failed_reads_are_reported_and_forgotten);
}
