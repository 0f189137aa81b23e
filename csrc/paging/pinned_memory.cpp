#include "pinned_memory.h"

#include <sys/mman.h>
#include <algorithm>
#include <mutex>
#include <utility>

namespace moe_offload {
namespace {

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older headers lack it

}  // namespace

HostMemory::HostMemory(size_t nbytes) : nbytes_(nbytes) {
    if (nbytes > 0) region_ = HugeRegion(nbytes);
}

void HostMemory::release() {
    region_ = {};
    nbytes_ = 0;
}

void HostMemory::populate(size_t offset, size_t nbytes) {
    const size_t begin = offset / PinnedRanges::kPageBytes * PinnedRanges::kPageBytes;
    const size_t end = std::min(offset + nbytes, region_.size());
    // Where the kernel does not know it, registering takes the pages one by one, only slower.
    if (end > begin) ::madvise(data() + begin, end - begin, kPopulateWrite);
}

PinnedRanges::PinnedRanges(std::shared_ptr<const CudaContext> context, size_t budget_bytes)
    : context_(std::move(context)), budget_bytes_(budget_bytes) {}

PinnedRanges::~PinnedRanges() { release(); }

void PinnedRanges::release() {
    const std::unique_lock lock(mutex_);
    try {
        const CudaContext::Current current(*context_);
        for (const auto& [begin, end] : ranges_)
            context_->driver().mem_host_unregister(reinterpret_cast<void*>(begin));
    } catch (const DeviceError&) {  // the context is gone, and its registrations with it
    }
    ranges_.clear();
    pinned_bytes_ = 0;
    limit_ = "released";
}

bool PinnedRanges::pin(const std::byte* address, size_t nbytes) {
    uintptr_t begin = reinterpret_cast<uintptr_t>(address) / kPageBytes * kPageBytes;
    const uintptr_t end =
        (reinterpret_cast<uintptr_t>(address) + nbytes + kPageBytes - 1) / kPageBytes * kPageBytes;
    while (begin < end) {
        uintptr_t stop = end;
        {
            const std::shared_lock lock(mutex_);
            if (!limit_.empty()) return false;
            const auto next = ranges_.upper_bound(begin);
            if (next != ranges_.begin() && std::prev(next)->second > begin) {
                begin = std::prev(next)->second;  // registered before
                continue;
            }
            if (next != ranges_.end()) stop = std::min(stop, next->first);
        }
        const size_t size = stop - begin;
        cuda::Result result = cuda::kSuccess;
        const bool fits = pinned_bytes() + size <= budget_bytes_;
        if (fits) {
            const CudaContext::Current current(*context_);
            result = context_->driver().mem_host_register(reinterpret_cast<void*>(begin), size,
                                                          cuda::kRegisterPortable);
        }
        const std::unique_lock lock(mutex_);
        if (fits && result == cuda::kSuccess) {
            ranges_[begin] = stop;
            pinned_bytes_ += size;
            begin = stop;
            continue;
        }
        limit_ = fits ? "the driver refused to pin more than " + std::to_string(pinned_bytes_) +
                            " bytes (error " + std::to_string(result) +
                            "); see the limit on locked memory (ulimit -l)"
                      : "the budget of " + std::to_string(budget_bytes_) + " bytes is used up";
        return false;
    }
    return true;
}

PinnedRanges::Reach PinnedRanges::reach(const std::byte* address, size_t nbytes) const {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    const std::shared_lock lock(mutex_);
    const auto next = ranges_.upper_bound(begin);
    if (next != ranges_.begin() && std::prev(next)->second > begin)
        return {std::min<size_t>(nbytes, std::prev(next)->second - begin), true};
    if (next != ranges_.end()) return {std::min<size_t>(nbytes, next->first - begin), false};
    return {nbytes, false};
}

size_t PinnedRanges::pinned_bytes() const {
    const std::shared_lock lock(mutex_);
    return pinned_bytes_;
}

std::string PinnedRanges::limit() const {
    const std::shared_lock lock(mutex_);
    return limit_;
}

}  // namespace moe_offload
