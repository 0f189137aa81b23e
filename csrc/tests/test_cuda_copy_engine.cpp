// The CUDA copy engine on the fake driver: order, pre-emption, fences, pinning, failure, shutdown.
#include <future>
#include <numeric>

#include "check.h"
#include "fake_cuda/fake_cuda.h"
#include "fake_source.h"
#include "paging/cuda_copy_engine.h"
#include "paging/host_copy_engine.h"
#include "paging/memory_source.h"

using namespace moe_offload;

namespace {

constexpr size_t kPageBytes = 64 << 10;
constexpr size_t kChunk = 16 << 10;  // prefetches are enqueued in halves of it
constexpr int kExperts = 8;

// Pages of a live model, as two tensors, and slots in "device" memory.
struct Link {
    std::vector<std::byte> gate_up, down, slots;
    std::shared_ptr<MemorySource> source = std::make_shared<MemorySource>();
    std::shared_ptr<CudaContext> context;
    std::unique_ptr<CudaCopyEngine> engine;

    explicit Link(uint64_t register_limit = UINT64_MAX, size_t pin_bytes = SIZE_MAX)
        : gate_up(kExperts * kPageBytes * 3 / 4 + 1),
          down(kExperts * kPageBytes / 4),
          slots(kExperts * kPageBytes) {
        fake_cuda_reset();
        fake_cuda_set_register_limit(register_limit);
        fake_cuda_add_device_range(reinterpret_cast<uintptr_t>(slots.data()), slots.size());
        context = std::make_shared<CudaContext>(CudaDriver::load(FAKE_CUDA), 0);
        const size_t first = kPageBytes * 3 / 4, second = kPageBytes / 4;
        for (int e = 0; e < kExperts; ++e) {
            std::memset(gate_up.data() + size_t(e) * first, FakeSource::content(0, e), first);
            std::memset(down.data() + size_t(e) * second, FakeSource::content(0, e), second);
            source->add_page(0, e,
                             {{gate_up.data() + size_t(e) * first, first, 0},
                              {down.data() + size_t(e) * second, second, first}});
        }
        CudaCopyOptions options;
        options.chunk_bytes = kChunk;
        options.page_bytes = kPageBytes;
        options.num_layers = 1;
        options.experts_per_layer = kExperts;
        options.pin_bytes = pin_bytes;
        options.pin_in_background = false;
        engine = std::make_unique<CudaCopyEngine>(context, source, nullptr, options);
    }
    ~Link() {
        fake_cuda_set_gate(1);
        if (engine) engine->stop();
        engine = nullptr;
        fake_cuda_clear_device_ranges();
    }
    std::byte* slot(int index) { return slots.data() + size_t(index) * kPageBytes; }
    bool holds(int index, int32_t expert) {
        return FakeSource::holds(slot(index), kPageBytes, 0, expert);
    }
    // Which slots were written, in the order of the copies; and the bytes of each copy.
    std::vector<int> order(std::vector<uint64_t>* sizes = nullptr) {
        std::vector<uintptr_t> to(4096);
        std::vector<uint64_t> nbytes(4096);
        const int count = fake_cuda_copies(to.data(), nbytes.data(), 4096);
        std::vector<int> slots_written;
        for (int i = 0; i < count; ++i)
            slots_written.push_back(
                int((to[size_t(i)] - reinterpret_cast<uintptr_t>(slots.data())) / kPageBytes));
        if (sizes) sizes->assign(nbytes.begin(), nbytes.begin() + count);
        return slots_written;
    }
};

struct Copy {
    std::promise<CopyResult> done, landed;
    std::shared_ptr<CopyJob> job = std::make_shared<CopyJob>();

