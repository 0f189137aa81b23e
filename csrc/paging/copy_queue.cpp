#include "copy_queue.h"

#include <algorithm>
#include <utility>

#include "clock.h"
#include "errors.h"

namespace moe_offload {

CopyQueue::CopyQueue(std::shared_ptr<const PageSource> source, size_t chunk_bytes,
                     size_t max_prefetch_chunks)
    : source_(std::move(source)),
      chunk_bytes_(chunk_bytes),
      max_prefetch_chunks_(max_prefetch_chunks) {}

void CopyQueue::push(std::shared_ptr<CopyJob> job) {
    (job->priority == Priority::kDemand ? demand_ : prefetch_).push_back(std::move(job));
}

void CopyQueue::promote(const std::shared_ptr<CopyJob>& job) {
    if (job->priority == Priority::kDemand) return;
    job->priority = Priority::kDemand;
    const auto found = std::find(prefetch_.begin(), prefetch_.end(), job);
    if (found == prefetch_.end()) return;  // all its chunks have started, or it comes back to queue
    prefetch_.erase(found);
    demand_.push_back(job);
}

CopyEngine::Cancelled CopyQueue::cancel(const std::shared_ptr<CopyJob>& job) {
    const auto found = std::find(prefetch_.begin(), prefetch_.end(), job);
    const bool sending_back =
        job->sending_back && !job->stopped && job->priority == Priority::kPrefetch;
    if (found == prefetch_.end() && !sending_back) return CopyEngine::Cancelled::kTooLate;
    if (found != prefetch_.end()) prefetch_.erase(found);
    if (job->chunks_in_flight == 0) return CopyEngine::Cancelled::kGone;
    job->stopped = true;
    job->result.cancelled = true;
    return CopyEngine::Cancelled::kWillReport;
}

void CopyQueue::clear() {
    demand_.clear();
    prefetch_.clear();
}

void CopyQueue::set_chaos(const Chaos& chaos) {
    chaos_ = chaos;
    random_.seed(chaos.seed);
}

bool CopyQueue::ready() const {
    return !demand_.empty() || (!prefetch_.empty() && prefetch_in_flight_ < max_prefetch_chunks_);
}

std::optional<CopyQueue::Step> CopyQueue::take() {
    if (!ready()) return std::nullopt;
    Jobs& jobs = demand_.empty() ? prefetch_ : demand_;
    if (chaos_.reorder && jobs.size() > 1) std::swap(jobs.front(), jobs[random_() % jobs.size()]);
    Step step;
    step.job = jobs.front();
    CopyJob& job = *step.job;
    if (job.result.begin_ns == 0) job.result.begin_ns = now_ns();
    step.send_back = job.leaving != nullptr;
    if (step.send_back) {
        job.sending_back = true;
    } else if (!job.planned) {
        job.planned = true;
        try {
            size_t nbytes = chunk_bytes_;
            if (source_->straight(job.layer, job.expert, job.slot))
                nbytes *= job.priority == Priority::kDemand ? kDemandChunks : kPrefetchChunks;
            job.chunks = source_->chunks(job.layer, job.expert, nbytes);
            if (std::bernoulli_distribution(chaos_.fail_probability)(random_))
                throw PageReadError("injected failure (chaos)");
        } catch (...) {
            step.error = std::current_exception();
            job.chunks.clear();
        }
    }
    if (job.next_chunk < job.chunks.size()) step.chunk = &job.chunks[job.next_chunk++];
    if (job.next_chunk >= job.chunks.size()) remove(step.job);  // also while it sends back
    ++job.chunks_in_flight;
    step.prefetch = job.priority == Priority::kPrefetch;
    if (step.prefetch) ++prefetch_in_flight_;
    if ((step.chunk != nullptr || step.send_back) && chaos_.max_delay_us > 0)
        step.delay_us = std::uniform_int_distribution<int64_t>(0, chaos_.max_delay_us)(random_);
    return step;
}

void CopyQueue::arrived(Step& step) {
    if (std::exchange(step.prefetch, false)) --prefetch_in_flight_;
}

std::function<void()> CopyQueue::finish(const Step& step, std::exception_ptr error,
                                        uint64_t disk_bytes) {
    CopyJob& job = *step.job;
    if (step.prefetch) --prefetch_in_flight_;
    --job.chunks_in_flight;
    job.result.disk_bytes += disk_bytes;
    if (!error && step.chunk != nullptr) job.result.bytes += step.chunk->nbytes;
    if (error && !job.result.error) {
        job.result.error = error;
        job.stopped = true;
        remove(step.job);
    }
    if (step.send_back) {
        job.sending_back = false;
        if (!error) job.result.swap_back_bytes = job.swap_back->page_bytes();
        job.leaving = nullptr;
        if (!job.stopped) {
            (job.priority == Priority::kDemand ? demand_ : prefetch_).push_front(step.job);
            return nullptr;
        }
    }
    const bool all_started = job.stopped || job.next_chunk >= job.chunks.size();
    if (job.chunks_in_flight > 0 || !all_started) return nullptr;
    job.result.end_ns = now_ns();
    return
        [job = step.job, on_done = std::exchange(job.on_done, nullptr)] { on_done(job->result); };
}

void CopyQueue::remove(const std::shared_ptr<CopyJob>& job) {
    for (Jobs* jobs : {&demand_, &prefetch_}) {
        const auto found = std::find(jobs->begin(), jobs->end(), job);
        if (found != jobs->end()) jobs->erase(found);
    }
}

}  // namespace moe_offload
