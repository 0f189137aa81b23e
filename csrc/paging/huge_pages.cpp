#include "huge_pages.h"

#include <sys/mman.h>
#include <cstdint>
#include <new>
#include <utility>

namespace moe_offload {
namespace {

constexpr size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

void advise_huge_pages(void* address, size_t nbytes) {
    const auto from = reinterpret_cast<uintptr_t>(address);
    const uintptr_t begin = round_up(from, kHugePage);
    const uintptr_t end = (from + nbytes) / kHugePage * kHugePage;
    if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

HugeRegion::HugeRegion(size_t nbytes) : size_(round_up(nbytes, kHugePage)) {
    // Mapped with a huge page to spare, then cut to the boundary: the kernel aligns by itself only
    // since Linux 6.7.
    const size_t mapped = size_ + kHugePage;
    void* memory =
        ::mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t aligned = round_up(begin, kHugePage);
    if (aligned > begin) ::munmap(memory, aligned - begin);
    const uintptr_t end = aligned + size_;
    if (begin + mapped > end) ::munmap(reinterpret_cast<void*>(end), begin + mapped - end);
    data_ = reinterpret_cast<std::byte*>(aligned);
    advise_huge_pages(data_, size_);
}

HugeRegion::~HugeRegion() {
    if (data_ != nullptr) ::munmap(data_, size_);
}

HugeRegion::HugeRegion(HugeRegion&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

HugeRegion& HugeRegion::operator=(HugeRegion&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
}

}  // namespace moe_offload
