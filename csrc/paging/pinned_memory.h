// Host memory the copy engine of the GPU can read by itself.
//
// Memory is taken from the system first and registered with the driver afterwards, in chunks: that
// is about twice as fast as allocating pinned memory, allocates exact sizes (torch's pinned
// allocator rounds up to powers of two), and stops with what was reached where the system sets a
// limit. What is not registered still works, through staging buffers (cuda_copy_engine.h).
// A copy must not span two registrations, so ranges are asked for by how far they reach.
#pragma once

#include <map>
#include <memory>
#include <shared_mutex>
#include <string>

#include "cuda_driver.h"
#include "huge_pages.h"

namespace moe_offload {

// Zeroed memory, aligned to and advised for huge pages. Takes room when it is first written.
class HostMemory {
  public:
    // Throws std::bad_alloc.
    explicit HostMemory(size_t nbytes);

    std::byte* data() const { return region_.data(); }
    size_t nbytes() const { return nbytes_; }
    // Gives the memory back; data() is null then.
    void release();
    // Makes the kernel provide these pages now; changes no content. Best effort.
    void populate(size_t offset, size_t nbytes);

  private:
    HugeRegion region_;
    size_t nbytes_ = 0;
};

// Thread safe. When release() or the destructor runs, no copy may be running.
class PinnedRanges {
  public:
    static constexpr size_t kChunkBytes = size_t{64} << 20;
    static constexpr size_t kPageBytes = 4096;

    // Never registers more than budget_bytes.
    PinnedRanges(std::shared_ptr<const CudaContext> context, size_t budget_bytes);
    ~PinnedRanges();
    PinnedRanges(const PinnedRanges&) = delete;
    PinnedRanges& operator=(const PinnedRanges&) = delete;

    // Registers the pages around one range of at most kChunkBytes; parts registered before count
    // as done. False when the budget or the system's limit is reached, see limit().
    bool pin(const std::byte* address, size_t nbytes);

    // Unregisters everything; nothing is pinned from then on.
    void release();

    // How far from `address` one kind of memory reaches, at most nbytes.
    struct Reach {
        size_t nbytes;
        bool pinned;
    };
    Reach reach(const std::byte* address, size_t nbytes) const;

    size_t pinned_bytes() const;
    // Why registering ended early; empty when it did not.
    std::string limit() const;

  private:
    const std::shared_ptr<const CudaContext> context_;
    const size_t budget_bytes_;
    mutable std::shared_mutex mutex_;
    std::map<uintptr_t, uintptr_t> ranges_;  // begin to end of each registration
    size_t pinned_bytes_ = 0;
    std::string limit_;
};

}  // namespace moe_offload
