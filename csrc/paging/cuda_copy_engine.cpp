// What the threads that ask for pages do; cuda_copy_worker.cpp is the other side.
#include "cuda_copy_engine.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "clock.h"

namespace moe_offload {
namespace {

size_t round_up(size_t value, size_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

size_t num_frames(const CudaCopyOptions& options) {
    return std::min(options.host_bytes / CudaCopyEngine::frame_stride(options.page_bytes),
                    std::max(options.num_layers * options.experts_per_layer, HostTier::kMinFrames));
}

}  // namespace

size_t CudaCopyEngine::frame_stride(size_t page_bytes) { return round_up(page_bytes, 4096); }

CudaCopyEngine::CudaCopyEngine(std::shared_ptr<const CudaContext> context,
                               std::shared_ptr<const PageSource> source,
                               std::unique_ptr<CopyEngine> reader, const CudaCopyOptions& options)
    : context_(std::move(context)),
      source_(std::move(source)),
      options_(options),
      events_(std::make_shared<CudaEvents>(context_)),
      arena_(reader ? num_frames(options) * frame_stride(options.page_bytes) : 0),
      staging_memory_(kNumStaging * kStagingBytes),
      pins_(context_, options.pin_bytes),
      staging_pins_(context_, SIZE_MAX) {
    if (reader)
        tier_ = std::make_unique<HostTier>(std::move(reader), arena_.data(), num_frames(options),
                                           frame_stride(options.page_bytes), options.num_layers,
                                           options.experts_per_layer);
    else if (!source_->in_memory())
        throw std::invalid_argument("CudaCopyEngine: this source needs a reader");
    staging_memory_.populate(0, staging_memory_.nbytes());
    if (!staging_pins_.pin(staging_memory_.data(), staging_memory_.nbytes()))
        throw DeviceError("CUDA: cannot pin " + std::to_string(staging_memory_.nbytes()) +
                          " bytes of host memory for staging: " + staging_pins_.limit());
    for (size_t i = 0; i < kNumStaging; ++i)
        staging_[i].data = staging_memory_.data() + i * kStagingBytes;
    {
        const CudaContext::Current current(*context_);
        const CudaDriver& driver = context_->driver();
        for (Stream* stream : {&demand_, &prefetch_})
            driver.check(driver.stream_create(&stream->handle, cuda::kStreamNonBlocking, 0),
                         "cuStreamCreateWithPriority",
                         "device " + std::to_string(context_->ordinal()));
    }
    if (options_.pin_in_background)
        pinner_ = std::thread([this] { pin_everything(); });
    else
        pin_everything();
    worker_ = std::thread([this] { work(); });
}

CudaCopyEngine::~CudaCopyEngine() { stop(); }

void CudaCopyEngine::submit(std::shared_ptr<CopyJob> job) {
    const Lock lock(mutex_);
    if (!start(job)) return;
    done_.push_back(transfers_.at(job.get()));
    changed_.notify_one();
}

bool CudaCopyEngine::enqueue(const std::shared_ptr<CopyJob>& job) {
    const Lock lock(mutex_);
    return start(job);
}

// True when all of the page could be enqueued at once.
bool CudaCopyEngine::start(const std::shared_ptr<CopyJob>& job) {
    const auto transfer = std::make_shared<Transfer>();
    transfer->job = job;
    transfer->demand = job->priority == Priority::kDemand;
    if (stopping_) return false;  // dropped, as everything that was queued
    transfers_[job.get()] = transfer;
    if (broken_) {
        fail(transfer, broken_);
        return false;
    }
    if (tier_) {
        const auto want = std::make_shared<HostWant>();
        want->layer = job->layer;
        want->expert = job->expert;
        want->priority = job->priority;
        want->on_ready = [this, weak = std::weak_ptr(transfer)](const CopyResult& read) {
            if (const auto waiting = weak.lock()) on_host_page(waiting, read);
        };
        transfer->want = want;
        job->result.begin_ns = now_ns();
        if (!tier_->fetch(want)) return false;
    }
    return on_host(transfer);
}

// On a reader's thread: the page has reached its frame, or not.
void CudaCopyEngine::on_host_page(const TransferPtr& transfer, const CopyResult& read) {
    const Lock lock(mutex_);
    if (stopping_) return;
    CopyJob& job = *transfer->job;
    job.result.disk_bytes += read.disk_bytes;
    if (transfer->stopped || read.cancelled) {
        job.result.cancelled = true;
        give_back(transfer);
        done_.push_back(transfer);
    } else if (read.error) {
        fail(transfer, read.error);
    } else if (on_host(transfer)) {
        done_.push_back(transfer);
    }
    changed_.notify_one();
}

// The page is in host memory. True when all of it could be enqueued at once.
bool CudaCopyEngine::on_host(const TransferPtr& transfer) {
    try {
        find_runs(*transfer);
        if (std::bernoulli_distribution(chaos_.fail_probability)(random_))
            throw PageReadError("injected failure (chaos)");
        transfer->state = Transfer::State::kQueued;
        if (transfer->demand && !chaos_.enabled() && all_pinned(*transfer)) {
            issue_rest(transfer);
            return true;
        }
    } catch (...) {
        fail(transfer, std::current_exception());
        return false;
    }
    (transfer->demand ? demands_ : prefetches_).push_back(transfer);
    changed_.notify_one();
    return false;
}

void CudaCopyEngine::find_runs(Transfer& transfer) const {
    const CopyJob& job = *transfer.job;
    if (transfer.want) {
        transfer.runs = {{tier_->address(transfer.want->frame), 0, options_.page_bytes}};
        return;
    }
    for (const Chunk& chunk : source_->chunks(job.layer, job.expert, SIZE_MAX))
        for (const Piece& piece : chunk.pieces)
            transfer.runs.push_back(
                {reinterpret_cast<const std::byte*>(chunk.offset) + piece.source_offset,
                 piece.page_offset, piece.nbytes});
}

bool CudaCopyEngine::all_pinned(const Transfer& transfer) const {
    for (const Run& run : transfer.runs)
        for (size_t done = 0; done < run.nbytes;) {
            const auto [reach, pinned] = pins_.reach(run.from + done, run.nbytes - done);
            if (!pinned) return false;
            done += reach;
        }
    return true;
}

// Before the first chunk on a stream: the slot's last readers and writers come first, and what a
// promoted page has on the other stream belongs to it too.
void CudaCopyEngine::begin(Transfer& transfer, Stream& stream) {
    if (transfer.stream == &stream) return;
    if (transfer.stream != nullptr) events_->wait(stream.handle, events_->record(prefetch_.handle));
    for (const FencePtr& fence : transfer.job->after)
        if (fence && !fence->passed()) events_->wait(stream.handle, fence);
    if (transfer.job->result.begin_ns == 0) transfer.job->result.begin_ns = now_ns();
    transfer.stream = &stream;
}

// Enqueues the next part of a page, at most max_bytes; 0 when it has to wait for a staging buffer.
size_t CudaCopyEngine::issue_next(Transfer& transfer, Stream& stream, size_t max_bytes) {
    const Run& run = transfer.runs[transfer.next_run];
    const std::byte* from = run.from + transfer.next_offset;
    auto [nbytes, pinned] =
        pins_.reach(from, std::min(run.nbytes - transfer.next_offset, max_bytes));
    Staging* staging = nullptr;
    if (!pinned) {
        staging = &staging_[next_staging_];
        if (staging->busy && !staging->busy->passed()) return 0;
        next_staging_ = (next_staging_ + 1) % kNumStaging;
        nbytes = std::min(nbytes, kStagingBytes);
        std::memcpy(staging->data, from, nbytes);
        from = staging->data;
        staged_bytes_ += nbytes;
    }
    const CudaContext::Current current(*context_);
    const CudaDriver& driver = context_->driver();
    const CopyJob& job = *transfer.job;
    std::byte* to = job.slot + run.page_offset + transfer.next_offset;
    driver.check(
        driver.memcpy_htod_async(reinterpret_cast<uintptr_t>(to), from, nbytes, stream.handle),
        "cuMemcpyHtoDAsync", std::to_string(nbytes) + " bytes into a slot");
    if (staging) staging->busy = events_->record(stream.handle);
    transfer.job->result.bytes += nbytes;
    copied_bytes_ += nbytes;
    ++num_copies_;
    transfer.next_offset += nbytes;
    if (transfer.next_offset == run.nbytes) {
        ++transfer.next_run;
        transfer.next_offset = 0;
    }
    return nbytes;
}

// Everything left of a page on the demand stream; all of it is pinned.
void CudaCopyEngine::issue_rest(const TransferPtr& transfer) {
    begin(*transfer, demand_);
    while (!transfer->finished_issuing()) issue_next(*transfer, demand_, SIZE_MAX);
    finish_issue(transfer, demand_, true);
}

void CudaCopyEngine::finish_issue(const TransferPtr& transfer, Stream& stream, bool report) {
    CopyResult& result = transfer->job->result;
    result.fence = events_->record(stream.handle);
    transfer->state = Transfer::State::kIssued;
    stream.landing.push_back({result.fence, transfer, report});
    changed_.notify_one();
}

// Ends a transfer with an error, which the worker reports.
void CudaCopyEngine::fail(const TransferPtr& transfer, std::exception_ptr error) {
    transfer->job->result.error = std::move(error);
    transfer->state = Transfer::State::kIssued;
    if (transfer->stream != nullptr) {
        // Chunks may be on their way: the frame stays locked and the slot fenced until they are.
        // Part of a promoted page may be on the prefetch stream, so both streams count.
        try {
            events_->wait(demand_.handle, events_->record(prefetch_.handle));
            finish_issue(transfer, demand_, false);
        } catch (const DeviceError&) {
            if (!broken_) broken_ = std::current_exception();
        }
    } else {
        give_back(transfer);
    }
    done_.push_back(transfer);
    changed_.notify_one();
}

// The frame is not needed any more; the worker unlocks it, outside of our lock.
void CudaCopyEngine::give_back(const TransferPtr& transfer) {
    const auto want = std::exchange(transfer->want, nullptr);
    if (want && want->frame != kNoSlot) unlocks_.push_back(want);
    transfers_.erase(transfer->job.get());
}

void CudaCopyEngine::promote(const std::shared_ptr<CopyJob>& job) {
    const Lock lock(mutex_);
    const auto entry = transfers_.find(job.get());
    if (entry == transfers_.end()) return;
    const TransferPtr transfer = entry->second;
    if (transfer->demand || transfer->state == Transfer::State::kIssued) return;
    transfer->demand = true;
    job->priority = Priority::kDemand;
    if (transfer->state == Transfer::State::kReading) {
        if (tier_->promote(transfer->want) && on_host(transfer)) done_.push_back(transfer);
        return;
    }
    prefetches_.erase(std::find(prefetches_.begin(), prefetches_.end(), transfer));
    if (chaos_.enabled() || !all_pinned(*transfer)) {
        demands_.push_back(transfer);
        changed_.notify_one();
        return;
    }
    try {
        issue_rest(transfer);
        done_.push_back(transfer);
        changed_.notify_one();
    } catch (...) {
        fail(transfer, std::current_exception());
    }
}

CopyEngine::Cancelled CudaCopyEngine::cancel(const std::shared_ptr<CopyJob>& job) {
    const Lock lock(mutex_);
    const auto entry = transfers_.find(job.get());
    if (entry == transfers_.end()) return Cancelled::kTooLate;
    const TransferPtr transfer = entry->second;
    if (transfer->demand || transfer->stopped || transfer->state == Transfer::State::kIssued)
        return Cancelled::kTooLate;
    if (transfer->state == Transfer::State::kReading) {
        if (tier_->cancel(transfer->want)) {
            give_back(transfer);
            return Cancelled::kGone;
        }
        transfer->stopped = true;  // on_host_page is about to run and reports it
        return Cancelled::kWillReport;
    }
    prefetches_.erase(std::find(prefetches_.begin(), prefetches_.end(), transfer));
    if (transfer->stream == nullptr) {
        give_back(transfer);
        changed_.notify_one();  // a frame to unlock
        return Cancelled::kGone;
    }
    job->result.cancelled = true;
    try {
        finish_issue(transfer, prefetch_, false);
        done_.push_back(transfer);
    } catch (...) {
        fail(transfer, std::current_exception());
    }
    return Cancelled::kWillReport;
}

void CudaCopyEngine::set_chaos(const Chaos& chaos) {
    const Lock lock(mutex_);
    chaos_ = chaos;
    random_.seed(chaos.seed);
    if (tier_) tier_->set_chaos({chaos.seed, chaos.max_delay_us, chaos.reorder, 0.0});
}

FencePtr CudaCopyEngine::record(StreamHandle stream) {
    FencePtr fence = events_->record(reinterpret_cast<cuda::Stream>(stream));
    const Lock lock(mutex_);
    // Only those not known to have passed matter, and only stop() asks.
    while (recorded_.size() > 64 && recorded_.front()->passed()) recorded_.pop_front();
    recorded_.push_back(fence);
    return fence;
}

void CudaCopyEngine::wait(StreamHandle stream, const FencePtr& fence) {
    events_->wait(reinterpret_cast<cuda::Stream>(stream), fence);
}

std::map<std::string, uint64_t> CudaCopyEngine::stats() const {
    std::map<std::string, uint64_t> stats;
    {
        const Lock lock(mutex_);
        stats = {{"copied_bytes", copied_bytes_},
                 {"staged_bytes", staged_bytes_},
                 {"num_copies", num_copies_}};
    }
    stats["pinned_bytes"] = pins_.pinned_bytes() + staging_pins_.pinned_bytes();
    stats["pinning"] = pinning_ ? 1 : 0;
    stats["host_bytes"] = arena_.nbytes();
    if (tier_) {
        const HostTier::Counters counters = tier_->counters();
        stats["host_hits"] = counters.hits;
        stats["host_misses"] = counters.misses;
        stats["host_evictions"] = counters.evictions;
    }
    return stats;
}

}  // namespace moe_offload
