// Pages as byte ranges of files, read with preadv, O_DIRECT where the file system has it.
//
// Why not mmap: read-ahead on a mapped file moved 3.5 times the bytes wanted, and the page cache
// would keep a second copy outside the budget. O_DIRECT needs aligned offsets and safetensors has
// none, so a chunk is read as the enclosing 4096-byte blocks. A block goes straight into the slot
// when it lies within one piece and the device can write to where it belongs. NVMe can (it needs
// memory aligned to 4 bytes); most virtual disks need 512, which is what `shift` is for: a page
// that begins as many bytes behind a boundary in memory as it does in its file is aligned in one
// where it is aligned in the other. All other blocks, at least the first and the last of each run,
// go through a bounce buffer. Either way it is one vectored read per chunk. Ranges of a page that
// touch in the file are read as one; splits fall on block boundaries, so a page costs at most one
// extra block at either end of each run.
//
// A file is identified when it is opened (size, modification time); both are compared after each
// read, so a file that changes under us is an error, never silent wrong weights.
#pragma once

#include <sys/types.h>
#include <sys/uio.h>
#include <string>
#include <unordered_map>

#include "errors.h"
#include "page_source.h"

namespace moe_offload {

struct FileSegment {
    int32_t file;
    uint64_t offset;  // in the file
    uint64_t nbytes;
    uint64_t page_offset;
};

// One vectored read, and what to copy when it is done. Fills `parts` from `offset` on.
struct FileRead {
    struct Copy {
        std::byte* to;
        const std::byte* from;
        uint64_t nbytes;
    };
    int fd = -1;
    uint64_t offset = 0;  // in the file
    uint64_t want = 0;    // bytes that must arrive; the last block of a file is short
    std::vector<iovec> parts;
    std::vector<Copy> copies;  // out of the bounce buffer
    size_t first_part = 0;     // those before it are full

    // After n bytes arrived: what is left to read. A read may be short.
    void advance(uint64_t n);
};

class FileSource final : public PageSource {
  public:
    // Opens every file. Throws PageReadError naming the path. direct = false reads through the
    // page cache; with direct = true a file system without O_DIRECT falls back, see io_mode.
    FileSource(std::vector<std::string> paths, bool direct);
    ~FileSource() override;
    FileSource(const FileSource&) = delete;
    FileSource& operator=(const FileSource&) = delete;

    // Not thread safe: all pages are added before the pager starts. Throws std::invalid_argument
    // for a bad file index and PageReadError for a range beyond the end of the file.
    void add_page(int32_t layer, int32_t expert, std::vector<FileSegment> segments);

    std::vector<Chunk> chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const override;
    // The shift with which most bytes of the page arrive straight. Sections whose sizes are
    // multiples of the alignment, as those of large models are, all want the same one.
    uint32_t shift(int32_t layer, int32_t expert) const override;
    bool straight(int32_t layer, int32_t expert, const std::byte* page) const override;
    uint64_t read(int32_t layer, int32_t expert, const Chunk& chunk, std::byte* page,
                  Scratch& scratch) const override;

    // What bounces of a chunk of a page that is `straight`, at most.
    static constexpr uint64_t kEndBytes = 64 << 10;

    // `read` in steps, for engines that do the reading themselves. Bytes a bounce buffer for this
    // chunk must have (aligned to Scratch::kAlign); 0 when none is needed. At most chunk_bytes, and
    // two blocks a piece, kEndBytes in all, where the page is `straight`.
    uint64_t bounce_bytes(const Chunk& chunk, const std::byte* page) const;
    FileRead plan(const Chunk& chunk, std::byte* page, std::byte* bounce) const;
    // When all bytes wanted have arrived: the rest of the way into the page, and the check that
    // the file is unchanged. Returns the bytes read from storage.
    uint64_t finish(const Chunk& chunk, const FileRead& read) const;
    // What to throw for a read that answered 0 or -error.
    PageReadError failure(const Chunk& chunk, const FileRead& read, int64_t answer) const;

    // "direct", "buffered", or "mixed" when only some files support O_DIRECT.
    std::string io_mode() const;
    // True when some file no longer has a name: reads go on from the open handle.
    bool any_deleted() const;

  private:
    struct File {
        std::string path;
        int fd = -1;
        bool direct = false;
        uint64_t memory_align = Scratch::kAlign;  // that O_DIRECT needs of addresses
        off_t size = 0;
        int64_t mtime_ns = 0;
    };

    // The blocks of a piece that go straight into the page, counted from the chunk's first block in
    // bytes; empty where none may.
    struct Blocks {
        uint64_t begin = 0, end = 0;
    };
    Blocks straight(const Chunk& chunk, const Piece& piece, const std::byte* page) const;
    const std::vector<FileSegment>& segments(int32_t layer, int32_t expert) const;
    void check_unchanged(const File& file) const;

    std::vector<File> files_;
    std::unordered_map<uint64_t, std::vector<FileSegment>> pages_;
};

}  // namespace moe_offload
