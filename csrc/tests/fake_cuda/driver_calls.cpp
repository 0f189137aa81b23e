// A libcuda.so.1 without a GPU: the driver calls that paging uses, with their ordering.
//
// A stream is a thread that runs its operations in order; one engine copies to the device, one copy
// at a time; events hold back streams by the record they had when the wait was enqueued. Device
// memory is host memory. What the real driver forbids is an error here (no current context, a copy
// that spans two registrations, memory registered twice), and what it would silently corrupt is
// counted as misuse: a copy into memory that a kernel reads, a kernel that reads what has not
// arrived. A copy from memory that is not registered is synchronous, as on the device.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <utility>

#include "world.h"

using namespace fake_cuda;

namespace {

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

}  // namespace

#define ENTER(name, ...) \
    World& w = world();  \
    Lock lock(w.mutex);  \
    if (const Result entered = enter(w, name __VA_OPT__(, ) __VA_ARGS__)) return entered

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
    *handle = start_stream(w).get();
    ++w.counts.streams;
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
