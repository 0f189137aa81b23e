// A libcuda.so.1 without a GPU: the driver calls that paging uses, with their ordering.
//
// A stream is a thread that runs its operations in order; one engine copies to the device, one copy
// at a time; events hold back streams by the record they had when the wait was enqueued. Device
// memory is host memory. What the real driver forbids is an error here (no current context, a copy
// that spans two registrations, memory registered twice), and what it would silently corrupt is
// counted as misuse: a copy into memory that a kernel reads, a kernel that reads what has not
// arrived. A copy from memory that is not registered is synchronous, as on the device.
#include "fake_cuda.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Result = int;
constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNoDevice = 100;
constexpr Result kInvalidDevice = 101, kInvalidContext = 201, kInvalidHandle = 400;
constexpr Result kCaptureUnsupported = 900;
constexpr Result kNotReady = 600, kAlreadyRegistered = 712, kNotRegistered = 713;

struct Range {
    uintptr_t begin, end;
    bool meets(const Range& other) const { return begin < other.end && other.begin < end; }
};

struct Event {
    uint64_t recorded = 0, completed = 0;  // number of the last record, enqueued and reached
};

struct Stream {
    std::deque<std::function<void(std::unique_lock<std::mutex>&)>> queue;
    bool busy = false, destroyed = false;
};

struct Failure {
    Result error;
    int skip, count;
};

struct World {
    std::mutex mutex;
    std::condition_variable changed;
    int num_devices = 1, major = 9, minor = 0;
    std::map<Stream*, std::shared_ptr<Stream>> streams;
    std::map<Event*, std::shared_ptr<Event>> events;
    std::map<uintptr_t, uintptr_t> registered;
    std::vector<Range> device, reading, writing;
    std::map<std::string, Failure> failures;
    Result broken = kSuccess;
    bool capturing = false;
    uint64_t register_limit = UINT64_MAX;
    std::mt19937_64 random;
    int64_t max_delay_us = 0;
    bool gate_open = true, copying = false;
    int queued_copies = 0;
    std::vector<std::pair<uintptr_t, uint64_t>> log;
    FakeCudaCounts counts{};
    std::string misuse;
};

// Never destroyed: stream threads outlive main.
World& world() {
    static World* const world = new World;
    return *world;
}

thread_local std::vector<void*> contexts;
thread_local int capture_mode = 0;  // global: any thread's capture forbids unsafe calls

using Lock = std::unique_lock<std::mutex>;

void misuse(World& w, const std::string& what) {
    ++w.counts.misuses;
    w.misuse = what;
}

// Called with the lock held at the start of a call.
Result enter(World& w, const char* name, bool needs_context = true) {
    if (const auto found = w.failures.find(name); found != w.failures.end()) {
        Failure& failure = found->second;
        if (failure.skip > 0)
            --failure.skip;
        else if (failure.count-- > 0)
            return failure.error;
    }
    if (needs_context && contexts.empty()) return kInvalidContext;
    if (needs_context && w.capturing && capture_mode != 2) return kCaptureUnsupported;
    if (needs_context && w.broken != kSuccess) return w.broken;
    return kSuccess;
}

void run_stream(std::shared_ptr<Stream> stream) {
    World& w = world();
    Lock lock(w.mutex);
    while (true) {
        w.changed.wait(lock, [&] { return !stream->queue.empty() || stream->destroyed; });
        if (stream->queue.empty()) return;
        const auto operation = std::move(stream->queue.front());
        stream->queue.pop_front();
        stream->busy = true;
        if (w.max_delay_us > 0) {
            const auto delay = std::uniform_int_distribution<int64_t>(0, w.max_delay_us)(w.random);
            lock.unlock();
            std::this_thread::sleep_for(std::chrono::microseconds(delay));
            lock.lock();
        }
        operation(lock);
        stream->busy = false;
        w.changed.notify_all();
    }
}

// With the lock held. Null is the legacy default stream.
Stream* find_stream(World& w, void* handle) {
    static Stream* default_stream = nullptr;
    if (handle == nullptr) {
        if (default_stream == nullptr) {
            auto stream = std::make_shared<Stream>();
            default_stream = stream.get();
            w.streams[default_stream] = stream;
            std::thread(run_stream, stream).detach();
        }
        return default_stream;
    }
    const auto found = w.streams.find(static_cast<Stream*>(handle));
    return found == w.streams.end() ? nullptr : found->second.get();
}

void push(World& w, Stream* stream, std::function<void(Lock&)> operation) {
    stream->queue.push_back(std::move(operation));
    w.changed.notify_all();
}

bool any_meets(const std::vector<Range>& ranges, const Range& range) {
    return std::any_of(ranges.begin(), ranges.end(),
                       [&](const Range& other) { return other.meets(range); });
}

