#include "file_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "errors.h"

namespace moe_offload {
namespace {

constexpr uint64_t kBlock = Scratch::kAlign;

int64_t mtime_ns(const struct stat& status) {
    return int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

std::string reason() { return std::strerror(errno); }

// Some file systems accept O_DIRECT at open and refuse it at the first read.
bool direct_read_works(int fd, off_t size) {
    if (size == 0) return true;
    Scratch scratch;
    return ::pread(fd, scratch.reserve(kBlock), kBlock, 0) >= 0;
}

}  // namespace

FileSource::FileSource(std::vector<std::string> paths, bool direct) {
    files_.reserve(paths.size());
    for (std::string& path : paths) {
        File file;
        file.path = std::move(path);
        if (direct) {
            file.fd = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
            file.direct = file.fd >= 0;
        }
        if (file.fd < 0) file.fd = ::open(file.path.c_str(), O_RDONLY | O_CLOEXEC);
        if (file.fd < 0) throw PageReadError("cannot open " + file.path + ": " + reason());
        files_.push_back(file);  // from here the destructor closes it

        struct stat status{};
        if (::fstat(file.fd, &status) != 0)
            throw PageReadError("cannot stat " + file.path + ": " + reason());
        files_.back().size = status.st_size;
        files_.back().mtime_ns = mtime_ns(status);
        if (file.direct && !direct_read_works(file.fd, status.st_size)) {
            ::fcntl(file.fd, F_SETFL, ::fcntl(file.fd, F_GETFL) & ~O_DIRECT);
            files_.back().direct = false;
        }
        if (!files_.back().direct) ::posix_fadvise(file.fd, 0, 0, POSIX_FADV_RANDOM);
    }
}

FileSource::~FileSource() {
    for (const File& file : files_) ::close(file.fd);
}

void FileSource::add_page(int32_t layer, int32_t expert, std::vector<FileSegment> segments) {
    for (const FileSegment& segment : segments) {
        if (segment.file < 0 || static_cast<size_t>(segment.file) >= files_.size())
            throw std::invalid_argument("FileSource.add_page: no file with index " +
                                        std::to_string(segment.file));
        const File& file = files_[segment.file];
        const auto size = static_cast<uint64_t>(file.size);
        if (segment.offset > size || segment.nbytes > size - segment.offset)
            throw PageReadError(file.path + " is truncated: layer " + std::to_string(layer) +
                                " expert " + std::to_string(expert) + " needs bytes " +
                                std::to_string(segment.offset) + " to " +
                                std::to_string(segment.offset + segment.nbytes) +
                                ", the file has " + std::to_string(size));
    }
    std::sort(segments.begin(), segments.end(), [](const auto& a, const auto& b) {
        return std::pair(a.file, a.offset) < std::pair(b.file, b.offset);
    });
    pages_[page_key(layer, expert)] = std::move(segments);
}

std::vector<Chunk> FileSource::chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const {
    const auto found = pages_.find(page_key(layer, expert));
    if (found == pages_.end())
        throw std::invalid_argument("FileSource: no page for layer " + std::to_string(layer) +
                                    " expert " + std::to_string(expert));
    std::vector<Chunk> chunks;
    for (const FileSegment& segment : found->second) {
        uint64_t done = 0;
        while (done < segment.nbytes) {
            const uint64_t at = segment.offset + done;
            const uint64_t left = segment.nbytes - done;
            // Continue the previous chunk when it ends exactly here and has room.
            Chunk* last = chunks.empty() ? nullptr : &chunks.back();
            if (last == nullptr || last->origin != segment.file ||
                last->offset + last->nbytes != at || last->nbytes >= chunk_bytes ||
                at % chunk_bytes == 0) {
                chunks.push_back({segment.file, at, 0, {}});
                last = &chunks.back();
            }
            // Cut at multiples of chunk_bytes in the file, so no block is read twice.
            const uint64_t take = std::min(left, chunk_bytes - at % chunk_bytes);
            last->pieces.push_back({last->nbytes, take, segment.page_offset + done});
            last->nbytes += take;
            done += take;
        }
    }
    return chunks;
}

uint64_t FileSource::read(int32_t, int32_t, const Chunk& chunk, std::byte* page,
                          Scratch& scratch) const {
    const File& file = files_[chunk.origin];
    check_unchanged(file);
    const uint64_t begin = file.direct ? chunk.offset / kBlock * kBlock : chunk.offset;
    const uint64_t end = chunk.offset + chunk.nbytes;
    const uint64_t room = file.direct ? (end + kBlock - 1) / kBlock * kBlock - begin : chunk.nbytes;
    std::byte* from = page + chunk.pieces.front().page_offset;
    if (file.direct || chunk.pieces.size() > 1) {
        std::byte* bounce = scratch.reserve(room);
        read_exactly(file, bounce, begin, end - begin, room);
        from = bounce + (chunk.offset - begin);
        for (const Piece& piece : chunk.pieces)
            std::memcpy(page + piece.page_offset, from + piece.source_offset, piece.nbytes);
    } else {
        read_exactly(file, from, begin, end - begin, room);
    }
    check_unchanged(file);
    return std::min<uint64_t>(room, static_cast<uint64_t>(file.size) - begin);
}

// `want` bytes must arrive; up to `room` may (the last block of a file is short).
void FileSource::read_exactly(const File& file, std::byte* into, uint64_t offset, uint64_t want,
                              uint64_t room) const {
    uint64_t got = 0;
    while (got < want) {
        const ssize_t n = ::pread(file.fd, into + got, room - got, offset + got);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0)
            throw PageReadError(file.path + " offset " + std::to_string(offset + got) + ": " +
                                (n < 0 ? reason() : "the file ends there; it was truncated"));
        got += static_cast<uint64_t>(n);
    }
}

void FileSource::check_unchanged(const File& file) const {
    struct stat status{};
    if (::fstat(file.fd, &status) != 0)
        throw PageReadError("cannot stat " + file.path + ": " + reason());
    if (status.st_size != file.size || mtime_ns(status) != file.mtime_ns)
        throw PageReadError(file.path +
                            " changed while in use (size or modification time differ from when it "
                            "was opened). Restore the file, or load the model again.");
}

std::string FileSource::io_mode() const {
    const auto direct =
        std::count_if(files_.begin(), files_.end(), [](const File& file) { return file.direct; });
    if (direct == 0) return "buffered";
    return static_cast<size_t>(direct) == files_.size() ? "direct" : "mixed";
}

bool FileSource::any_deleted() const {
    return std::any_of(files_.begin(), files_.end(), [](const File& file) {
        struct stat status{};
        return ::fstat(file.fd, &status) == 0 && status.st_nlink == 0;
    });
}

}  // namespace moe_offload
