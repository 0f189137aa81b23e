// The driver is found at run time, and each way of not having one is a clear error.
#include "check.h"
#include "fake_cuda/fake_cuda.h"
#include "paging/cuda_events.h"

using namespace moe_offload;

namespace {

void a_missing_library_names_itself_and_the_way_out() {
    CHECK_THROWS(DeviceError, "cannot load libnowhere.so.1", CudaDriver::load("libnowhere.so.1"));
    CHECK_THROWS(DeviceError, "use device=\"cpu\"", CudaDriver::load("libnowhere.so.1"));
}

void a_library_without_the_calls_is_refused() {
    CHECK_THROWS(DeviceError, "has no cuInit", CudaDriver::load("libm.so.6"));
}

void no_device_is_an_error_and_not_a_crash() {
    fake_cuda_reset();
    fake_cuda_set_num_devices(0);
    CHECK_THROWS(DeviceError, "cuInit failed with CUDA_ERROR_NO_DEVICE (100",
                 CudaDriver::load(FAKE_CUDA));
    fake_cuda_reset();
    CHECK_EQ(CudaDriver::load(FAKE_CUDA)->num_devices(), 1);  // and the next try is unharmed
}

void devices_are_described() {
    fake_cuda_reset();
    const auto driver = CudaDriver::load(FAKE_CUDA);
    CHECK_EQ(driver->version(), 13000);
    CHECK_EQ(driver->device(0).name, "Fake GPU");
    CHECK_EQ(driver->device(0).capability_major, 9);
    CHECK_THROWS(DeviceError, "no device 3, there are 1", driver->device(3));
    CHECK_THROWS(DeviceError, "no device -1", CudaContext(driver, -1));
}

void errors_name_call_error_and_sizes() {
    fake_cuda_reset();
    const auto driver = CudaDriver::load(FAKE_CUDA);
    CHECK_THROWS(
        DeviceError,
        "cuMemcpyHtoDAsync failed with CUDA_ERROR_INVALID_VALUE (1, as the fake driver was "
        "told): 77 bytes",
        driver->check(1, "cuMemcpyHtoDAsync", "77 bytes"));
    CHECK_THROWS(DeviceError, "an unknown error (12345", driver->check(12345, "cuX", ""));
    fake_cuda_fail("cuDevicePrimaryCtxRetain", 2, 0, 1);
    CHECK_THROWS(DeviceError, "cuDevicePrimaryCtxRetain failed with CUDA_ERROR_OUT_OF_MEMORY",
                 CudaContext(driver, 0));
    CudaContext(driver, 0);
    CHECK_EQ(fake_cuda_counts().contexts, 0);
}

void calls_need_the_context_and_scopes_put_back_what_was_before() {
    fake_cuda_reset();
    const auto driver = CudaDriver::load(FAKE_CUDA);
    const CudaContext context(driver, 0);
    cuda::Event event = nullptr;
    CHECK_EQ(driver->event_create(&event, 0), 201);  // no context is current on this thread
    {
        const CudaContext::Current current(context);
        CHECK_EQ(driver->event_create(&event, 0), 0);
        CHECK_EQ(driver->event_destroy(event), 0);
    }
    CHECK_EQ(driver->event_create(&event, 0), 201);
}

void fences_order_streams_and_their_events_are_reused() {
    fake_cuda_reset();
    const auto driver = CudaDriver::load(FAKE_CUDA);
    const auto context = std::make_shared<CudaContext>(driver, 0);
    {
        const auto events = std::make_shared<CudaEvents>(context);
        const uintptr_t stream = fake_cuda_create_stream();
        const auto handle = reinterpret_cast<cuda::Stream>(stream);
        std::vector<unsigned char> memory(64, 7);
        // A third of a second: the stream is still busy below even where this thread waits its
        // turn.
        fake_cuda_launch_reader(stream, reinterpret_cast<uintptr_t>(memory.data()), 64, 7, 300000);
        FencePtr fence = events->record(handle);
        CHECK(!fence->passed());
        fake_cuda_synchronize_stream(stream);
        CHECK(fence->passed());
        events->wait(handle, fence);
        events->wait(handle, nullptr);
        fence = nullptr;
        for (int i = 0; i < 10; ++i) events->record(handle);
        CHECK_EQ(fake_cuda_counts().events, 1);
        fake_cuda_break(719);
        CHECK_THROWS(DeviceError, "cuEventRecord failed with CUDA_ERROR_LAUNCH_FAILED",
                     events->record(handle));
        fake_cuda_reset();
        fake_cuda_destroy_stream(stream);
    }
    CHECK_EQ(fake_cuda_counts().events, 0);
    CHECK_EQ(fake_cuda_counts().misuses, 0);
}

}  // namespace

int main() {
    RUN(a_missing_library_names_itself_and_the_way_out);
    RUN(a_library_without_the_calls_is_refused);
    RUN(no_device_is_an_error_and_not_a_crash);
    RUN(devices_are_described);
    RUN(errors_name_call_error_and_sizes);
    RUN(calls_need_the_context_and_scopes_put_back_what_was_before);
    RUN(fences_order_streams_and_their_events_are_reused);
}
