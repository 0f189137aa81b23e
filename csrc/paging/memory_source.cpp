#include "memory_source.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace moe_offload {
void MemorySource::add_page(int32_t layer, int32_t expert, std::vector<MemorySegment> segments) {
    pages_[page_key(layer, expert)] = std::move(segments);
}

std::vector<Chunk> MemorySource::chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const {
    const auto found = pages_.find(page_key(layer, expert));
    if (found == pages_.end())
        throw std::invalid_argument("MemorySource: no page for layer " + std::to_string(layer) +
                                    " expert " + std::to_string(expert));
    std::vector<Chunk> chunks;
    for (const MemorySegment& segment : found->second)
        for (uint64_t done = 0; done < segment.nbytes; done += chunk_bytes) {
            const uint64_t take = std::min<uint64_t>(chunk_bytes, segment.nbytes - done);
            const auto address = reinterpret_cast<uintptr_t>(segment.address) + done;
            chunks.push_back({0, address, take, {{0, take, segment.page_offset + done}}});
        }
    return chunks;
}

std::vector<std::pair<const std::byte*, uint64_t>> MemorySource::ranges() const {
    std::vector<std::pair<const std::byte*, uint64_t>> ranges;
    for (const auto& [key, segments] : pages_)
        for (const MemorySegment& segment : segments)
            ranges.emplace_back(segment.address, segment.nbytes);
    return ranges;
}

uint64_t MemorySource::read(int32_t, int32_t, const Chunk& chunk, std::byte* page, Scratch&) const {
    const auto* from = reinterpret_cast<const std::byte*>(chunk.offset);
    for (const Piece& piece : chunk.pieces)
        std::memcpy(page + piece.page_offset, from + piece.source_offset, piece.nbytes);
    return 0;
}

}  // namespace moe_offload
