#include "disk_roof.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "clock.h"
#include "huge_pages.h"
#include "page_source.h"
#ifdef MOE_OFFLOAD_LIBURING
#include <liburing.h>
#endif

namespace moe_offload {
namespace {

[[noreturn]] void fail(int error, const std::string& what) {
    throw std::system_error(error, std::generic_category(), what);
}

struct Files {
    std::vector<int> descriptors;
    std::vector<uint64_t> pages;  // whole pages each file has
    ~Files() {
        for (const int descriptor : descriptors) ::close(descriptor);
    }
    explicit Files(const DiskRoofOptions& options) {
        for (const std::string& path : options.paths) {
            descriptors.push_back(::open(path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC));
            struct stat status{};
            if (descriptors.back() < 0 || ::fstat(descriptors.back(), &status) != 0)
                fail(errno, path);
            pages.push_back(static_cast<uint64_t>(status.st_size) / options.page_bytes);
            if (pages.back() == 0) throw std::invalid_argument(path + " is smaller than a page");
        }
    }
};

struct Chunks {
    const Files& files;
    const DiskRoofOptions& options;
    const HugeRegion& memory;
    std::mt19937_64 random{options.seed};
    size_t file = 0;
    uint64_t at = 0, end = 0;
    size_t count = 0;  // reads so far

    struct Read {
        int fd;
        uint64_t offset, nbytes;
        std::byte* to;
    };
    Read next() {
        if (at >= end) {
            file = random() % files.descriptors.size();
            at = random() % files.pages[file] * options.page_bytes;
            end = at + options.page_bytes;
        }
        const size_t place = count++ % (memory.size() / options.chunk_bytes);
        const Read read{files.descriptors[file], at, std::min(options.chunk_bytes, end - at),
                        memory.data() + place * options.chunk_bytes};
        at += read.nbytes;
        return read;
    }
};

double cpu_seconds() {
    rusage usage{};
    ::getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](const timeval& time) {
        return double(time.tv_sec) + 1e-6 * double(time.tv_usec);
    };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void check(int64_t answer, const Chunks::Read& read) {
    if (answer < 0) fail(static_cast<int>(-answer), "disk_roof: read");
    if (static_cast<uint64_t>(answer) != read.nbytes) fail(EIO, "disk_roof: short read");
}

uint64_t by_threads(Chunks& chunks, int64_t deadline) {
    std::mutex mutex;
    std::atomic<uint64_t> total{0};
    std::exception_ptr error;
    std::vector<std::thread> threads;
    for (int i = 0; i < chunks.options.depth; ++i)
        threads.emplace_back([&] {
            try {
                do {
                    Chunks::Read read{};
                    {
                        const std::lock_guard lock(mutex);
                        read = chunks.next();
                    }
                    const ssize_t n = ::pread(read.fd, read.to, read.nbytes, off_t(read.offset));
                    check(n < 0 ? -errno : n, read);
                    total += read.nbytes;
                } while (now_ns() < deadline);
            } catch (...) {
                const std::lock_guard lock(mutex);
                error = std::current_exception();
            }
        });
    for (std::thread& thread : threads) thread.join();
    if (error) std::rethrow_exception(error);
    return total;
}

#ifdef MOE_OFFLOAD_LIBURING
uint64_t by_uring(Chunks& chunks, int64_t deadline) {
    const auto depth = static_cast<unsigned>(chunks.options.depth);
    io_uring ring;
    const int error = io_uring_queue_init(depth, &ring, 0);
    if (error < 0) fail(-error, "io_uring_queue_init");
    std::vector<Chunks::Read> reads(depth);
    const auto start = [&](size_t i) {
        reads[i] = chunks.next();
        io_uring_sqe* entry = io_uring_get_sqe(&ring);
        io_uring_prep_read(entry, reads[i].fd, reads[i].to, unsigned(reads[i].nbytes),
                           reads[i].offset);
        entry->user_data = i;
    };
    for (size_t i = 0; i < depth; ++i) start(i);
    uint64_t total = 0;
    int64_t failed = 0;
    for (unsigned in_flight = depth; in_flight > 0;) {
        io_uring_submit_and_wait(&ring, 1);
        io_uring_cqe* entry = nullptr;
        while (io_uring_peek_cqe(&ring, &entry) == 0) {
            const size_t i = entry->user_data;
            const bool whole = entry->res >= 0 && uint64_t(entry->res) == reads[i].nbytes;
            if (!whole) failed = entry->res < 0 ? entry->res : -EIO;
            io_uring_cqe_seen(&ring, entry);
            total += reads[i].nbytes;
            if (now_ns() < deadline && failed == 0)
                start(i);
            else
                --in_flight;
        }
    }
    io_uring_queue_exit(&ring);
    if (failed < 0) fail(int(-failed), "disk_roof: read");
    return total;
}
#endif

}  // namespace

DiskRoof disk_roof(const DiskRoofOptions& options) {
    const auto aligned = [](uint64_t value) { return value > 0 && value % Scratch::kAlign == 0; };
    if (options.paths.empty() || !aligned(options.page_bytes) || !aligned(options.chunk_bytes) ||
        options.depth < 1)
        throw std::invalid_argument(
            "disk_roof: expected files, a depth >= 1, and page and chunk sizes that are multiples "
            "of 4096");
    const Files files(options);
    const HugeRegion memory(
        std::max(options.memory_bytes, uint64_t(options.depth) * options.chunk_bytes));
    Chunks chunks{files, options, memory};
    if (!options.huge_pages) ::madvise(memory.data(), memory.size(), MADV_NOHUGEPAGE);
    for (size_t i = 0; i < memory.size(); i += Scratch::kAlign) memory.data()[i] = std::byte{1};
    const double cpu = cpu_seconds();
    const int64_t begin = now_ns();
    const int64_t deadline = begin + static_cast<int64_t>(options.seconds * 1e9);
    DiskRoof roof;
    if (options.io_uring) {
#ifdef MOE_OFFLOAD_LIBURING
        roof.bytes = by_uring(chunks, deadline);
#else
        throw std::invalid_argument("disk_roof: built without liburing");
#endif
    } else {
        roof.bytes = by_threads(chunks, deadline);
    }
    roof.seconds = double(now_ns() - begin) / 1e9;
    roof.cpu_seconds = cpu_seconds() - cpu;
    return roof;
}

}  // namespace moe_offload
