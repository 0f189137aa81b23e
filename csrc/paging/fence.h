// A point in the order of a device stream.
//
// Copy engines whose copies are finished when they report hand out none: a null fence has passed.
#pragma once

#include <cstdint>
#include <memory>

namespace moe_offload {

// A device stream as the driver's handle; 0 is CUDA's legacy default stream.
using StreamHandle = uintptr_t;

class Fence {
  public:
    virtual ~Fence() = default;
    // True once the stream's work up to this point is done. Does not block. Throws DeviceError
    // when that work failed.
    virtual bool passed() = 0;
};
using FencePtr = std::shared_ptr<Fence>;

}  // namespace moe_offload
