#include "swap_back.h"

#include <stdexcept>
#include <utility>

#include "stream_copy.h"

namespace moe_offload {

SwapBack::SwapBack(size_t page_bytes, Observer observer)
    : page_bytes_(page_bytes), observer_(std::move(observer)) {
    if (page_bytes == 0) throw std::invalid_argument("SwapBack: expected page_bytes >= 1, got 0");
}

void SwapBack::send(const std::byte* page) {
    Buffer buffer;
    {
        const std::lock_guard lock(mutex_);
        if (!idle_.empty()) {
            buffer = std::move(idle_.back());
            idle_.pop_back();
        }
    }
    if (!buffer) buffer = std::make_unique<std::byte[]>(page_bytes_);
    stream_copy(buffer.get(), page, page_bytes_);
    if (observer_) observer_(page, buffer.get());
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(buffer));
}

}  // namespace moe_offload
