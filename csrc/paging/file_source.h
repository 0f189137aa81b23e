// Pages as byte ranges of files, read with pread, O_DIRECT where the file system has it.
//
// Why not mmap: read-ahead on a mapped file moved 3.5 times the bytes wanted, and the page cache
// would keep a second copy outside the budget. O_DIRECT needs aligned offsets and safetensors has
// none, so a chunk is read as the enclosing 4096-byte blocks into the worker's scratch and copied
// from there. Ranges of a page that touch in the file are read as one; splits fall on block
// boundaries, so a page costs at most one extra block at either end of each run.
//
// A file is identified when it is opened (size, modification time); each read checks both
// before and after, so a file that changes under us is an error, never silent wrong weights.
#pragma once

#include <sys/types.h>
#include <string>
#include <unordered_map>

#include "page_source.h"

namespace moe_offload {

struct FileSegment {
    int32_t file;
    uint64_t offset;  // in the file
    uint64_t nbytes;
    uint64_t page_offset;
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
    uint64_t read(int32_t layer, int32_t expert, const Chunk& chunk, std::byte* page,
                  Scratch& scratch) const override;

    // "direct", "buffered", or "mixed" when only some files support O_DIRECT.
    std::string io_mode() const;
    // True when some file no longer has a name: reads go on from the open handle.
    bool any_deleted() const;

  private:
    struct File {
        std::string path;
        int fd = -1;
        bool direct = false;
        off_t size = 0;
        int64_t mtime_ns = 0;
    };

    void check_unchanged(const File& file) const;
    void read_exactly(const File& file, std::byte* into, uint64_t offset, uint64_t want,
                      uint64_t room) const;

    std::vector<File> files_;
    std::unordered_map<uint64_t, std::vector<FileSegment>> pages_;
};

}  // namespace moe_offload
