#include "uring_copy_engine.h"

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

namespace moe_offload {
namespace {

constexpr uint64_t kWakeUp = ~uint64_t{0};  // user data: not a flight but the event descriptor
constexpr uint64_t kDelay = kWakeUp - 1;    // a chaos delay ran out; its read follows

[[noreturn]] void fail(int error, const char* what) {
    throw std::system_error(error, std::generic_category(), what);
}

// The operations used below (Linux 5.6).
bool has_operations(io_uring* ring) {
    io_uring_probe* probe = io_uring_get_probe_ring(ring);
    if (probe == nullptr) return false;
    const bool all = io_uring_opcode_supported(probe, IORING_OP_READ) &&
                     io_uring_opcode_supported(probe, IORING_OP_READV) &&
                     io_uring_opcode_supported(probe, IORING_OP_TIMEOUT);
    io_uring_free_probe(probe);
    return all;
}

}  // namespace

struct UringCopyEngine::Ring {
    // A read in flight, with the part of the bounce memory that is its own.
    struct Flight {
        CopyQueue::Step step;
        FileRead read;
        uint64_t got = 0;
        __kernel_timespec delay{};
    };

    Ring(std::shared_ptr<const FileSource> files, int queue_depth, size_t chunk_bytes)
        : source(std::move(files)),
          // A chunk ends on a multiple of chunk_bytes, so the blocks around it are no more than it.
          bounce_bytes(chunk_bytes),
          bounce(static_cast<size_t>(queue_depth) * chunk_bytes),
          flights(static_cast<size_t>(queue_depth)) {
        for (size_t i = flights.size(); i > 0; --i) idle.push_back(i - 1);
        // For each read a delay before it, and the wake-up.
        const int error = io_uring_queue_init(2 * unsigned(queue_depth) + 1, &ring, 0);
        if (error < 0) fail(-error, "io_uring_queue_init");
        event = ::eventfd(0, EFD_CLOEXEC);
        const int event_error = errno;
        if (event < 0 || !has_operations(&ring)) {
            io_uring_queue_exit(&ring);
            if (event < 0) fail(event_error, "eventfd");
            ::close(event);
            fail(ENOSYS, "io_uring operations of Linux 5.6");
        }
    }
    ~Ring() {
        io_uring_queue_exit(&ring);
        ::close(event);
    }
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    void listen() {
        io_uring_sqe* entry = io_uring_get_sqe(&ring);
        io_uring_prep_read(entry, event, &event_value, sizeof event_value, 0);
        entry->user_data = kWakeUp;
    }

    void start(size_t number) {
        Flight& flight = flights[number];
        if (flight.step.delay_us > 0) {
            // A timeout ends with an error, which a hard link passes over: the read starts then.
            flight.delay = {flight.step.delay_us / 1'000'000,
                            flight.step.delay_us % 1'000'000 * 1000};
            io_uring_sqe* entry = io_uring_get_sqe(&ring);
            io_uring_prep_timeout(entry, &flight.delay, 0, 0);
            entry->flags |= IOSQE_IO_HARDLINK;
            entry->user_data = kDelay;
            flight.step.delay_us = 0;
        }
        io_uring_sqe* entry = io_uring_get_sqe(&ring);
        const FileRead& read = flight.read;
        io_uring_prep_readv(entry, read.fd, read.parts.data() + read.first_part,
                            unsigned(read.parts.size() - read.first_part), read.offset);
        entry->user_data = number;
    }

    const std::shared_ptr<const FileSource> source;
    const size_t bounce_bytes;
    const HugeRegion bounce;
    std::vector<Flight> flights;
    std::vector<size_t> idle;
    io_uring ring;
    int event = -1;
    uint64_t event_value = 0;
};

UringCopyEngine::UringCopyEngine(std::shared_ptr<const FileSource> source, int queue_depth,
                                 size_t chunk_bytes)
    : ring_(std::make_unique<Ring>(source, queue_depth, chunk_bytes)),
      queue_(std::move(source), chunk_bytes, std::min<size_t>(kPrefetchDepth, size_t(queue_depth))),
      thread_([this] { work(); }) {}

UringCopyEngine::~UringCopyEngine() { stop(); }

void UringCopyEngine::stop() {
    bool sleeping = false;
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
        queue_.clear();
        sleeping = std::exchange(sleeping_, false);
    }
    wake(sleeping);
    if (thread_.joinable()) thread_.join();
}

