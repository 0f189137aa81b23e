#include "cuda_events.h"

#include <utility>

namespace moe_offload {

struct CudaEvents::Recorded final : Fence {
    std::shared_ptr<CudaEvents> events;
    cuda::Event event;
    std::atomic<bool> done = false;  // passed is final, and asked often

    Recorded(std::shared_ptr<CudaEvents> owner, cuda::Event recorded)
        : events(std::move(owner)), event(recorded) {}
    ~Recorded() override {
        const std::lock_guard lock(events->mutex_);
        events->idle_.push_back(event);
    }
    bool passed() override {
        if (done.load(std::memory_order_acquire)) return true;
        const CudaContext::Current current(*events->context_);
        const CudaDriver& driver = events->context_->driver();
        const cuda::Result result = driver.event_query(event);
        if (result == cuda::kNotReady) return false;
        driver.check(result, "cuEventQuery", "work before this event failed");
        done.store(true, std::memory_order_release);
        return true;
    }
};

CudaEvents::CudaEvents(std::shared_ptr<const CudaContext> context) : context_(std::move(context)) {}

CudaEvents::~CudaEvents() {
    try {
        const CudaContext::Current current(*context_);
        for (const cuda::Event event : idle_) context_->driver().event_destroy(event);
    } catch (const DeviceError&) {  // the context is gone, and its events with it
    }
}

FencePtr CudaEvents::record(cuda::Stream stream) {
    const CudaContext::Current current(*context_);
    const CudaDriver& driver = context_->driver();
    cuda::Event event = nullptr;
    {
        const std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            event = idle_.back();
            idle_.pop_back();
        }
    }
    if (event == nullptr)
        driver.check(driver.event_create(&event, cuda::kEventDisableTiming), "cuEventCreate",
                     "device " + std::to_string(context_->ordinal()));
    auto fence = std::make_shared<Recorded>(shared_from_this(), event);
    driver.check(driver.event_record(event, stream), "cuEventRecord",
                 "is the stream being captured into a graph, or of another device?");
    return fence;
}

void CudaEvents::wait(cuda::Stream stream, const FencePtr& fence) {
    if (!fence) return;
    const CudaContext::Current current(*context_);
    const CudaDriver& driver = context_->driver();
    driver.check(driver.stream_wait_event(stream, static_cast<const Recorded&>(*fence).event, 0),
                 "cuStreamWaitEvent", "is the stream being captured into a graph?");
}

}  // namespace moe_offload
