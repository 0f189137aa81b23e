#include "uring_copy_engine.h"

#include <liburing.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <algorithm>
#include <cerrno>
#include <deque>
#include <system_error>
#include <utility>

namespace moe_offload {
namespace {

constexpr uint64_t kWakeUp = ~uint64_t{0};  // user data: not a flight but the event descriptor
constexpr uint64_t kDelay = kWakeUp - 1;    // a chaos delay ran out; its read follows

// Places beyond the reads in flight: the next reads start before what has arrived in bounce buffers
// is copied to its slot. On the virtual disk this was measured on, reads in flight end together, so
// without spare places it has nothing to do during the copies. Four were no better than two.
constexpr size_t kSparePlaces = 2;

// What the ends of a straight page's runs need, in one huge page for all flights: their whole
// bounce buffers, 6 MiB for reads of 1 MiB, are only made when pages need them.
constexpr size_t kEndBytes = FileSource::kEndBytes;

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
    // A read, from its start until its bytes are in the slot, with its own part of the memory for
    // ends and of the bounce memory.
    struct Flight {
        CopyQueue::Step step;
        FileRead read;
        uint64_t got = 0;
        int answer = 0;  // of the read's last part
        __kernel_timespec delay{};
    };

    Ring(std::shared_ptr<const FileSource> files, int queue_depth, size_t chunk_bytes)
        : source(std::move(files)),
          // A chunk ends on a multiple of chunk_bytes, so the blocks around it are no more than it.
          // Longer ones are straight and need kEndBytes.
          bounce_bytes(chunk_bytes),
          depth(static_cast<size_t>(queue_depth)),
          flights(depth + kSparePlaces),
          ends(flights.size() * kEndBytes) {
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

    // Where a flight's read may bounce so many bytes.
    std::byte* bounce_for(size_t number, uint64_t nbytes) {
        if (nbytes <= kEndBytes) return ends.data() + number * kEndBytes;
        if (bounce.size() == 0) bounce = HugeRegion(flights.size() * bounce_bytes);
        return bounce.data() + number * bounce_bytes;
    }

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
    const size_t depth;
    std::vector<Flight> flights;
    const HugeRegion ends;
    HugeRegion bounce;  // empty until some read needs more than kEndBytes
    std::vector<size_t> idle;
    size_t in_flight = 0;        // reads that the kernel has
    std::deque<size_t> arrived;  // reads that ended; their bytes are still to be copied
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
        while (!stopping_ && ring.in_flight < ring.depth && !ring.idle.empty()) {
            auto step = queue_.take();
            if (!step) break;
            if (step->chunk == nullptr) {
                std::exception_ptr error = step->error;
                if (step->send_back) {
                    lock.unlock();
                    io_uring_submit(&ring.ring);  // what was started reads meanwhile
                    try {
                        step->job->swap_back->send(step->job->leaving);
                    } catch (...) {
                        error = std::current_exception();
                    }
                    lock.lock();
                }
                finish(*step, error, 0);
                continue;
            }
            const size_t number = ring.idle.back();
            ring.idle.pop_back();
            std::byte* const page = step->job->slot;
            FileRead read;
            try {
                const uint64_t nbytes = ring.source->bounce_bytes(*step->chunk, page);
                read = ring.source->plan(*step->chunk, page, ring.bounce_for(number, nbytes));
            } catch (...) {  // no memory
                ring.idle.push_back(number);
                finish(*step, std::current_exception(), 0);
                continue;
            }
            ring.flights[number] = {std::move(*step), std::move(read), 0, 0, {}};
            ring.start(number);
            ++ring.in_flight;
        }
        if (stopping_ && ring.idle.size() == ring.flights.size()) return;
        if (!ring.arrived.empty()) {
            const size_t number = ring.arrived.front();
            ring.arrived.pop_front();
            lock.unlock();
            io_uring_submit(&ring.ring);  // the disk works while this thread copies
            Ring::Flight& flight = ring.flights[number];
            std::exception_ptr error;
            uint64_t disk_bytes = 0;
            try {
                if (flight.answer <= 0)
                    throw ring.source->failure(*flight.step.chunk, flight.read, flight.answer);
                disk_bytes = ring.source->finish(*flight.step.chunk, flight.read);
            } catch (...) {
                error = std::current_exception();
            }
            const CopyQueue::Step step = std::exchange(flight.step, {});
            lock.lock();
            ring.idle.push_back(number);
            finish(step, error, disk_bytes);
            continue;
        }
        sleeping_ = true;
        lock.unlock();

        // Waits for a read to end, or for submit, promote and stop to write the event descriptor.
        // Everything started above goes to the kernel in the same call.
        io_uring_submit_and_wait(&ring.ring, 1);
        lock.lock();
        sleeping_ = false;
        io_uring_cqe* entry = nullptr;
        while (io_uring_peek_cqe(&ring.ring, &entry) == 0) {
            const uint64_t number = entry->user_data;
            const int answer = entry->res;
            io_uring_cqe_seen(&ring.ring, entry);
            if (number == kWakeUp) ring.listen();
            if (number == kWakeUp || number == kDelay) continue;
            Ring::Flight& flight = ring.flights[number];
            flight.answer = answer;
            if (answer > 0) {
                flight.got += static_cast<uint64_t>(answer);
                flight.read.advance(static_cast<uint64_t>(answer));
            }
            if (answer == -EINTR || answer == -EAGAIN ||
                (answer > 0 && flight.got < flight.read.want)) {
                ring.start(number);  // the rest of a short read
                continue;
            }
            --ring.in_flight;
            queue_.arrived(flight.step);
            ring.arrived.push_back(number);
        }
    }
}

}  // namespace moe_offload