void UringCopyEngine::submit(std::shared_ptr<CopyJob> job) {
    bool sleeping = false;
    {
        std::lock_guard lock(mutex_);
        if (stopping_) return;  // dropped, as everything that was queued
        queue_.push(std::move(job));
        sleeping = std::exchange(sleeping_, false);
    }
    wake(sleeping);
}

void UringCopyEngine::promote(const std::shared_ptr<CopyJob>& job) {
    bool sleeping = false;
    {
        std::lock_guard lock(mutex_);
        queue_.promote(job);
        sleeping = std::exchange(sleeping_, false);  // prefetches in flight do not hold it back
    }
    wake(sleeping);
}

CopyEngine::Cancelled UringCopyEngine::cancel(const std::shared_ptr<CopyJob>& job) {
    std::lock_guard lock(mutex_);
    return queue_.cancel(job);
}

void UringCopyEngine::set_chaos(const Chaos& chaos) {
    std::lock_guard lock(mutex_);
    queue_.set_chaos(chaos);
}

void UringCopyEngine::wake(bool sleeping) {
    if (sleeping) ::eventfd_write(ring_->event, 1);
}

void UringCopyEngine::work() {
    Ring& ring = *ring_;
    ring.listen();
    std::unique_lock lock(mutex_);
    const auto finish = [&](const CopyQueue::Step& step, std::exception_ptr error, uint64_t bytes) {
        if (const auto report = queue_.finish(step, error, bytes)) {
            lock.unlock();
            report();
            lock.lock();
        }
    };
    while (true) {
        while (!stopping_ && !ring.idle.empty()) {
            auto step = queue_.take();
            if (!step) break;
            if (step->chunk == nullptr) {
                finish(*step, step->error, 0);
                continue;
            }
            const size_t number = ring.idle.back();
            ring.idle.pop_back();
            std::byte* bounce = ring.bounce.data() + number * ring.bounce_bytes;
            FileRead read = ring.source->plan(*step->chunk, step->job->slot, bounce);
            ring.flights[number] = {std::move(*step), std::move(read), 0, {}};
            ring.start(number);
        }
        if (stopping_ && ring.idle.size() == ring.flights.size()) return;
        sleeping_ = true;
        lock.unlock();

        // Waits for a read to end, or for submit, promote and stop to write the event descriptor.
        // Everything started above goes to the kernel in the same call.
        io_uring_submit_and_wait(&ring.ring, 1);
        io_uring_cqe* entry = nullptr;
        std::vector<std::pair<uint64_t, int>> ended;
        while (io_uring_peek_cqe(&ring.ring, &entry) == 0) {
            ended.emplace_back(entry->user_data, entry->res);
            io_uring_cqe_seen(&ring.ring, entry);
        }
        for (const auto& [number, answer] : ended) {
            if (number == kWakeUp) ring.listen();
            if (number == kWakeUp || number == kDelay) continue;
            Ring::Flight& flight = ring.flights[number];
            std::exception_ptr error;
            uint64_t disk_bytes = 0;
            if (answer > 0) {
                flight.got += static_cast<uint64_t>(answer);
                flight.read.advance(static_cast<uint64_t>(answer));
            }
            if (answer == -EINTR || answer == -EAGAIN ||
                (answer > 0 && flight.got < flight.read.want)) {
                ring.start(number);  // the rest of a short read
                continue;
            }
            try {
                if (answer <= 0)
                    throw ring.source->failure(*flight.step.chunk, flight.read, answer);
                disk_bytes = ring.source->finish(*flight.step.chunk, flight.read);
            } catch (...) {
                error = std::current_exception();
            }
            const CopyQueue::Step step = std::exchange(flight.step, {});
            lock.lock();
            ring.idle.push_back(number);
            finish(step, error, disk_bytes);
            lock.unlock();
        }
        lock.lock();
        sleeping_ = false;
    }
}

}  // namespace moe_offload
