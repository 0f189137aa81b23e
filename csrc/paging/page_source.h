// Where pages come from. A source turns (layer, expert) into chunks, the unit of copying, and
// moves the bytes of one chunk into a slot. It knows nothing of slots, policy or threads:
// `chunks` and `read` are called concurrently from several worker threads and must not change
// the source. Pages are read-only for ever, so nothing is ever written back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "huge_pages.h"

namespace moe_offload {

// Part of a chunk that lands in one place of the page.
struct Piece {
    uint64_t source_offset;  // bytes from the start of the chunk
    uint64_t nbytes;
    uint64_t page_offset;  // bytes from the start of the page
};

// A contiguous range of the source and the places in the page its bytes go to.
struct Chunk {
    int32_t origin = 0;   // file index; unused by memory sources
    uint64_t offset = 0;  // file offset, or address in memory
    uint64_t nbytes = 0;
    std::vector<Piece> pieces;
};

// A worker thread's private buffer, grown on demand; O_DIRECT reads bounce through it.
class Scratch {
  public:
    static constexpr size_t kAlign = 4096;  // of what reserve() returns, at least
    std::byte* reserve(size_t nbytes) {
        if (nbytes > memory_.size()) memory_ = HugeRegion(nbytes);
        return memory_.data();
    }

  private:
    HugeRegion memory_;
};

// Sources keep their pages in maps; one key for both coordinates.
inline uint64_t page_key(int32_t layer, int32_t expert) {
    return uint64_t{static_cast<uint32_t>(layer)} << 32 | static_cast<uint32_t>(expert);
}

class PageSource {
  public:
    virtual ~PageSource() = default;

    // The chunks that make up a page, none larger than chunk_bytes if the source can split it.
    // Throws std::invalid_argument for a page that was never added.
    virtual std::vector<Chunk> chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const = 0;

    // How many bytes behind the start of its slot a page had best begin, so that reads can go
    // straight into it; a multiple of kShiftUnit below Scratch::kAlign, always the same for a page.
    // A pager may use it or not: `read` puts a page wherever it is told.
    static constexpr uint32_t kShiftUnit = 8;
    virtual uint32_t shift(int32_t, int32_t) const { return 0; }

    // Whether reads of the page into `page` need no memory but a few blocks, however long they are.
    virtual bool straight(int32_t, int32_t, const std::byte*) const { return false; }

    // Whether a chunk's `offset` is an address that stays valid and readable for ever.
    virtual bool in_memory() const { return false; }
    // Then: the ranges of memory the pages lie in, in any order.
    virtual std::vector<std::pair<const std::byte*, uint64_t>> ranges() const { return {}; }

    // Copies one chunk into the page at `page`. Returns the bytes read from storage (0 for
    // memory), alignment included. Throws PageReadError; blocks until the bytes are there.
    virtual uint64_t read(int32_t layer, int32_t expert, const Chunk& chunk, std::byte* page,
                          Scratch& scratch) const = 0;
};

}  // namespace moe_offload
