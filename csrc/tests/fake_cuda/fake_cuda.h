// Steering and inspecting the fake driver; the driver's own calls are declared in cuda_driver.h.
// Plain C, so that Python can call it through ctypes.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GNUC__)
#define FAKE_CUDA_API extern "C" __attribute__((visibility("default")))
#else
#define FAKE_CUDA_API extern "C"
#endif

// Forgets failures, delays, logs and counts, opens the gate. Streams and registrations stay.
FAKE_CUDA_API void fake_cuda_reset();
FAKE_CUDA_API void fake_cuda_set_num_devices(int count);
FAKE_CUDA_API void fake_cuda_set_capability(int major, int minor);
// Every operation first sleeps a random time up to max_us, so streams overtake each other.
FAKE_CUDA_API void fake_cuda_set_delay(uint64_t seed, int64_t max_us);
// The next calls of `name`, after `skip` good ones, return `error`; `count` of them.
FAKE_CUDA_API void fake_cuda_fail(const char* name, int error, int skip, int count);
// The device is lost: every call that touches it returns `error` from now on; 0 mends it.
FAKE_CUDA_API void fake_cuda_break(int error);
// Some thread captures a CUDA graph in the default mode: calls fail on every thread that has not
// relaxed its own mode.
FAKE_CUDA_API void fake_cuda_set_capturing(int capturing);
// Registering beyond this many bytes is out of memory.
FAKE_CUDA_API void fake_cuda_set_register_limit(uint64_t nbytes);
// While closed, the one engine that copies to the device does not start a copy.
FAKE_CUDA_API void fake_cuda_set_gate(int open);
// Copies that were enqueued and have not run. Waits until there are at least `count` of them.
FAKE_CUDA_API void fake_cuda_wait_for_queued_copies(int count);
// Destinations and sizes of the copies that ran, in the order they ran; returns how many.
FAKE_CUDA_API int fake_cuda_copies(uintptr_t* to, uint64_t* nbytes, int capacity);
// Copies to anywhere else are invalid, once a range was given.
FAKE_CUDA_API void fake_cuda_add_device_range(uintptr_t begin, uint64_t nbytes);
FAKE_CUDA_API void fake_cuda_clear_device_ranges();

// A kernel that reads [nbytes] for some time: all bytes must be `expected` at its start and at its
// end, and no copy may write any of them in between. What goes wrong counts as misuse.
FAKE_CUDA_API int fake_cuda_launch_reader(uintptr_t stream, uintptr_t from, uint64_t nbytes,
                                          int expected, int64_t duration_us);
FAKE_CUDA_API uintptr_t fake_cuda_create_stream();
FAKE_CUDA_API void fake_cuda_destroy_stream(uintptr_t stream);
FAKE_CUDA_API void fake_cuda_synchronize_stream(uintptr_t stream);

struct FakeCudaCounts {
    int64_t misuses;          // see last_misuse
    int64_t pageable_copies;  // from memory that was not registered, hence synchronous
    int64_t copies, readers;
    int64_t contexts, streams, events, registrations;  // that exist now
    int64_t registered_bytes;
};
FAKE_CUDA_API FakeCudaCounts fake_cuda_counts();
FAKE_CUDA_API const char* fake_cuda_last_misuse();
