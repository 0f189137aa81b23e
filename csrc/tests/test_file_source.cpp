// Byte ranges of real files: any alignment, direct and buffered, and every way a file can go wrong.
#include <unistd.h>
#include <algorithm>
#include <cstring>

#include "check.h"
#include "paging/errors.h"
#include "paging/file_source.h"
#include "paging/stream_copy.h"
#include "temporary_directory.h"

using namespace moe_offload;
namespace fs = std::filesystem;

namespace {

std::vector<char> read_page(const FileSource& source, size_t page_bytes, size_t chunk_bytes,
                            uint64_t* disk_bytes = nullptr) {
    std::vector<char> page(page_bytes, 'x');
    Scratch scratch;
    for (const Chunk& chunk : source.chunks(0, 0, chunk_bytes)) {
        CHECK(chunk.nbytes <= chunk_bytes);
        const uint64_t read =
            source.read(0, 0, chunk, reinterpret_cast<std::byte*>(page.data()), scratch);
        if (disk_bytes != nullptr) *disk_bytes += read;
    }
    return page;
}

void any_ranges_arrive_where_they_belong() {
    const TemporaryDirectory directory;
    const auto a = random_bytes(300'001, 1), b = random_bytes(70'000, 2);
    write_file(directory.path / "a", a);
    write_file(directory.path / "b", b);
    std::mt19937 random(3);
    for (int round = 0; round < 300; ++round) {
        const bool direct = round % 2 == 0;
        FileSource source({directory.path / "a", directory.path / "b"}, direct);
        std::vector<FileSegment> segments;
        uint64_t position = 0;
        for (unsigned i = 0; i < 1 + random() % 5; ++i) {
            const auto file = static_cast<int32_t>(random() % 2);
            const auto& bytes = file == 0 ? a : b;
            uint64_t offset = random() % bytes.size();
            if (!segments.empty() && random() % 2 == 0 && segments.back().file == file)
                offset = segments.back().offset + segments.back().nbytes;  // touching
            const uint64_t nbytes = std::min<uint64_t>(random() % 50'000, bytes.size() - offset);
            segments.push_back({file, offset, nbytes, position});
            position += nbytes + random() % 300;
        }
        source.add_page(0, 0, segments);
        const auto page = read_page(source, position + 1, 4096 * (1 + random() % 8));
        std::vector<char> expected(position + 1, 'x');
        for (const FileSegment& s : segments)
            std::copy_n((s.file == 0 ? a : b).begin() + std::ptrdiff_t(s.offset), s.nbytes,
                        expected.begin() + std::ptrdiff_t(s.page_offset));
        CHECK(page == expected);
    }
}

void touching_ranges_are_read_once() {
    const TemporaryDirectory directory;
    write_file(directory.path / "f", random_bytes(1 << 20, 4));
    FileSource source({directory.path / "f"}, true);
    // Three tensors of 100 000 bytes back to back, in another order than on disk.
    source.add_page(
        0, 0,
        {{0, 200'123, 100'000, 0}, {0, 123, 100'000, 100'096}, {0, 100'123, 100'000, 200'192}});
    CHECK_EQ(source.chunks(0, 0, 1 << 20).size(), 1u);
    uint64_t disk_bytes = 0;
    read_page(source, 300'192, 65536, &disk_bytes);
    CHECK(disk_bytes >= 300'000);
    CHECK(disk_bytes <= 300'000 + 2 * Scratch::kAlign);  // no block between chunks is read twice
}

// Blocks that may be read straight into the page are, and only the rest bounces. A page that sits
// in memory as it does in the file (modulo the block size) needs no bounce but for its ends.
void aligned_blocks_skip_the_bounce_buffer() {
    const TemporaryDirectory directory;
    const auto bytes = random_bytes(200'000, 8);
    write_file(directory.path / "f", bytes);
    for (const bool direct : {true, false}) {
        FileSource source({directory.path / "f"}, direct);
        // Two pieces; the second is at home in memory at another place of its block.
        source.add_page(0, 0, {{0, 1000, 30'000, 1000}, {0, 31'000, 70'000, 40'008}});
        HugeRegion page(1 << 20), bounce(1 << 20);
        std::memset(page.data(), 'x', page.size());
        uint64_t copied = 0, disk_bytes = 0;
        for (const Chunk& chunk : source.chunks(0, 0, 1 << 20)) {
            FileRead read = source.plan(chunk, page.data(), bounce.data());
            CHECK(source.bounce_bytes(chunk, page.data()) <= bounce.size());
            for (const FileRead::Copy& copy : read.copies) copied += copy.nbytes;
            // In portions, as short reads would do it.
            while (read.first_part < read.parts.size()) {
                const uint64_t portion =
                    std::min<size_t>(read.parts[read.first_part].iov_len, 8192);
                const ssize_t n = ::pread(read.fd, read.parts[read.first_part].iov_base, portion,
                                          off_t(read.offset));
                CHECK(n > 0);
                read.advance(uint64_t(n));
            }
            disk_bytes += source.finish(chunk, read);
        }
        CHECK(std::equal(bytes.begin() + 1000, bytes.begin() + 31'000,
                         reinterpret_cast<const char*>(page.data()) + 1000));
        CHECK(std::equal(bytes.begin() + 31'000, bytes.begin() + 101'000,
                         reinterpret_cast<const char*>(page.data()) + 40'008));
        CHECK(page.data()[999] == std::byte{'x'} && page.data()[31'000] == std::byte{'x'} &&
              page.data()[40'007] == std::byte{'x'} && page.data()[110'008] == std::byte{'x'});
        if (source.io_mode() == "buffered") {
            CHECK_EQ(copied, 0u);
            CHECK_EQ(disk_bytes, 100'000u);
        } else {
            // [1000, 4096) and [28 672, 31 000) of the first piece, all of the second.
            CHECK(copied == 3096u + 2328u + 70'000u || copied < 3096u + 2328u + 8192u);
            CHECK_EQ(disk_bytes, 102'400u);  // [0, 102 400), the enclosing blocks
        }
    }
}

// A page put where `shift` says needs the bounce buffer for the ends of its runs only, wherever in
// the file its sections begin; of sections that disagree, those with most bytes win.
void shifted_pages_bounce_at_their_ends_only() {
    const TemporaryDirectory directory;
    const auto a = random_bytes(400'000, 10), b = random_bytes(100'003, 11);
    write_file(directory.path / "a", a);
    write_file(directory.path / "b", b);
    std::mt19937 random(12);
    constexpr uint64_t kEnds = 2 * Scratch::kAlign;  // of each run of neighbours
    for (int round = 0; round < 200; ++round) {
        const bool direct = round % 4 != 3;
        FileSource source({directory.path / "a", directory.path / "b"}, direct);
        // Three sections of 64 KiB back to back, down before gate and up as names sort them.
        const uint64_t n = 65'536, begin = 8 * (random() % 20'000);
        std::vector<FileSegment> segments{
            {0, begin + n, n, 0}, {0, begin + 2 * n, n, n}, {0, begin, n, 2 * n}};
        uint64_t odd = 0, runs = 2;
        if (round % 3 == 1) {  // one section in another file, by the end of it, at another place
            segments[2] = {1, b.size() - n, n, 2 * n};
            odd = n;
        } else if (round % 3 == 2) {  // no place in memory suits one behind an odd byte
            segments[0].offset += 1, segments[1].offset += 1;
            odd = 2 * n;
            runs = 3;
        }
        source.add_page(0, 0, segments);
        const uint32_t shift = source.shift(0, 0);
        CHECK_EQ(shift % PageSource::kShiftUnit, 0u);
        CHECK(shift < Scratch::kAlign);
        if (source.io_mode() == "buffered") CHECK_EQ(shift, 0u);
        HugeRegion memory(1 << 20), bounce(1 << 20);
        std::memset(memory.data(), 'x', memory.size());
        std::byte* page = memory.data() + 8192 + shift;
        const bool straight = source.io_mode() == "buffered" || round % 3 == 0;
        CHECK_EQ(source.straight(0, 0, page), straight);
        if (source.io_mode() == "direct") CHECK(!source.straight(0, 0, page + 1));
        if (straight)  // then reads may be as long as they like
            for (const Chunk& chunk : source.chunks(0, 0, 1 << 20))
                CHECK(source.bounce_bytes(chunk, page) <= 2 * runs * kEnds);
        uint64_t copied = 0;
        Scratch scratch;
        size_t pieces = 0;
        for (const Chunk& chunk : source.chunks(0, 0, 1 << 17)) {
            pieces += chunk.pieces.size();
            const FileRead read = source.plan(chunk, page, bounce.data());
            for (const auto& copy : read.copies) copied += copy.nbytes;
            uint64_t bounced = 0;
            for (const iovec& part : read.parts)
                if (const auto* at = static_cast<std::byte*>(part.iov_base);
                    at >= bounce.data() && at < bounce.data() + bounce.size())
                    bounced += part.iov_len;
            CHECK_EQ(bounced, source.bounce_bytes(chunk, page));
            source.read(0, 0, chunk, page, scratch);
        }
        CHECK(copied <= odd + runs * kEnds);
        if (round % 3 == 0) CHECK(pieces <= 2 + 3);  // gate and up are one piece in each chunk
        for (const FileSegment& s : segments)
            CHECK(std::equal((s.file == 0 ? a : b).begin() + std::ptrdiff_t(s.offset),
                             (s.file == 0 ? a : b).begin() + std::ptrdiff_t(s.offset + s.nbytes),
                             reinterpret_cast<const char*>(page) + s.page_offset));
        for (uint64_t i = 0; i < 8192 + shift; ++i) CHECK(memory.data()[i] == std::byte{'x'});
        for (uint64_t i = 3 * n; i < 4 * n; ++i) CHECK(page[i] == std::byte{'x'});
    }
}

void many_small_pieces_fit_one_read() {
    const TemporaryDirectory directory;
    const auto bytes = random_bytes(100'000, 9);
    write_file(directory.path / "f", bytes);
    FileSource source({directory.path / "f"}, false);
    std::vector<FileSegment> segments;  // 2000 of them; a vectored read takes 1024 parts
    for (uint64_t i = 0; i < 2000; ++i) segments.push_back({0, 100 + 40 * i, 40, 64 * (1999 - i)});
    source.add_page(0, 0, segments);
    const auto page = read_page(source, 64 * 2000, 1 << 20);
    for (size_t i = 0; i < 2000; ++i)
        CHECK(std::equal(page.begin() + std::ptrdiff_t(64 * (1999 - i)),
                         page.begin() + std::ptrdiff_t(64 * (1999 - i) + 40),
                         bytes.begin() + std::ptrdiff_t(100 + 40 * i)));
}

void missing_truncated_changed_and_deleted_files() {
    const TemporaryDirectory directory;
    const fs::path path = directory.path / "weights";
    CHECK_THROWS(PageReadError, "cannot open " + path.string(), FileSource({path}, true));

    const auto bytes = random_bytes(50'000, 5);
    for (const bool direct : {true, false}) {
        write_file(path, bytes);
        FileSource source({path}, direct);
        CHECK_THROWS(PageReadError, "is truncated: layer 3 expert 4 needs bytes 40000 to 60000",
                     source.add_page(3, 4, {{0, 40'000, 20'000, 0}}));
        CHECK_THROWS(std::invalid_argument, "no file with index 1",
                     source.add_page(0, 0, {{1, 0, 1, 0}}));
        source.add_page(0, 0, {{0, 100, 40'000, 0}});
        read_page(source, 40'000, 4096);

        fs::resize_file(path, 30'000);
        CHECK_THROWS(PageReadError, "changed while in use", read_page(source, 40'000, 4096));

        // Put back byte for byte, with its time stamp: usable again.
        write_file(path, bytes);
        FileSource again({path}, direct);
        again.add_page(0, 0, {{0, 100, 40'000, 0}});
        const auto time = fs::last_write_time(path);
        write_file(path, random_bytes(50'000, 6));
        fs::last_write_time(path, time + std::chrono::seconds(1));
        CHECK_THROWS(PageReadError, "changed while in use", read_page(again, 40'000, 4096));
        write_file(path, bytes);
        fs::last_write_time(path, time);
        CHECK(std::equal(bytes.begin() + 100, bytes.begin() + 40'100,
                         read_page(again, 40'000, 4096).begin()));

        // A deleted file lives on as long as it is open.
        CHECK(!again.any_deleted());
        fs::remove(path);
        CHECK(again.any_deleted());
        CHECK(std::equal(bytes.begin() + 100, bytes.begin() + 40'100,
                         read_page(again, 40'000, 4096).begin()));
    }
}

void streaming_copies_every_byte_and_no_other() {
    const auto from = random_bytes(20'000, 5);
    for (size_t begin = 0; begin < 70; ++begin)
        for (const size_t nbytes : {size_t{0}, size_t{4095}, size_t{4096}, 8000 + 7 * begin}) {
            std::vector<char> to(12'000, 'x'), expected = to;
            const size_t place = 69 - begin;
            stream_copy(reinterpret_cast<std::byte*>(to.data()) + place,
                        reinterpret_cast<const std::byte*>(from.data()) + begin, nbytes);
            std::copy_n(from.begin() + std::ptrdiff_t(begin), nbytes,
                        expected.begin() + std::ptrdiff_t(place));
            CHECK(to == expected);
        }
}

void io_mode_says_how_files_are_read() {
    const TemporaryDirectory directory;
    write_file(directory.path / "f", random_bytes(10, 7));
    CHECK_EQ(FileSource({directory.path / "f"}, false).io_mode(), std::string("buffered"));
    const std::string mode = FileSource({directory.path / "f"}, true).io_mode();
    CHECK(mode == "direct" || mode == "buffered");  // tmpfs may have no O_DIRECT
}

}  // namespace

int main() {
    RUN(any_ranges_arrive_where_they_belong);
    RUN(touching_ranges_are_read_once);
    RUN(aligned_blocks_skip_the_bounce_buffer);
    RUN(shifted_pages_bounce_at_their_ends_only);
    RUN(many_small_pieces_fit_one_read);
    RUN(missing_truncated_changed_and_deleted_files);
    RUN(streaming_copies_every_byte_and_no_other);
    RUN(io_mode_says_how_files_are_read);
}
