#include "page_source.h"

#include <cstdlib>
#include <new>

namespace moe_offload {

void Scratch::Free::operator()(std::byte* pointer) const { std::free(pointer); }

std::byte* Scratch::reserve(size_t nbytes) {
    if (nbytes > capacity_) {
        const size_t rounded = (nbytes + kAlign - 1) / kAlign * kAlign;
        auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlign, rounded));
        if (memory == nullptr) throw std::bad_alloc();
        buffer_.reset(memory);
        capacity_ = rounded;
    }
    return buffer_.get();
}

}  // namespace moe_offload
