// The CUDA driver calls that paging needs, found in libcuda.so.1 at run time.
//
// No toolkit and no CUDA header is needed to build this, and a machine without a driver loads the
// module all the same: only CudaDriver::load can fail. The declarations below are the driver's
// ABI under its versioned names, as the macros of cuda.h choose them (a test compares each with
// cuda.h where there is one). Every call goes through check(): an error names the call, the
// driver's own name for it, and the sizes involved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "errors.h"

namespace moe_offload {

namespace cuda {
using Result = int;                    // CUresult
using Device = int;                    // CUdevice
using Context = void*;                 // CUcontext
using Stream = void*;                  // CUstream; null is the legacy default stream
using Event = void*;                   // CUevent
using DevicePtr = unsigned long long;  // CUdeviceptr
using HostFunction = void (*)(void*);  // CUhostFn

constexpr Result kSuccess = 0;
constexpr Result kOutOfMemory = 2;
constexpr Result kNotReady = 600;
constexpr Result kAlreadyRegistered = 712;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kRegisterPortable = 1;
constexpr int kCaptureModeRelaxed = 2;
constexpr int kAttributeCapabilityMajor = 75;
constexpr int kAttributeCapabilityMinor = 76;
}  // namespace cuda

// call(name in CudaDriver, exported symbol, parameters)
// clang-format off
#define MOE_OFFLOAD_CUDA_CALLS(call)                                                               \
    call(init, cuInit, (unsigned flags))                                                           \
    call(driver_get_version, cuDriverGetVersion, (int* version))                                   \
    call(get_error_name, cuGetErrorName, (cuda::Result error, const char** text))                  \
    call(get_error_string, cuGetErrorString, (cuda::Result error, const char** text))              \
    call(device_get_count, cuDeviceGetCount, (int* count))                                         \
    call(device_get, cuDeviceGet, (cuda::Device* device, int ordinal))                             \
    call(device_get_name, cuDeviceGetName, (char* name, int length, cuda::Device device))          \
    call(device_get_attribute, cuDeviceGetAttribute, (int* value, int which, cuda::Device device)) \
    call(primary_ctx_retain, cuDevicePrimaryCtxRetain, (cuda::Context* context, cuda::Device))     \
    call(primary_ctx_release, cuDevicePrimaryCtxRelease_v2, (cuda::Device device))                 \
    call(ctx_push_current, cuCtxPushCurrent_v2, (cuda::Context context))                           \
    call(ctx_pop_current, cuCtxPopCurrent_v2, (cuda::Context* context))                            \
    call(thread_exchange_capture_mode, cuThreadExchangeStreamCaptureMode, (int* mode))             \
    call(stream_create, cuStreamCreateWithPriority, (cuda::Stream* stream, unsigned flags, int))   \
    call(stream_destroy, cuStreamDestroy_v2, (cuda::Stream stream))                                \
    call(stream_wait_event, cuStreamWaitEvent, (cuda::Stream stream, cuda::Event event, unsigned)) \
    call(event_create, cuEventCreate, (cuda::Event* event, unsigned flags))                        \
    call(event_destroy, cuEventDestroy_v2, (cuda::Event event))                                    \
    call(event_record, cuEventRecord, (cuda::Event event, cuda::Stream stream))                    \
    call(event_query, cuEventQuery, (cuda::Event event))                                           \
    call(memcpy_htod_async, cuMemcpyHtoDAsync_v2,                                                  \
         (cuda::DevicePtr to, const void* from, size_t nbytes, cuda::Stream stream))               \
    call(mem_host_register, cuMemHostRegister_v2, (void* address, size_t nbytes, unsigned flags))  \
    call(mem_host_unregister, cuMemHostUnregister, (void* address))
// clang-format on

// Thread safe: immutable after load.
class CudaDriver {
  public:
    // Throws DeviceError when the library or one of the calls is missing, or cuInit fails.
    static std::shared_ptr<const CudaDriver> load(const std::string& library);

    struct DeviceInfo {
        std::string name;
        int capability_major = 0, capability_minor = 0;
    };
    int version() const;  // 13000 for CUDA 13.0
    int num_devices() const;
    // Throws DeviceError for an ordinal out of range, naming what there is.
    DeviceInfo device(int ordinal) const;

    // Throws DeviceError unless the result is success; `what` is added to the message.
    void check(cuda::Result result, const char* call, const std::string& what) const;

#define MOE_OFFLOAD_MEMBER(name, symbol, parameters) cuda::Result(*name) parameters = nullptr;
    MOE_OFFLOAD_CUDA_CALLS(MOE_OFFLOAD_MEMBER)
#undef MOE_OFFLOAD_MEMBER

  private:
    CudaDriver() = default;
    std::string library_;
};

// The primary context of one device, the one torch and the CUDA runtime use. Held while it lives.
class CudaContext {
  public:
    CudaContext(std::shared_ptr<const CudaDriver> driver, int ordinal);
    ~CudaContext();
    CudaContext(const CudaContext&) = delete;
    CudaContext& operator=(const CudaContext&) = delete;

    const CudaDriver& driver() const { return *driver_; }
    int ordinal() const { return ordinal_; }

    // Makes the context current on this thread for a scope, and puts back what was before. While a
    // CUDA graph is being captured anywhere in the process, our calls neither fail nor end that
    // capture: the thread's capture mode is relaxed for the scope.
    class Current {
      public:
        explicit Current(const CudaContext& context);
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

      private:
        const CudaDriver& driver_;
        int capture_mode_ = cuda::kCaptureModeRelaxed;
    };

  private:
    const std::shared_ptr<const CudaDriver> driver_;
    const int ordinal_;
    cuda::Device device_ = 0;
    cuda::Context context_ = nullptr;
};

}  // namespace moe_offload
