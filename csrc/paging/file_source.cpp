#include "file_source.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <stdexcept>
#include <utility>

#include "stream_copy.h"

namespace moe_offload {
namespace {

constexpr uint64_t kBlock = Scratch::kAlign;
// Each piece makes at most two parts of a vectored read, and the kernel takes IOV_MAX = 1024.
constexpr size_t kMaxPieces = 256;
// Two blocks of each may bounce.
constexpr size_t kMaxStraightPieces = FileSource::kEndBytes / (2 * kBlock);

int64_t mtime_ns(const struct stat& status) {
    return int64_t{status.st_mtim.tv_sec} * 1'000'000'000 + status.st_mtim.tv_nsec;
}

std::string reason() { return std::strerror(errno); }

uint64_t round_down(uint64_t offset) { return offset / kBlock * kBlock; }
uint64_t round_up(uint64_t offset) { return round_down(offset + kBlock - 1); }

// Some file systems accept O_DIRECT at open and refuse it at the first read.
bool direct_read_works(int fd, off_t size) {
    if (size == 0) return true;
    Scratch scratch;
    return ::pread(fd, scratch.reserve(kBlock), kBlock, 0) >= 0;
}

// The alignment O_DIRECT needs of memory addresses, as far as the kernel tells (Linux 6.1).
uint64_t direct_memory_align([[maybe_unused]] int fd) {
#ifdef STATX_DIOALIGN
    struct statx status{};
    if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &status) == 0 &&
        (status.stx_mask & STATX_DIOALIGN) != 0 && status.stx_dio_mem_align > 0)
        return status.stx_dio_mem_align;
#endif
    return kBlock;
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
        if (files_.back().direct) files_.back().memory_align = direct_memory_align(file.fd);
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

const std::vector<FileSegment>& FileSource::segments(int32_t layer, int32_t expert) const {
    const auto found = pages_.find(page_key(layer, expert));
    if (found == pages_.end())
        throw std::invalid_argument("FileSource: no page for layer " + std::to_string(layer) +
                                    " expert " + std::to_string(expert));
    return found->second;
}

uint32_t FileSource::shift(int32_t layer, int32_t expert) const {
    uint64_t align = 1;  // powers of two, so the largest serves all files
    for (const FileSegment& segment : segments(layer, expert))
        if (const File& file = files_[segment.file]; file.direct)
            align = std::max(align, file.memory_align);
    std::map<uint64_t, uint64_t> straight;  // bytes that each shift serves
    for (const FileSegment& segment : segments(layer, expert)) {
        const uint64_t wanted = (segment.offset - segment.page_offset) % align;
        if (files_[segment.file].direct && wanted % kShiftUnit == 0)
            straight[wanted] += segment.nbytes;
    }
    const auto best =
        std::max_element(straight.begin(), straight.end(),
                         [](const auto& a, const auto& b) { return a.second < b.second; });
    return best == straight.end() ? 0 : static_cast<uint32_t>(best->first);
}

bool FileSource::straight(int32_t layer, int32_t expert, const std::byte* page) const {
    const std::vector<FileSegment>& all = segments(layer, expert);
    const auto fits = [&](const FileSegment& segment) {
        const File& file = files_[segment.file];
        const auto place = reinterpret_cast<uintptr_t>(page + segment.page_offset);
        return !file.direct || (place - segment.offset) % file.memory_align == 0;
    };
    return all.size() <= kMaxStraightPieces && std::all_of(all.begin(), all.end(), fits);
}

std::vector<Chunk> FileSource::chunks(int32_t layer, int32_t expert, size_t chunk_bytes) const {
    std::vector<Chunk> chunks;
    for (const FileSegment& segment : segments(layer, expert)) {
        uint64_t done = 0;
        while (done < segment.nbytes) {
            const uint64_t at = segment.offset + done;
            const uint64_t left = segment.nbytes - done;
            // Continue the previous chunk when it ends exactly here and has room.
            Chunk* last = chunks.empty() ? nullptr : &chunks.back();
            if (last == nullptr || last->origin != segment.file ||
                last->offset + last->nbytes != at || last->nbytes >= chunk_bytes ||
                at % chunk_bytes == 0 || last->pieces.size() == kMaxPieces) {
                chunks.push_back({segment.file, at, 0, {}});
                last = &chunks.back();
            }
            // Cut at multiples of chunk_bytes in the file, so no block is read twice.
            const uint64_t take = std::min(left, chunk_bytes - at % chunk_bytes);
            const uint64_t place = segment.page_offset + done;
            Piece* piece = last->pieces.empty() ? nullptr : &last->pieces.back();
            if (piece != nullptr && piece->page_offset + piece->nbytes == place)
                piece->nbytes += take;  // neighbours in the file and in the page
            else
                last->pieces.push_back({last->nbytes, take, place});
            last->nbytes += take;
            done += take;
        }
    }
    return chunks;
}

uint64_t FileSource::read(int32_t, int32_t, const Chunk& chunk, std::byte* page,
                          Scratch& scratch) const {
    const uint64_t bounce = bounce_bytes(chunk, page);
    FileRead read = plan(chunk, page, bounce > 0 ? scratch.reserve(bounce) : nullptr);
    for (uint64_t got = 0; got < read.want;) {
        const ssize_t n =
            ::preadv(read.fd, read.parts.data() + read.first_part,
                     static_cast<int>(read.parts.size() - read.first_part), off_t(read.offset));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) throw failure(chunk, read, n < 0 ? -errno : 0);
        got += static_cast<uint64_t>(n);
        read.advance(static_cast<uint64_t>(n));
    }
    return finish(chunk, read);
}

