// The whole pager over the CUDA copy engine, on the fake driver: what compute streams read is
// always the page they asked for, whatever the order in which streams get on, and no slot is
// overwritten while a kernel reads it.
#include <algorithm>
#include <atomic>
#include <random>
#include <set>
#include <thread>

#include "check.h"
#include "fake_cuda/fake_cuda.h"
#include "fake_source.h"
#include "paging/cuda_copy_engine.h"
#include "paging/host_copy_engine.h"
#include "paging/memory_source.h"
#include "paging/pager.h"
#include "total_counters.h"

using namespace moe_offload;

namespace {

constexpr uint64_t kBytes = 4096;
constexpr size_t kStride = 4096;
constexpr int kLayers = 3, kExperts = 8;

struct Setup {
    size_t slots = 6;
    const char* policy = "lru";
    size_t frames = 0;  // 0: pages lie in memory; else files through a host tier of so many frames
    size_t pin_bytes = SIZE_MAX;
    size_t admit_limit = 0;
};

// A pager over a device, its slots, and compute streams whose kernels check what they read.
struct Pool {
    std::vector<std::byte> memory, slots;
    std::shared_ptr<FakeSource> files = std::make_shared<FakeSource>(kBytes, 4);
    std::shared_ptr<Pager> pager;

    explicit Pool(const Setup& setup) : slots(setup.slots * kStride) {
        fake_cuda_reset();
        fake_cuda_add_device_range(reinterpret_cast<uintptr_t>(slots.data()), slots.size());
        CudaCopyOptions copy;
        copy.chunk_bytes = 2048;  // four parts to a page
        copy.page_bytes = kBytes;
        copy.num_layers = kLayers;
        copy.experts_per_layer = kExperts;
        copy.host_bytes = setup.frames * 4096;
        copy.pin_bytes = setup.pin_bytes;
        copy.pin_in_background = setup.frames != 0;
        std::shared_ptr<PageSource> source = files;
        std::unique_ptr<CopyEngine> reader;
        if (setup.frames == 0) {
            memory.resize(kLayers * kExperts * kBytes);
            auto tensors = std::make_shared<MemorySource>();
            for (int page = 0; page < kLayers * kExperts; ++page) {
                std::byte* at = memory.data() + size_t(page) * kBytes;
                const int layer = page / kExperts, expert = page % kExperts;
                std::memset(at, FakeSource::content(layer, expert), kBytes);
                tensors->add_page(layer, expert,
                                  {{at, kBytes / 4, 0}, {at + kBytes / 4, kBytes * 3 / 4, 1024}});
            }
            source = tensors;
        } else {
            reader = std::make_unique<HostCopyEngine>(files, 2, 4096);
        }
        PagerOptions options;
        options.num_experts.assign(kLayers, kExperts);
        options.layer_names.assign(kLayers, "model.experts");
        options.slots = slots.data();
        options.num_slots = setup.slots;
        options.slot_stride = kStride;
        options.admit_limit = setup.admit_limit;
        options.wait_timeout_ns = 60'000'000'000;
        auto context = std::make_shared<CudaContext>(CudaDriver::load(FAKE_CUDA), 0);
        const PolicySetting setting{.num_experts = options.num_experts,
                                    .num_slots = setup.slots,
                                    .kept = {0, 8},
                                    .next_request = {}};
        pager = std::make_shared<Pager>(
            std::move(options), make_policy(setup.policy, setting),
            std::make_unique<CudaCopyEngine>(context, source, std::move(reader), copy));
    }
    ~Pool() {
        fake_cuda_set_gate(1);
        pager->close();
        fake_cuda_clear_device_ranges();
    }

    std::byte* slot(SlotIndex index) { return slots.data() + size_t(index) * kStride; }
    void launch(uintptr_t stream, SlotIndex index, int32_t layer, int32_t expert, int64_t us) {
        fake_cuda_launch_reader(stream, reinterpret_cast<uintptr_t>(slot(index)), kBytes,
                                FakeSource::content(layer, expert), us);
    }