void erase_one(std::vector<Range>& ranges, const Range& range) {
    ranges.erase(std::find_if(ranges.begin(), ranges.end(), [&](const Range& other) {
        return other.begin == range.begin && other.end == range.end;
    }));
}

void copy(Lock& lock, uintptr_t to, uintptr_t from, size_t nbytes) {
    World& w = world();
    w.changed.wait(lock, [&] { return w.gate_open && !w.copying; });
    const Range range{to, to + nbytes};
    if (any_meets(w.reading, range)) misuse(w, "a copy wrote what a kernel was reading");
    w.copying = true;
    w.writing.push_back(range);
    lock.unlock();
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), nbytes);
    lock.lock();
    erase_one(w.writing, range);
    w.copying = false;
    --w.queued_copies;
    ++w.counts.copies;
    w.log.emplace_back(to, nbytes);
    w.changed.notify_all();
}

bool all_bytes(uintptr_t from, uint64_t nbytes, int expected) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(from);
    return std::all_of(bytes, bytes + nbytes, [&](unsigned char byte) { return byte == expected; });
}

}  // namespace

#define ENTER(name, ...) \
    World& w = world();  \
    Lock lock(w.mutex);  \
    if (const Result entered = enter(w, name __VA_OPT__(, ) __VA_ARGS__)) return entered

// ---- the driver's calls ----------------------------------------------------------------------

