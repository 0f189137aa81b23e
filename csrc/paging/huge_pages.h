// Memory for bulk data, asked of the kernel in huge pages.
//
// A direct read hands the device one address per physically contiguous piece. With 4 KiB pages a
// chunk of 1 MiB is 256 of them, with a huge page it is one; on the virtual disk this was written
// on that is 2.5 instead of 1.2 GB/s and a quarter of the CPU time (bench/roofs.py measures both).
// Matrix kernels that stream the same bytes save TLB misses. It is advice: where transparent huge
// pages are switched off everything works, slower; `doctor` says so.
#pragma once

#include <cstddef>

namespace moe_offload {

constexpr size_t kHugePage = size_t{2} << 20;

// Advises the whole huge pages inside [address, address + nbytes). Call it before first use.
void advise_huge_pages(void* address, size_t nbytes);

// An anonymous mapping that starts on a huge page boundary.
class HugeRegion {
  public:
    HugeRegion() = default;
    explicit HugeRegion(size_t nbytes);  // throws std::bad_alloc
    ~HugeRegion();
    HugeRegion(HugeRegion&& other) noexcept;
    HugeRegion& operator=(HugeRegion&& other) noexcept;

    std::byte* data() const { return data_; }
    size_t size() const { return size_; }

  private:
    std::byte* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace moe_offload
