// CUDA events as fences: recorded on one stream, waited for by others, reused when nobody holds
// them.
//
// Waiting for an event captures its last record at the time of the call, so an event may be
// recorded anew as soon as no fence refers to it, whatever streams still wait for the old record.
#pragma once

#include <atomic>
#include <mutex>
#include <vector>

#include "cuda_driver.h"
#include "fence.h"

namespace moe_offload {

// Thread safe.
class CudaEvents : public std::enable_shared_from_this<CudaEvents> {
  public:
    explicit CudaEvents(std::shared_ptr<const CudaContext> context);
    ~CudaEvents();

    // A fence behind everything enqueued on the stream so far.
    FencePtr record(cuda::Stream stream);
    // Later work of the stream runs after the fence. The host does not wait.
    void wait(cuda::Stream stream, const FencePtr& fence);

  private:
    struct Recorded;

    const std::shared_ptr<const CudaContext> context_;
    std::mutex mutex_;
    std::vector<cuda::Event> idle_;
};

}  // namespace moe_offload