FAKE_CUDA_API Result cuInit(unsigned) {
    ENTER("cuInit", false);
    return w.num_devices > 0 ? kSuccess : kNoDevice;
}
FAKE_CUDA_API Result cuDriverGetVersion(int* version) {
    *version = 13000;
    return kSuccess;
}
FAKE_CUDA_API Result cuGetErrorName(Result error, const char** text) {
    static const std::map<Result, const char*> names{
        {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},
        {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
        {kNoDevice, "CUDA_ERROR_NO_DEVICE"},
        {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE"},
        {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"},
        {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},
        {719, "CUDA_ERROR_LAUNCH_FAILED"}};
    const auto found = names.find(error);
    *text = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : kSuccess;
}
FAKE_CUDA_API Result cuGetErrorString(Result, const char** text) {
    *text = "as the fake driver was told";
    return kSuccess;
}
FAKE_CUDA_API Result cuDeviceGetCount(int* count) {
    ENTER("cuDeviceGetCount", false);
    *count = w.num_devices;
    return kSuccess;
}
FAKE_CUDA_API Result cuDeviceGet(int* device, int ordinal) {
    ENTER("cuDeviceGet", false);
    *device = ordinal;
    return ordinal < w.num_devices ? kSuccess : kInvalidDevice;
}
FAKE_CUDA_API Result cuDeviceGetName(char* name, int length, int) {
    std::strncpy(name, "Fake GPU", static_cast<size_t>(length));
    return kSuccess;
}
FAKE_CUDA_API Result cuDeviceGetAttribute(int* value, int attribute, int) {
    ENTER("cuDeviceGetAttribute", false);
    *value = attribute == 75 ? w.major : w.minor;
    return kSuccess;
}
FAKE_CUDA_API Result cuDevicePrimaryCtxRetain(void** context, int) {
    ENTER("cuDevicePrimaryCtxRetain", false);
    ++w.counts.contexts;
    *context = &w;
    return kSuccess;
}
FAKE_CUDA_API Result cuDevicePrimaryCtxRelease_v2(int) {
    ENTER("cuDevicePrimaryCtxRelease", false);
    --w.counts.contexts;
    return kSuccess;
}
FAKE_CUDA_API Result cuCtxPushCurrent_v2(void* context) {
    ENTER("cuCtxPushCurrent", false);
    if (context != &w) return kInvalidContext;
    contexts.push_back(context);
    return kSuccess;
}
FAKE_CUDA_API Result cuCtxPopCurrent_v2(void** context) {
    if (contexts.empty()) return kInvalidContext;
    *context = contexts.back();
    contexts.pop_back();
    return kSuccess;
}
FAKE_CUDA_API Result cuThreadExchangeStreamCaptureMode(int* mode) {
    std::swap(capture_mode, *mode);
    return kSuccess;
}
FAKE_CUDA_API Result cuStreamCreateWithPriority(void** handle, unsigned, int) {
    ENTER("cuStreamCreate");
    auto stream = std::make_shared<Stream>();
    *handle = stream.get();
    w.streams[stream.get()] = stream;
    ++w.counts.streams;
    std::thread(run_stream, stream).detach();
    return kSuccess;
}
FAKE_CUDA_API Result cuStreamDestroy_v2(void* handle) {
    ENTER("cuStreamDestroy");
    Stream* stream = find_stream(w, handle);
    if (stream == nullptr || handle == nullptr) return kInvalidHandle;
    stream->destroyed = true;  // what is enqueued still runs
    w.streams.erase(stream);
    --w.counts.streams;
    w.changed.notify_all();
    return kSuccess;
}
FAKE_CUDA_API Result cuStreamWaitEvent(void* handle, void* event_handle, unsigned) {
    ENTER("cuStreamWaitEvent");
    Stream* stream = find_stream(w, handle);
    const auto found = w.events.find(static_cast<Event*>(event_handle));
    if (stream == nullptr || found == w.events.end()) return kInvalidHandle;
    push(w, stream, [event = found->second, number = found->second->recorded](Lock& held) {
        world().changed.wait(held, [&] { return event->completed >= number; });
    });
    return kSuccess;
}
FAKE_CUDA_API Result cuEventCreate(void** handle, unsigned) {
    ENTER("cuEventCreate");
    auto event = std::make_shared<Event>();
    *handle = event.get();
    w.events[event.get()] = event;
    ++w.counts.events;
    return kSuccess;
}
FAKE_CUDA_API Result cuEventDestroy_v2(void* handle) {
    ENTER("cuEventDestroy");
    if (w.events.erase(static_cast<Event*>(handle)) == 0) return kInvalidHandle;
    --w.counts.events;
    return kSuccess;
}
FAKE_CUDA_API Result cuEventRecord(void* handle, void* stream_handle) {
    ENTER("cuEventRecord");
    Stream* stream = find_stream(w, stream_handle);
    const auto found = w.events.find(static_cast<Event*>(handle));
    if (stream == nullptr || found == w.events.end()) return kInvalidHandle;
    const uint64_t number = ++found->second->recorded;
    push(w, stream, [event = found->second, number](Lock&) {
        event->completed = std::max(event->completed, number);
    });
    return kSuccess;
}
FAKE_CUDA_API Result cuEventQuery(void* handle) {
    ENTER("cuEventQuery");
    const auto found = w.events.find(static_cast<Event*>(handle));
    if (found == w.events.end()) return kInvalidHandle;
    return found->second->completed >= found->second->recorded ? kSuccess : kNotReady;
}
FAKE_CUDA_API Result cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, size_t nbytes,
                                          void* handle) {
    ENTER("cuMemcpyHtoDAsync");
    Stream* stream = find_stream(w, handle);
    if (stream == nullptr) return kInvalidHandle;
    if (nbytes == 0) return kSuccess;
    const auto source = reinterpret_cast<uintptr_t>(from);
    const bool known = std::any_of(w.device.begin(), w.device.end(), [&](const Range& range) {
        return range.begin <= to && to + nbytes <= range.end;
    });
    if (!known && !w.device.empty()) return kInvalidValue;
    bool touched = false, inside = false;
    for (const auto& [begin, end] : w.registered) {
        touched |= Range{begin, end}.meets({source, source + nbytes});
        inside |= begin <= source && source + nbytes <= end;
    }
    if (touched && !inside) return kInvalidValue;  // spans the edge of a registration
    ++w.queued_copies;
    auto finished = std::make_shared<bool>(false);
    push(w, stream, [=](Lock& held) {
        copy(held, to, source, nbytes);
        *finished = true;
    });
    if (!inside) {
        ++w.counts.pageable_copies;
        w.changed.wait(lock, [&] { return *finished; });
    }
    return kSuccess;
}
FAKE_CUDA_API Result cuMemHostRegister_v2(void* address, size_t nbytes, unsigned) {
    ENTER("cuMemHostRegister");
    const auto begin = reinterpret_cast<uintptr_t>(address);
    if (begin == 0 || nbytes == 0) return kInvalidValue;
    for (const auto& [other_begin, other_end] : w.registered)
        if (Range{other_begin, other_end}.meets({begin, begin + nbytes})) return kAlreadyRegistered;
    if (static_cast<uint64_t>(w.counts.registered_bytes) + nbytes > w.register_limit)
        return kOutOfMemory;
    w.registered[begin] = begin + nbytes;
    ++w.counts.registrations;
    w.counts.registered_bytes += static_cast<int64_t>(nbytes);
    return kSuccess;
}
FAKE_CUDA_API Result cuMemHostUnregister(void* address) {
    ENTER("cuMemHostUnregister");
    const auto found = w.registered.find(reinterpret_cast<uintptr_t>(address));
    if (found == w.registered.end()) return kNotRegistered;
    w.counts.registered_bytes -= static_cast<int64_t>(found->second - found->first);
    --w.counts.registrations;
    w.registered.erase(found);
    return kSuccess;
}

// ---- steering --------------------------------------------------------------------------------

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
