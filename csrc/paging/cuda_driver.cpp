#include "cuda_driver.h"

#include <dlfcn.h>
#include <utility>

namespace moe_offload {

std::shared_ptr<const CudaDriver> CudaDriver::load(const std::string& library) {
    // Never closed: the driver keeps threads and thread-local state of its own.
    void* handle = ::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr)
        throw DeviceError("CUDA driver: cannot load " + library + " (" + ::dlerror() +
                          "). Install NVIDIA's driver, or use device=\"cpu\".");
    std::shared_ptr<CudaDriver> driver(new CudaDriver);
    driver->library_ = library;
#define MOE_OFFLOAD_FIND(name, symbol, parameters)                                         \
    driver->name = reinterpret_cast<cuda::Result(*) parameters>(::dlsym(handle, #symbol)); \
    if (driver->name == nullptr)                                                           \
        throw DeviceError("CUDA driver: " + library +                                      \
                          " has no " #symbol "; it needs a driver for CUDA 11 or newer.");
    MOE_OFFLOAD_CUDA_CALLS(MOE_OFFLOAD_FIND)
#undef MOE_OFFLOAD_FIND
    driver->check(driver->init(0), "cuInit", "is there a GPU, and may this process use it?");
    return driver;
}

void CudaDriver::check(cuda::Result result, const char* call, const std::string& what) const {
    if (result == cuda::kSuccess) return;
    const char* name = nullptr;
    const char* text = nullptr;
    get_error_name(result, &name);
    get_error_string(result, &text);
    throw DeviceError(std::string(call) + " failed with " + (name ? name : "an unknown error") +
                      " (" + std::to_string(result) + (text ? std::string(", ") + text : "") +
                      "): " + what);
}

int CudaDriver::version() const {
    int version = 0;
    check(driver_get_version(&version), "cuDriverGetVersion", library_);
    return version;
}

int CudaDriver::num_devices() const {
    int count = 0;
    check(device_get_count(&count), "cuDeviceGetCount", library_);
    return count;
}

CudaDriver::DeviceInfo CudaDriver::device(int ordinal) const {
    const int count = num_devices();
    if (ordinal < 0 || ordinal >= count)
        throw DeviceError("CUDA driver: no device " + std::to_string(ordinal) + ", there are " +
                          std::to_string(count) + ". CUDA_VISIBLE_DEVICES may hide some.");
    DeviceInfo info;
    cuda::Device device = 0;
    const std::string what = "device " + std::to_string(ordinal);
    check(device_get(&device, ordinal), "cuDeviceGet", what);
    char name[256] = "";
    check(device_get_name(name, sizeof(name), device), "cuDeviceGetName", what);
    info.name = name;
    check(device_get_attribute(&info.capability_major, cuda::kAttributeCapabilityMajor, device),
          "cuDeviceGetAttribute", what);
    check(device_get_attribute(&info.capability_minor, cuda::kAttributeCapabilityMinor, device),
          "cuDeviceGetAttribute", what);
    return info;
}

CudaContext::CudaContext(std::shared_ptr<const CudaDriver> driver, int ordinal)
    : driver_(std::move(driver)), ordinal_(ordinal) {
    driver_->device(ordinal);  // refuses an ordinal out of range with the better message
    const std::string what = "device " + std::to_string(ordinal);
    driver_->check(driver_->device_get(&device_, ordinal), "cuDeviceGet", what);
    driver_->check(driver_->primary_ctx_retain(&context_, device_), "cuDevicePrimaryCtxRetain",
                   what);
}

CudaContext::~CudaContext() { driver_->primary_ctx_release(device_); }

CudaContext::Current::Current(const CudaContext& context) : driver_(*context.driver_) {
    driver_.check(driver_.ctx_push_current(context.context_), "cuCtxPushCurrent",
                  "device " + std::to_string(context.ordinal_));
    driver_.thread_exchange_capture_mode(&capture_mode_);
}

CudaContext::Current::~Current() {
    driver_.thread_exchange_capture_mode(&capture_mode_);
    cuda::Context popped = nullptr;
    driver_.ctx_pop_current(&popped);
}

}  // namespace moe_offload
