// The thread pool with a source that waits at a gate: what a copy in flight means for others.
// What all engines promise is test_copy_engines.cpp, the order of copies test_copy_queue.cpp.
#include <future>

#include "check.h"
#include "fake_source.h"
#include "paging/host_copy_engine.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 64;

struct Copy {
    std::vector<std::byte> slot = std::vector<std::byte>(kBytes);
    std::promise<CopyResult> done;
    std::shared_ptr<CopyJob> job = std::make_shared<CopyJob>();

    Copy(int32_t expert, Priority priority) {
        job->expert = expert;
        job->slot = slot.data();
        job->priority = priority;
        job->on_done = [this](const CopyResult& result) { done.set_value(result); };
    }
};

std::vector<int32_t> experts(const FakeSource& source) {
    std::vector<int32_t> order;
    for (const auto& [layer, expert] : source.order()) order.push_back(expert);
    return order;
}

void copies_arrive_and_report() {
    HostCopyEngine engine(std::make_shared<FakeSource>(kBytes, 4), 3, 4096);
    Copy copy(9, Priority::kDemand);
    engine.submit(copy.job);
    const CopyResult result = copy.done.get_future().get();
    CHECK(!result.error && !result.cancelled);
    CHECK_EQ(result.bytes, kBytes);
    CHECK_EQ(result.disk_bytes, kBytes);
    CHECK(result.begin_ns <= result.end_ns);
    CHECK(FakeSource::holds(copy.slot.data(), kBytes, 0, 9));
}

// One worker, pages of two chunks. A demand that comes while a prefetch is being copied waits for
// the chunk in flight and for nothing else.
void demand_waits_for_at_most_one_prefetch_chunk() {
    const auto source = std::make_shared<FakeSource>(kBytes, 2);
    source->set_gate(false);
    HostCopyEngine engine(source, 1, 4096);
    Copy p1(1, Priority::kPrefetch), p2(2, Priority::kPrefetch), d3(3, Priority::kDemand);
    engine.submit(p1.job);
    source->wait_for_arrivals(1);
    engine.submit(p2.job);
    engine.submit(d3.job);
    source->set_gate(true);
    for (Copy* copy : {&p1, &p2, &d3}) copy->done.get_future().wait();
    CHECK_EQ(experts(*source), (std::vector<int32_t>{1, 3, 3, 1, 2, 2}));
}

void cancelling_before_during_and_after() {
    const auto source = std::make_shared<FakeSource>(kBytes, 2);
    source->set_gate(false);
    HostCopyEngine engine(source, 1, 4096);
    Copy running(1, Priority::kPrefetch), queued(2, Priority::kPrefetch),
        demand(3, Priority::kDemand);
    engine.submit(running.job);
    source->wait_for_arrivals(1);
    engine.submit(queued.job);
    CHECK(engine.cancel(queued.job) == CopyEngine::Cancelled::kGone);
    CHECK(engine.cancel(running.job) == CopyEngine::Cancelled::kWillReport);
    engine.submit(demand.job);
    CHECK(engine.cancel(demand.job) == CopyEngine::Cancelled::kTooLate);
    source->set_gate(true);
    CHECK(running.done.get_future().get().cancelled);
    CHECK_EQ(demand.done.get_future().get().bytes, kBytes);
    CHECK(engine.cancel(running.job) == CopyEngine::Cancelled::kTooLate);
    CHECK_EQ(experts(*source), (std::vector<int32_t>{1, 3, 3}));  // 2 never ran, 1 stopped half way
}

void the_first_error_is_kept_and_the_engine_goes_on() {
    const auto source = std::make_shared<FakeSource>(kBytes, 4);
    source->set_failing(0, 1, true);
    HostCopyEngine engine(source, 2, 4096);
    Copy bad(1, Priority::kDemand), good(2, Priority::kDemand);
    engine.submit(bad.job);
    engine.submit(good.job);
    const CopyResult result = bad.done.get_future().get();
    CHECK_THROWS(PageReadError, "on fire", std::rethrow_exception(result.error));
    CHECK(!good.done.get_future().get().error);
}

void stop_waits_for_running_chunks_and_drops_the_rest() {
    const auto source = std::make_shared<FakeSource>(kBytes);
    source->set_gate(false);
    auto engine = std::make_unique<HostCopyEngine>(source, 1, 4096);
    Copy running(1, Priority::kDemand), queued(2, Priority::kPrefetch);
    engine->submit(running.job);
    source->wait_for_arrivals(1);
    engine->submit(queued.job);
    auto stopping = std::async(std::launch::async, [&] { engine->stop(); });
    // A queued prefetch can be cancelled until stop() has dropped it.
    while (engine->cancel(queued.job) == CopyEngine::Cancelled::kGone) engine->submit(queued.job);
    source->set_gate(true);
    stopping.wait();
    CHECK_EQ(running.done.get_future().get().bytes, kBytes);
    CHECK_EQ(experts(*source), (std::vector<int32_t>{1}));
    engine.reset();  // stopping twice is fine
}

}  // namespace

int main() {
    RUN(copies_arrive_and_report);
    RUN(demand_waits_for_at_most_one_prefetch_chunk);
    RUN(cancelling_before_during_and_after);
    RUN(the_first_error_is_kept_and_the_engine_goes_on);
    RUN(stop_waits_for_running_chunks_and_drops_the_rest);
}