    Copy(Link& link, int32_t expert, int slot, Priority priority) {
        job->expert = expert;
        job->slot = link.slot(slot);
        job->priority = priority;
        job->on_done = [this](const CopyResult& result) { done.set_value(result); };
        job->on_landed = [this](const CopyResult& result) { landed.set_value(result); };
    }
};

void a_pinned_demand_is_enqueued_at_once_in_one_copy_per_run() {
    Link link;
    Copy copy(link, 3, 1, Priority::kDemand);
    CHECK(link.engine->enqueue(copy.job));
    CHECK(copy.job->result.fence != nullptr);
    CHECK_EQ(copy.job->result.bytes, kPageBytes);
    const CopyResult result = copy.landed.get_future().get();
    CHECK(!result.error && result.fence->passed() && result.end_ns >= result.begin_ns);
    CHECK(link.holds(1, 3));
    CHECK_EQ(link.order().size(), 2u);  // two tensors
    CHECK_EQ(fake_cuda_counts().pageable_copies, 0);
    CHECK(copy.done.get_future().wait_for(std::chrono::milliseconds(0)) ==
          std::future_status::timeout);  // enqueue answered for it
}

void submitted_copies_report_when_enqueued_and_again_when_landed() {
    Link link;
    fake_cuda_set_gate(0);
    Copy copy(link, 2, 0, Priority::kDemand);
    link.engine->submit(copy.job);
    const CopyResult result = copy.done.get_future().get();
    CHECK(result.fence && !result.fence->passed());
    CHECK(!link.holds(0, 2));
    fake_cuda_set_gate(1);
    copy.landed.get_future().wait();
    CHECK(link.holds(0, 2));
}

// A demand behind a full prefetch queue waits for one chunk of prefetch at most.
void demand_waits_for_at_most_one_prefetch_chunk() {
    Link link;
    fake_cuda_set_gate(0);
    std::vector<std::unique_ptr<Copy>> ahead;
    for (int e = 0; e < 4; ++e) {
        ahead.push_back(std::make_unique<Copy>(link, e, e, Priority::kPrefetch));
        link.engine->submit(ahead.back()->job);
    }
    fake_cuda_wait_for_queued_copies(2);
    Copy demand(link, 7, 7, Priority::kDemand);
    CHECK(link.engine->enqueue(demand.job));
    fake_cuda_set_gate(1);
    for (const auto& copy : ahead) copy->landed.get_future().wait();
    std::vector<uint64_t> sizes;
    const std::vector<int> order = link.order(&sizes);
    uint64_t before = 0;
    bool demand_done = false;
    for (size_t i = 0; i < order.size(); ++i) {
        const bool last = std::find(order.begin() + long(i) + 1, order.end(), 7) == order.end();
        if (order[i] == 7 && last) demand_done = true;
        if (order[i] != 7 && !demand_done) before += sizes[i];
    }
    CHECK(before <= kChunk);
    for (int e = 0; e < 4; ++e) CHECK(link.holds(e, e));
    CHECK(link.holds(7, 7));
}

void a_promoted_prefetch_overtakes_and_its_fence_covers_both_parts() {
    Link link;
    fake_cuda_set_gate(0);
    Copy first(link, 0, 0, Priority::kPrefetch), second(link, 1, 1, Priority::kPrefetch);
    link.engine->submit(first.job);
    link.engine->submit(second.job);
    fake_cuda_wait_for_queued_copies(2);
    link.engine->promote(first.job);   // half of it may be on its way already
    link.engine->promote(second.job);  // nothing of it is
    const CopyResult a = first.done.get_future().get(), b = second.done.get_future().get();
    fake_cuda_set_delay(3, 500);
    fake_cuda_set_gate(1);
    while (!a.fence->passed()) std::this_thread::yield();
    CHECK(link.holds(0, 0));
    while (!b.fence->passed()) std::this_thread::yield();
    CHECK(link.holds(1, 1));
    link.engine->promote(second.job);  // no effect when done
    first.landed.get_future().wait(), second.landed.get_future().wait();
}

void cancelling_stops_between_chunks() {
    Link link;
    fake_cuda_set_gate(0);
    Copy running(link, 0, 0, Priority::kPrefetch), queued(link, 1, 1, Priority::kPrefetch);
    link.engine->submit(running.job);
    fake_cuda_wait_for_queued_copies(2);
    link.engine->submit(queued.job);
    CHECK(link.engine->cancel(queued.job) == CopyEngine::Cancelled::kGone);
    CHECK(link.engine->cancel(running.job) == CopyEngine::Cancelled::kWillReport);
    CHECK(link.engine->cancel(running.job) == CopyEngine::Cancelled::kTooLate);
    const CopyResult result = running.done.get_future().get();
    CHECK(result.cancelled && !result.error);
    CHECK(result.fence && !result.fence->passed());  // the chunks in flight still write the slot
    CHECK_EQ(result.bytes, kChunk);
    fake_cuda_set_gate(1);
    while (!result.fence->passed()) std::this_thread::yield();
    Copy demand(link, 2, 2, Priority::kDemand);
    CHECK(link.engine->enqueue(demand.job));
    CHECK(link.engine->cancel(demand.job) == CopyEngine::Cancelled::kTooLate);
    demand.landed.get_future().wait();
}

// The slot is being read: the copy is enqueued at once and starts behind the reader.
void copies_come_after_what_the_slot_is_used_for() {
    Link link;
    std::memset(link.slot(0), 42, kPageBytes);
    const uintptr_t stream = fake_cuda_create_stream();
    fake_cuda_launch_reader(stream, reinterpret_cast<uintptr_t>(link.slot(0)), kPageBytes, 42,
                            5000);
    for (const Priority priority : {Priority::kDemand, Priority::kPrefetch}) {
        Copy copy(link, 5, 0, priority);
        copy.job->after = {link.engine->record(stream), nullptr};
        link.engine->submit(copy.job);
        const CopyResult result = copy.done.get_future().get();
        link.engine->wait(stream, result.fence);
        fake_cuda_launch_reader(stream, reinterpret_cast<uintptr_t>(link.slot(0)), kPageBytes,
                                FakeSource::content(0, 5), 1000);
        copy.landed.get_future().wait();
    }
    fake_cuda_synchronize_stream(stream);
    CHECK_EQ(std::string(fake_cuda_last_misuse()), "");
    CHECK_EQ(fake_cuda_counts().misuses, 0);
    fake_cuda_destroy_stream(stream);
}

void what_cannot_be_pinned_is_staged_and_counted() {
    constexpr uint64_t kStaging = CudaCopyEngine::kNumStaging * CudaCopyEngine::kStagingBytes;
    struct Case {
        uint64_t limit;
        size_t budget;
        const char* words;
    };
    // The system allows the staging buffers and little more; then the budget does; then neither.
    for (const Case& c : {Case{kStaging + (256 << 10), SIZE_MAX, "refused"},
                          Case{UINT64_MAX, 256 << 10, "budget"}, Case{kStaging, 0, "budget"}}) {
        Link link(c.limit, c.budget);
        CHECK(link.engine->limit().find(c.words) != std::string::npos);
        std::vector<std::unique_ptr<Copy>> copies;
        for (int e = 0; e < kExperts; ++e) {
            copies.push_back(std::make_unique<Copy>(
                link, e, e, e % 2 ? Priority::kDemand : Priority::kPrefetch));
            link.engine->submit(copies.back()->job);
        }
        for (const auto& copy : copies) copy->landed.get_future().wait();
        for (int e = 0; e < kExperts; ++e) CHECK(link.holds(e, e));
        const auto stats = link.engine->stats();
        CHECK(stats.at("staged_bytes") > 0);
        CHECK_EQ(stats.at("copied_bytes"), kExperts * kPageBytes);
        CHECK_EQ(fake_cuda_counts().pageable_copies, 0);
    }
    CHECK_THROWS(DeviceError, "cannot pin 4194304 bytes of host memory for staging", Link(100));
}

void refused_copies_fail_their_job_and_nothing_else() {
    Link link;
    Copy bad(link, 1, 1, Priority::kDemand), good(link, 2, 2, Priority::kDemand);
    fake_cuda_fail("cuMemcpyHtoDAsync", 1, 0, 1);
    link.engine->submit(bad.job);
    const CopyResult result = bad.done.get_future().get();
    CHECK_THROWS(DeviceError, "cuMemcpyHtoDAsync failed with CUDA_ERROR_INVALID_VALUE",
                 std::rethrow_exception(result.error));
    link.engine->submit(good.job);
    CHECK(!good.done.get_future().get().error);
    good.landed.get_future().wait();
    Copy half(link, 3, 3, Priority::kPrefetch);  // the second half of a chunk is refused
    fake_cuda_fail("cuMemcpyHtoDAsync", 2, 1, 1);
    link.engine->submit(half.job);
    const CopyResult partial = half.done.get_future().get();
    CHECK(partial.error && partial.fence);  // what was enqueued still writes the slot
    Copy unknown(link, 99, 4, Priority::kDemand);
    link.engine->submit(unknown.job);
    CHECK_THROWS(std::invalid_argument, "no page for layer 0 expert 99",
                 std::rethrow_exception(unknown.done.get_future().get().error));
}

void a_lost_device_fails_what_was_landing_and_all_that_follows() {
    Link link;
    fake_cuda_set_gate(0);
    Copy landing(link, 1, 1, Priority::kDemand), later(link, 2, 2, Priority::kDemand);
    link.engine->submit(landing.job);
    landing.done.get_future().wait();
    fake_cuda_break(719);
    CHECK_THROWS(DeviceError, "CUDA_ERROR_LAUNCH_FAILED",
                 std::rethrow_exception(landing.landed.get_future().get().error));
    link.engine->submit(later.job);
    CHECK(later.done.get_future().get().error != nullptr);
    fake_cuda_set_gate(1);
    fake_cuda_break(0);  // so that what the engine registered can be given back
}

void stopping_waits_for_copies_and_readers_and_gives_everything_back() {
    const FakeCudaCounts before = fake_cuda_counts();
    {
        Link link;
        const uintptr_t stream = fake_cuda_create_stream();
        std::memset(link.slot(6), 42, kPageBytes);
        fake_cuda_launch_reader(stream, reinterpret_cast<uintptr_t>(link.slot(6)), kPageBytes, 42,
                                20000);
        link.engine->record(stream);
        Copy copies[] = {{link, 0, 0, Priority::kPrefetch}, {link, 1, 1, Priority::kDemand}};
        for (Copy& copy : copies) link.engine->enqueue(copy.job);
        link.engine->stop();
        link.engine->stop();
        CHECK(fake_cuda_counts().readers == 1);
        std::memset(link.slots.data(), 0, link.slots.size());  // nobody writes or reads it now
        Copy late(link, 2, 2, Priority::kDemand);
        CHECK(!link.engine->enqueue(late.job));  // dropped
        fake_cuda_destroy_stream(stream);
    }
    const FakeCudaCounts after = fake_cuda_counts();
    CHECK_EQ(after.misuses, 0);
    CHECK_EQ(after.streams, before.streams);
    CHECK_EQ(after.events, before.events);
    CHECK_EQ(after.registrations, before.registrations);
    CHECK_EQ(after.contexts, before.contexts);
}

// Pages from files pass through a bounded number of frames.
void pages_from_files_go_through_the_host_tier() {
    fake_cuda_reset();
    const auto source = std::make_shared<FakeSource>(kPageBytes, 4);
    const auto context = std::make_shared<CudaContext>(CudaDriver::load(FAKE_CUDA), 0);
    CudaCopyOptions options;
    options.chunk_bytes = kChunk;
    options.page_bytes = kPageBytes;
    options.num_layers = 1;
    options.experts_per_layer = kExperts;
    options.host_bytes = 4 * kPageBytes;
    CudaCopyEngine engine(context, source, std::make_unique<HostCopyEngine>(source, 2, 4096),
                          options);
    std::vector<std::byte> slots(kExperts * kPageBytes);
    fake_cuda_set_delay(5, 200);
    for (int round = 0; round < 3; ++round) {
        std::vector<std::shared_ptr<CopyJob>> jobs;
        std::vector<std::promise<void>> landed(kExperts);
        for (int e = 0; e < kExperts; ++e) {
            auto job = std::make_shared<CopyJob>();
            job->expert = e;
            job->slot = slots.data() + size_t(e) * kPageBytes;
            job->priority = e % 2 ? Priority::kDemand : Priority::kPrefetch;
            job->on_done = [](const CopyResult& result) { CHECK(!result.error); };
            job->on_landed = [&landed, e](const CopyResult&) { landed[size_t(e)].set_value(); };
            engine.enqueue(job);
            jobs.push_back(job);
        }
        for (auto& promise : landed) promise.get_future().wait();
        for (int e = 0; e < kExperts; ++e)
            CHECK(FakeSource::holds(slots.data() + size_t(e) * kPageBytes, kPageBytes, 0, e));
        std::memset(slots.data(), 0, slots.size());
    }
    const auto stats = engine.stats();
    CHECK_EQ(stats.at("host_bytes"), 4 * kPageBytes);
    CHECK_EQ(stats.at("host_hits") + stats.at("host_misses"), 3u * kExperts);
    CHECK(stats.at("host_evictions") > 0);
    options.host_bytes = 3 * kPageBytes;
    CHECK_THROWS(std::invalid_argument, "at least 4 frames, got 3",
                 CudaCopyEngine(context, source, std::make_unique<HostCopyEngine>(source, 1, 4096),
                                options));
}

}  // namespace

int main() {
    RUN(a_pinned_demand_is_enqueued_at_once_in_one_copy_per_run);
    RUN(submitted_copies_report_when_enqueued_and_again_when_landed);
    RUN(demand_waits_for_at_most_one_prefetch_chunk);
    RUN(a_promoted_prefetch_overtakes_and_its_fence_covers_both_parts);
    RUN(cancelling_stops_between_chunks);
    RUN(copies_come_after_what_the_slot_is_used_for);
    RUN(what_cannot_be_pinned_is_staged_and_counted);
    RUN(refused_copies_fail_their_job_and_nothing_else);
    RUN(a_lost_device_fails_what_was_landing_and_all_that_follows);
    RUN(stopping_waits_for_copies_and_readers_and_gives_everything_back);
    RUN(pages_from_files_go_through_the_host_tier);
}