FileSource::Blocks FileSource::straight(const Chunk& chunk, const Piece& piece,
                                        const std::byte* page) const {
    const uint64_t begin = chunk.offset % kBlock + piece.source_offset, end = begin + piece.nbytes;
    const Blocks blocks{round_up(begin), round_down(end)};
    const auto place = reinterpret_cast<uintptr_t>(page + piece.page_offset) - begin;
    const bool fits = (place + blocks.begin) % files_[chunk.origin].memory_align == 0;
    return blocks.begin < blocks.end && fits ? blocks : Blocks{};
}

uint64_t FileSource::bounce_bytes(const Chunk& chunk, const std::byte* page) const {
    if (!files_[chunk.origin].direct) return 0;
    uint64_t nbytes = round_up(chunk.offset + chunk.nbytes) - round_down(chunk.offset);
    for (const Piece& piece : chunk.pieces) {
        const Blocks blocks = straight(chunk, piece, page);
        nbytes -= blocks.end - blocks.begin;
    }
    return nbytes;
}

FileRead FileSource::plan(const Chunk& chunk, std::byte* page, std::byte* bounce) const {
    const File& file = files_[chunk.origin];
    FileRead read;
    read.fd = file.fd;
    read.offset = file.direct ? round_down(chunk.offset) : chunk.offset;
    read.want = chunk.offset + chunk.nbytes - read.offset;
    const auto add = [&](std::byte* to, uint64_t nbytes) {
        if (nbytes > 0) read.parts.push_back({to, nbytes});
    };
    if (!file.direct) {
        for (const Piece& piece : chunk.pieces) add(page + piece.page_offset, piece.nbytes);
        return read;
    }
    // From here on, positions count from the first block. Those from `done` on bounce one behind
    // the other, at `bounce`, until the next blocks that go straight.
    const uint64_t skew = chunk.offset - read.offset;
    uint64_t done = 0;
    for (const Piece& piece : chunk.pieces) {
        const uint64_t begin = skew + piece.source_offset, end = begin + piece.nbytes;
        const auto [from, to] = straight(chunk, piece, page);
        std::byte* const place = page + piece.page_offset;
        if (from == to) {
            read.copies.push_back({place, bounce + (begin - done), piece.nbytes});
            continue;
        }
        if (from > begin) read.copies.push_back({place, bounce + (begin - done), from - begin});
        add(bounce, from - done);
        add(place + (from - begin), to - from);
        bounce += from - done;
        done = to;
        if (end > to) read.copies.push_back({place + (to - begin), bounce, end - to});
    }
    add(bounce, round_up(read.want) - done);
    return read;
}

void FileRead::advance(uint64_t n) {
    offset += n;
    while (n > 0) {
        iovec& part = parts[first_part];
        const uint64_t take = std::min<uint64_t>(n, part.iov_len);
        part.iov_base = static_cast<std::byte*>(part.iov_base) + take;
        part.iov_len -= take;
        n -= take;
        if (part.iov_len == 0) ++first_part;
    }
}

uint64_t FileSource::finish(const Chunk& chunk, const FileRead& read) const {
    const File& file = files_[chunk.origin];
    for (const FileRead::Copy& copy : read.copies) stream_copy(copy.to, copy.from, copy.nbytes);
    check_unchanged(file);
    return read.offset - (file.direct ? round_down(chunk.offset) : chunk.offset);
}

PageReadError FileSource::failure(const Chunk& chunk, const FileRead& read, int64_t answer) const {
    const File& file = files_[chunk.origin];
    try {
        check_unchanged(file);  // the likely reason, and the clearer message
    } catch (const PageReadError& error) {
        return error;
    }
    return PageReadError(file.path + " offset " + std::to_string(read.offset) + ": " +
                         (answer < 0 ? std::strerror(static_cast<int>(-answer))
                                     : "the file ends there; it was truncated"));
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
