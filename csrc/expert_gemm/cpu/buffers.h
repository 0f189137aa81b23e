// Scratch memory that is used again: a call would else spend its time on page faults.
//
// Buffers go back to a small store (at most kKept bytes) when they die; larger ones to the system.
#pragma once

#include <cstddef>
#include <mutex>
#include <utility>
#include <vector>

namespace moe_offload {

class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(size_t nbytes);  // aligned to 4096, contents undefined
    ~Buffer() { release(); }
    Buffer(Buffer&& other) noexcept { swap(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        swap(other);
        return *this;
    }

    std::byte* data() const { return data_; }
    size_t capacity() const { return capacity_; }

    static constexpr size_t kKept = size_t{64} << 20;

  private:
    void swap(Buffer& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(capacity_, other.capacity_);
    }
    void release() noexcept;

    std::byte* data_ = nullptr;
    size_t capacity_ = 0;
};

}  // namespace moe_offload
