// Pages as ranges of memory somebody else owns: tensors taken over from a live model.
// The owner keeps them alive as long as the source (the bindings hold the Python tensors).
#pragma once

#include <unordered_map>

#include "page_source.h"

namespace moe_offload {

struct MemorySegment {
    const std::byte* address;
    uint64_t nbytes;
    uint64_t page_offset;
};

class MemorySource : public PageSource {
  public:
    // Not thread safe: all pages are added before the pager starts.
    void add_page(int32_t layer, int32_t expert, std::vector<MemorySegment> segments);
    std::vector<Chunk> chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const override;
    bool in_memory() const override { return true; }
    uint64_t read(int32_t layer, int32_t expert, const Chunk& chunk, std::byte* page,
                  Scratch& scratch) const override;
    // Every range of memory some page lies in.
    std::vector<std::pair<const std::byte*, uint64_t>> ranges() const override;

  private:
    std::unordered_map<uint64_t, std::vector<MemorySegment>> pages_;
};

}  // namespace moe_offload
