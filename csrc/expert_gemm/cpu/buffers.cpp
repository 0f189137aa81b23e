#include "expert_gemm/cpu/buffers.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <tuple>

namespace moe_offload {
namespace {

struct Store {
    std::mutex mutex;
    std::vector<std::pair<std::byte*, size_t>> free;
    size_t bytes = 0;
};

Store& store() {
    static Store* const shared = new Store;  // outlives every buffer
    return *shared;
}

}  // namespace

Buffer::Buffer(size_t nbytes) {
    {
        Store& kept = store();
        const std::lock_guard<std::mutex> lock(kept.mutex);
        size_t best = kept.free.size();
        for (size_t i = 0; i < kept.free.size(); ++i) {
            const size_t size = kept.free[i].second;
            if (size >= nbytes && (best == kept.free.size() || size < kept.free[best].second))
                best = i;
        }
        if (best < kept.free.size() && kept.free[best].second / 4 <= nbytes + 65536) {
            std::tie(data_, capacity_) = kept.free[best];
            kept.bytes -= capacity_;
            kept.free.erase(kept.free.begin() + static_cast<std::ptrdiff_t>(best));
            return;
        }
    }
    constexpr size_t kHuge = size_t{2} << 20;
    const size_t align = nbytes >= 2 * kHuge ? kHuge : 4096;
    capacity_ = (nbytes + align - 1) / align * align;
    if (capacity_ == 0) capacity_ = align;
    data_ = static_cast<std::byte*>(std::aligned_alloc(align, capacity_));
    if (!data_) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
    if (align == kHuge) madvise(data_, capacity_, MADV_HUGEPAGE);  // a hint; refusal is fine
#endif
}

void Buffer::release() noexcept {
    if (!data_) return;
    Store& kept = store();
    {
        const std::lock_guard<std::mutex> lock(kept.mutex);
        if (kept.bytes + capacity_ <= kKept) {
            kept.free.emplace_back(data_, capacity_);
            kept.bytes += capacity_;
            return;
        }
    }
    std::free(data_);
}

}  // namespace moe_offload
