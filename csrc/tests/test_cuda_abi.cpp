// The declarations of cuda_driver.h against the driver's own header, where there is one: same
// number of parameters, same sizes, same kinds, under the name the header's macros choose.
#include <cuda.h>
#include <type_traits>

#include "check.h"
#include "paging/cuda_driver.h"

using namespace moe_offload;

namespace {

// Handles are pointers to unknown structs there and void* here; enumerations are int here.
template <typename T>
struct Plain {
    using type = std::conditional_t<std::is_enum_v<T>, int, T>;
};
template <typename T>
struct Plain<T*> {
    using type = std::conditional_t<std::is_class_v<T>, void*, typename Plain<T>::type*>;
};
template <typename T>
struct Plain<const T*> {
    using type = const typename Plain<T>::type*;
};
template <typename R, typename... A>
struct Plain<R (*)(A...)> {
    using type = typename Plain<R>::type (*)(typename Plain<A>::type...);
};

#define TEXT_OF(symbol) #symbol
#define NAME_OF(symbol) TEXT_OF(symbol)

void every_call_has_the_drivers_signature_and_name() {
#define CHECK_CALL(name, symbol, parameters) \
    static_assert(std::is_same_v<Plain<decltype(&symbol)>::type, decltype(CudaDriver::name)>);
    MOE_OFFLOAD_CUDA_CALLS(CHECK_CALL)
    // The macros of cuda.h turn the plain name into the version of today.
    CHECK_EQ(std::string(NAME_OF(cuMemcpyHtoDAsync)), "cuMemcpyHtoDAsync_v2");
    CHECK_EQ(std::string(NAME_OF(cuMemHostRegister)), "cuMemHostRegister_v2");
    CHECK_EQ(std::string(NAME_OF(cuStreamDestroy)), "cuStreamDestroy_v2");
    CHECK_EQ(std::string(NAME_OF(cuEventDestroy)), "cuEventDestroy_v2");
    CHECK_EQ(std::string(NAME_OF(cuCtxPushCurrent)), "cuCtxPushCurrent_v2");
    CHECK_EQ(std::string(NAME_OF(cuCtxPopCurrent)), "cuCtxPopCurrent_v2");
    CHECK_EQ(std::string(NAME_OF(cuDevicePrimaryCtxRelease)), "cuDevicePrimaryCtxRelease_v2");
    CHECK_EQ(std::string(NAME_OF(cuStreamWaitEvent)), "cuStreamWaitEvent");
    CHECK_EQ(std::string(NAME_OF(cuEventRecord)), "cuEventRecord");
}

void every_constant_has_the_drivers_value() {
    CHECK_EQ(cuda::kSuccess, int(CUDA_SUCCESS));
    CHECK_EQ(cuda::kOutOfMemory, int(CUDA_ERROR_OUT_OF_MEMORY));
    CHECK_EQ(cuda::kNotReady, int(CUDA_ERROR_NOT_READY));
    CHECK_EQ(cuda::kAlreadyRegistered, int(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED));
    CHECK_EQ(cuda::kStreamNonBlocking, unsigned(CU_STREAM_NON_BLOCKING));
    CHECK_EQ(cuda::kEventDisableTiming, unsigned(CU_EVENT_DISABLE_TIMING));
    CHECK_EQ(cuda::kRegisterPortable, unsigned(CU_MEMHOSTREGISTER_PORTABLE));
    CHECK_EQ(cuda::kCaptureModeRelaxed, int(CU_STREAM_CAPTURE_MODE_RELAXED));
    CHECK_EQ(cuda::kAttributeCapabilityMajor, int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR));
    CHECK_EQ(cuda::kAttributeCapabilityMinor, int(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR));
}

}  // namespace

int main() {
    RUN(every_call_has_the_drivers_signature_and_name);
    RUN(every_constant_has_the_drivers_value);
}
