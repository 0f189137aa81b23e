// How tests steer the fake driver and ask it what happened.
#include "fake_cuda.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "world.h"

using namespace fake_cuda;

// driver_calls.cpp
FAKE_CUDA_API Result cuStreamCreateWithPriority(void** handle, unsigned, int);
FAKE_CUDA_API Result cuStreamDestroy_v2(void* handle);

namespace {

bool all_bytes(uintptr_t from, uint64_t nbytes, int expected) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(from);
    return std::all_of(bytes, bytes + nbytes, [&](unsigned char byte) { return byte == expected; });
}

}  // namespace

FAKE_CUDA_API void fake_cuda_reset() {
    World& w = world();
    const Lock lock(w.mutex);
    w.failures.clear();
    w.broken = kSuccess;
    w.capturing = false;
    w.register_limit = UINT64_MAX;
    w.max_delay_us = 0;
    w.gate_open = true;
    w.num_devices = 1;
    w.major = 9, w.minor = 0;
    w.log.clear();
    w.device.clear();
    w.counts.misuses = w.counts.pageable_copies = w.counts.copies = w.counts.readers = 0;
    w.misuse.clear();
    w.changed.notify_all();
}
FAKE_CUDA_API void fake_cuda_set_num_devices(int count) {
    const Lock lock(world().mutex);
    world().num_devices = count;
}
FAKE_CUDA_API void fake_cuda_set_capability(int major, int minor) {
    const Lock lock(world().mutex);
    world().major = major, world().minor = minor;
}
FAKE_CUDA_API void fake_cuda_set_delay(uint64_t seed, int64_t max_us) {
    const Lock lock(world().mutex);
    world().random.seed(seed);
    world().max_delay_us = max_us;
}
FAKE_CUDA_API void fake_cuda_fail(const char* name, int error, int skip, int count) {
    const Lock lock(world().mutex);
    world().failures[name] = {error, skip, count};
}
FAKE_CUDA_API void fake_cuda_break(int error) {
    const Lock lock(world().mutex);
    world().broken = error;
}
FAKE_CUDA_API void fake_cuda_set_capturing(int capturing) {
    const Lock lock(world().mutex);
    world().capturing = capturing != 0;
}
FAKE_CUDA_API void fake_cuda_set_register_limit(uint64_t nbytes) {
    const Lock lock(world().mutex);
    world().register_limit = nbytes;
}
FAKE_CUDA_API void fake_cuda_set_gate(int open) {
    const Lock lock(world().mutex);
    world().gate_open = open != 0;
    world().changed.notify_all();
}
FAKE_CUDA_API void fake_cuda_wait_for_queued_copies(int count) {
    Lock lock(world().mutex);
    world().changed.wait(lock, [&] { return world().queued_copies >= count; });
}
FAKE_CUDA_API int fake_cuda_copies(uintptr_t* to, uint64_t* nbytes, int capacity) {
    const Lock lock(world().mutex);
    const auto& log = world().log;
    for (size_t i = 0; i < log.size() && i < static_cast<size_t>(capacity); ++i)
        to[i] = log[i].first, nbytes[i] = log[i].second;
    return static_cast<int>(log.size());
}
FAKE_CUDA_API void fake_cuda_add_device_range(uintptr_t begin, uint64_t nbytes) {
    const Lock lock(world().mutex);
    world().device.push_back({begin, begin + nbytes});
}
FAKE_CUDA_API void fake_cuda_clear_device_ranges() {
    const Lock lock(world().mutex);
    world().device.clear();
}
FAKE_CUDA_API int fake_cuda_launch_reader(uintptr_t handle, uintptr_t from, uint64_t nbytes,
                                          int expected, int64_t duration_us) {
    World& w = world();
    const Lock lock(w.mutex);
    Stream* stream = find_stream(w, reinterpret_cast<void*>(handle));
    if (stream == nullptr) return kInvalidHandle;
    push(w, stream, [=](Lock& held) {
        World& inner = world();
        const Range range{from, from + nbytes};
        if (any_meets(inner.writing, range)) misuse(inner, "a kernel read what was being copied");
        inner.reading.push_back(range);
        held.unlock();
        const bool before = all_bytes(from, nbytes, expected);
        std::this_thread::sleep_for(std::chrono::microseconds(duration_us));
        const bool after = all_bytes(from, nbytes, expected);
        held.lock();
        if (!before) misuse(inner, "a kernel read a page that had not arrived");
        if (before && !after) misuse(inner, "a page changed while a kernel read it");
        erase_one(inner.reading, range);
        ++inner.counts.readers;
    });
    return kSuccess;
}
FAKE_CUDA_API uintptr_t fake_cuda_create_stream() {
    contexts.push_back(&world());
    void* stream = nullptr;
    cuStreamCreateWithPriority(&stream, 0, 0);
    contexts.pop_back();
    return reinterpret_cast<uintptr_t>(stream);
}
FAKE_CUDA_API void fake_cuda_destroy_stream(uintptr_t stream) {
    contexts.push_back(&world());
    cuStreamDestroy_v2(reinterpret_cast<void*>(stream));
    contexts.pop_back();
}
FAKE_CUDA_API void fake_cuda_synchronize_stream(uintptr_t handle) {
    World& w = world();
    Lock lock(w.mutex);
    Stream* stream = find_stream(w, reinterpret_cast<void*>(handle));
    w.changed.wait(lock, [&] { return stream->queue.empty() && !stream->busy; });
}
FAKE_CUDA_API FakeCudaCounts fake_cuda_counts() {
    const Lock lock(world().mutex);
    return world().counts;
}
FAKE_CUDA_API const char* fake_cuda_last_misuse() {
    const Lock lock(world().mutex);
    return world().misuse.c_str();
}