    // One layer's forward on a stream: the host never waits for kernels or copies.
    void forward(uintptr_t stream, int32_t layer, const std::vector<int32_t>& experts,
                 int64_t kernel_us = 20) {
        const auto ticket = pager->acquire(layer, experts, {}, 0, stream);
        std::set<int32_t> seen;
        for (auto ready = ticket->next(); !ready.empty(); ready = ticket->next()) {
            std::vector<int32_t> indices;
            for (const auto& [index, slot] : ready) {
                CHECK(seen.insert(index).second);
                launch(stream, slot, layer, experts[size_t(index)], kernel_us);
                indices.push_back(index);
            }
            ticket->release(indices);
        }
        CHECK_EQ(seen.size(), experts.size());
    }

    LayerCounters total() const { return total_counters(*pager); }
};

void check_no_misuse() {
    CHECK_EQ(std::string(fake_cuda_last_misuse()), "");
    CHECK_EQ(fake_cuda_counts().misuses, 0);
}

std::vector<int32_t> random_experts(std::mt19937& random, unsigned one_in) {
    std::vector<int32_t> experts;
    for (int32_t e = 0; e < kExperts; ++e)
        if (random() % one_in == 0) experts.push_back(e);
    std::shuffle(experts.begin(), experts.end(), random);
    return experts;
}

void the_host_never_waits_for_copies() {
    Pool pool({.slots = 2});
    const uintptr_t stream = fake_cuda_create_stream();
    fake_cuda_set_gate(0);  // no copy lands during all of this
    for (int round = 0; round < 3; ++round)
        for (int32_t layer = 0; layer < kLayers; ++layer)
            pool.forward(stream, layer, {0, 1, 2, 3, 4, 5, 6, 7});
    CHECK_EQ(fake_cuda_counts().copies, 0);
    fake_cuda_set_gate(1);
    fake_cuda_synchronize_stream(stream);
    CHECK_EQ(fake_cuda_counts().readers, 3 * kLayers * kExperts);
    check_no_misuse();
    pool.pager->drain();
    fake_cuda_destroy_stream(stream);
}

void pages_that_have_landed_are_delivered_first_and_the_rest_a_few_at_a_time() {
    Pool pool({.slots = 24});
    const uintptr_t stream = fake_cuda_create_stream();
    pool.forward(stream, 0, {2, 5});
    pool.pager->drain();
    fake_cuda_set_gate(0);
    const std::vector<int32_t> experts{0, 1, 2, 3, 4, 5, 6, 7};
    const auto ticket = pool.pager->acquire(0, experts, {}, 0, stream);
    auto ready = ticket->next();
    CHECK_EQ(ready.size(), 2u);
    CHECK(ready[0].index == 2 && ready[1].index == 5);
    std::vector<size_t> batches;
    for (ready = ticket->next(); !ready.empty(); ready = ticket->next())
        batches.push_back(ready.size());
    CHECK_EQ(batches, (std::vector<size_t>{2, 1, 1, 1, 1}));
    fake_cuda_set_gate(1);
    fake_cuda_destroy_stream(stream);
}

void a_ticket_without_a_stream_gets_pages_that_have_landed() {
    for (const size_t frames : {size_t{0}, size_t{5}}) {
        Pool pool({.slots = 4, .frames = frames});
        fake_cuda_set_delay(1, 300);
        std::mt19937 random(3);
        for (int step = 0; step < 40; ++step) {
            const auto layer = int32_t(random() % kLayers);
            const std::vector<int32_t> experts = random_experts(random, 2);
            const auto ticket = pool.pager->acquire(layer, experts);
            size_t seen = 0;
            for (auto ready = ticket->next(); !ready.empty(); ready = ticket->next())
                for (const auto& [index, slot] : ready) {
                    CHECK(
                        FakeSource::holds(pool.slot(slot), kBytes, layer, experts[size_t(index)]));
                    const std::vector<int32_t> released{index};
                    ticket->release(released);
                    ++seen;
                }
            CHECK_EQ(seen, experts.size());
        }
    }
}

// The defect this guards against: forget the fences of a slot's readers, and the next page is
// copied over weights a kernel still multiplies with.
void a_slot_is_not_overwritten_while_a_slow_kernel_reads_it() {
    Pool pool({.slots = 2});
    const uintptr_t slow = fake_cuda_create_stream(), fast = fake_cuda_create_stream();
    for (int round = 0; round < 6; ++round) {
        pool.forward(slow, 0, {0, 1}, 3000);
        pool.forward(fast, 1, {2, 3}, 10);
        const auto closed_early = pool.pager->acquire(2, std::vector<int32_t>{4}, {}, 0, slow);
        for (const auto& [index, slot] : closed_early->next()) pool.launch(slow, slot, 2, 4, 2000);
        closed_early->close();  // without release: the kernel is enqueued all the same
    }
    fake_cuda_synchronize_stream(slow);
    fake_cuda_synchronize_stream(fast);
    check_no_misuse();
    fake_cuda_destroy_stream(slow);
    fake_cuda_destroy_stream(fast);
}

void a_copy_that_is_refused_reaches_the_waiter_and_harms_nobody() {
    Pool pool({.slots = 4});
    const uintptr_t stream = fake_cuda_create_stream();
    pool.forward(stream, 0, {1});
    fake_cuda_fail("cuMemcpyHtoDAsync", 1, 1, 1);
    CHECK_THROWS(PageReadError,
                 "reading layer 1 (model.experts) expert 5: cuMemcpyHtoDAsync failed",
                 pool.forward(stream, 1, {5}));
    pool.forward(stream, 1, {5});
    pool.forward(stream, 0, {1, 2, 3});
    fake_cuda_synchronize_stream(stream);
    check_no_misuse();
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    fake_cuda_destroy_stream(stream);
}

// Somebody else captures a CUDA graph meanwhile: our calls, on whatever thread, must not notice.
void another_threads_graph_capture_is_not_disturbed() {
    Pool pool({.slots = 4, .frames = 6});
    const uintptr_t stream = fake_cuda_create_stream();
    fake_cuda_set_capturing(1);
    for (int32_t layer = 0; layer < kLayers; ++layer) pool.forward(stream, layer, {0, 1, 2, 3, 4});
    pool.pager->drain();
    fake_cuda_set_capturing(0);
    fake_cuda_synchronize_stream(stream);
    check_no_misuse();
    fake_cuda_destroy_stream(stream);
}

// The same requests, the same decisions: neither the device's pace nor the number of frames counts.
void decisions_do_not_depend_on_timing() {
    std::vector<LayerCounters> reference;
    for (const int variant : {0, 1, 2, 3}) {
        Pool pool({.slots = 7, .frames = variant == 3 ? size_t{9} : size_t{0}});
        const uintptr_t stream = fake_cuda_create_stream();
        fake_cuda_set_delay(uint64_t(variant), variant == 0 ? 0 : 100 * variant);
        std::mt19937 random(17);
        for (int step = 0; step < 60; ++step)
            pool.forward(stream, int32_t(random() % kLayers),
                         random_experts(random, 1 + random() % 4), 5);
        fake_cuda_synchronize_stream(stream);
        check_no_misuse();
        auto counters = pool.pager->counters();
        for (LayerCounters& layer : counters)
            layer.stall_ns = layer.overlap_ns = layer.disk_bytes = 0;
        if (variant == 0) reference = counters;
        CHECK(std::memcmp(counters.data(), reference.data(),
                          counters.size() * sizeof(LayerCounters)) == 0);
        fake_cuda_destroy_stream(stream);
    }
}

// Random acquires, prefetches, cancels and failures from several threads, each with its own stream,
// under random delays. Every kernel checks its page at its start and at its end.
void random_requests(const Setup& setup, int threads, int steps, bool failing, uint64_t seed) {
    Pool pool(setup);
    fake_cuda_set_delay(seed, 60);
    if (failing) pool.pager->set_chaos({seed, 20, true, 0.05}, 0.05);
    std::atomic<int> failures = 0;
    std::vector<std::thread> workers;
    for (int worker = 0; worker < threads; ++worker)
        workers.emplace_back([&, worker] {
            std::mt19937 random(unsigned(worker) * 7919u + unsigned(seed));
            const uintptr_t stream = fake_cuda_create_stream();
            for (int step = 0; step < steps; ++step) {
                const auto layer = int32_t(random() % kLayers);
                const std::vector<int32_t> experts = random_experts(random, 3);
                try {
                    if (random() % 3 == 0)
                        pool.pager->prefetch(int32_t(random() % kLayers),
                                             random_experts(random, 3));
                    if (random() % 16 == 0)
                        pool.pager->cancel_prefetches(int32_t(random() % 4) - 1);
                    if (random() % 8 == 0) {  // an exception between acquire and release
                        const auto ticket = pool.pager->acquire(layer, experts, {}, 0, stream);
                        if (random() % 2 == 0)
                            for (const auto& [index, slot] : ticket->next())
                                pool.launch(stream, slot, layer, experts[size_t(index)], 40);
                    } else {
                        pool.forward(stream, layer, experts, int64_t(random() % 80));
                    }
                    // As a layer does when it reads the routed ids; not always, to run ahead.
                    if (random() % 4 == 0) fake_cuda_synchronize_stream(stream);
                } catch (const PageReadError&) {
                    ++failures;
                }
            }
            fake_cuda_synchronize_stream(stream);
            fake_cuda_destroy_stream(stream);
        });
    for (std::thread& worker : workers) worker.join();
    pool.pager->set_chaos({}, 0.0);
    pool.pager->drain();
    check_no_misuse();
    CHECK_EQ(pool.pager->num_live_tickets(), 0u);
    CHECK(failing || failures == 0);
    CHECK_EQ(fake_cuda_counts().pageable_copies, 0);
    std::set<SlotIndex> used;
    for (const auto& [layer, expert, slot] : pool.pager->residents()) {
        CHECK(used.insert(slot).second);
        CHECK(FakeSource::holds(pool.slot(slot), kBytes, layer, expert));
    }
    const LayerCounters sum = pool.total();
    CHECK_EQ(sum.lookups, sum.hits + sum.joined_prefetches + sum.demand_misses);
}

void random_requests_on_several_streams() {
    uint64_t seed = 1;
    for (const char* policy : {"lru", "lfu", "static"})
        for (const size_t slots : {4u, 9u})
            for (const size_t frames : {size_t{0}, size_t{6}})
                for (const bool failing : {false, true})
                    random_requests({.slots = slots, .policy = policy, .frames = frames}, 3, 25,
                                    failing, ++seed);
    random_requests({.slots = 2}, 4, 30, false, ++seed);
    random_requests({.slots = 5, .frames = 4}, 1, 80, true, ++seed);
    random_requests({.slots = 5, .pin_bytes = 20'000}, 2, 40, false, ++seed);
    random_requests({.slots = 5, .frames = 8, .pin_bytes = 0}, 2, 30, false, ++seed);
}

}  // namespace

int main() {
    RUN(the_host_never_waits_for_copies);
    RUN(pages_that_have_landed_are_delivered_first_and_the_rest_a_few_at_a_time);
    RUN(a_ticket_without_a_stream_gets_pages_that_have_landed);
    RUN(a_slot_is_not_overwritten_while_a_slow_kernel_reads_it);
    RUN(a_copy_that_is_refused_reaches_the_waiter_and_harms_nobody);
    RUN(another_threads_graph_capture_is_not_disturbed);
    RUN(decisions_do_not_depend_on_timing);
    RUN(random_requests_on_several_streams);
}
