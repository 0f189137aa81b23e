// What every copy engine for files promises, on real files: worker threads and io_uring, direct and
// buffered. Order within the queue is test_copy_queue.cpp, a steerable source is in
// test_host_copy_engine.cpp.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <future>
#include <semaphore>
#include <set>

#include "check.h"
#include "paging/errors.h"
#include "paging/file_source.h"
#include "paging/make_copy_engine.h"
#include "temporary_directory.h"

using namespace moe_offload;
namespace fs = std::filesystem;

namespace {

constexpr size_t kChunk = 8192;
constexpr size_t kPageBytes = 5 * kChunk + 777;
constexpr int32_t kPages = 24;

// Pages one after the other at an odd place of a file, in two pieces that swap places.
struct Fixture {
    TemporaryDirectory directory;
    fs::path path = directory.path / "pages";
    std::vector<char> bytes = random_bytes(104 + kPages * kPageBytes, 1);
    std::shared_ptr<FileSource> source;
    std::string kind;

    Fixture(std::string engine, bool direct) : kind(std::move(engine)) {
        write_file(path, bytes);
        source = std::make_shared<FileSource>(std::vector<std::string>{path}, direct);
        for (int32_t page = 0; page < kPages; ++page) {
            const uint64_t begin = 104 + static_cast<uint64_t>(page) * kPageBytes;
            source->add_page(0, page,
                             {{0, begin, 20'000, kPageBytes - 20'000},
                              {0, begin + 20'000, kPageBytes - 20'000, 0}});
        }
    }
    std::unique_ptr<CopyEngine> engine(int width) const {
        return make_copy_engine(source, {kind, width, width, kChunk});
    }
    bool holds(const std::vector<std::byte>& slot, int32_t page) const {
        const char* from = bytes.data() + 104 + static_cast<size_t>(page) * kPageBytes;
        return std::memcmp(slot.data() + kPageBytes - 20'000, from, 20'000) == 0 &&
               std::memcmp(slot.data(), from + 20'000, kPageBytes - 20'000) == 0;
    }
};

struct Copy {
    std::vector<std::byte> slot = std::vector<std::byte>(kPageBytes, std::byte{0xee});
    std::promise<CopyResult> done;
    std::atomic<int> reports{0};
    std::shared_ptr<CopyJob> job = std::make_shared<CopyJob>();

    Copy(int32_t page, Priority priority) {
        job->expert = page;
        job->slot = slot.data();
        job->priority = priority;
        job->on_done = [this](const CopyResult& result) {
            if (++reports == 1) done.set_value(result);
        };
    }
    CopyResult wait() { return done.get_future().get(); }
};

using Copies = std::vector<std::unique_ptr<Copy>>;

void pages_arrive_whole(const Fixture& files) {
    const auto engine = files.engine(4);
    CHECK_EQ(engine->name(), files.kind);
    Copies copies;
    for (int32_t page = 0; page < kPages; ++page) {
        const Priority priority = page % 3 == 0 ? Priority::kPrefetch : Priority::kDemand;
        copies.push_back(std::make_unique<Copy>(page, priority));
        engine->submit(copies.back()->job);
    }
    for (int32_t page = 0; page < kPages; ++page) {
        const CopyResult result = copies[size_t(page)]->wait();
        CHECK(!result.error && !result.cancelled);
        CHECK_EQ(result.bytes, kPageBytes);
        CHECK(result.disk_bytes >= kPageBytes);
        CHECK(result.disk_bytes <= kPageBytes + 2 * Scratch::kAlign);
        CHECK(result.begin_ns <= result.end_ns);
        CHECK(files.holds(copies[size_t(page)]->slot, page));
    }
}

// The page in a slot leaves whole before a byte of the next one comes, wherever in the slot both
// begin; also of jobs that are cancelled or fail after that.
void what_lay_in_the_slot_is_sent_back_first(const Fixture& files) {
    const auto engine = files.engine(3);
    engine->set_chaos({.seed = 3, .max_delay_us = 200, .reorder = true, .fail_probability = 0.1});
    constexpr size_t kLeaving = 3 * kChunk + 5;
    std::atomic<uint64_t> sent = 0;
    const auto swap_back =
        std::make_shared<SwapBack>(kLeaving, [&](const std::byte* page, const std::byte* copy) {
            CHECK(std::memcmp(page, copy, kLeaving) == 0);
            for (size_t i = 0; i < kLeaving; ++i) CHECK(copy[i] == std::byte{0xee});
            sent += kLeaving;
        });
    std::mt19937 random(5);
    Copies copies;
    uint64_t counted = 0;
    std::set<size_t> gone;
    for (int32_t i = 0; i < 200; ++i) {
        copies.push_back(std::make_unique<Copy>(
            i % kPages, i % 2 == 0 ? Priority::kPrefetch : Priority::kDemand));
        const auto& job = copies.back()->job;
        job->leaving = copies.back()->slot.data() + random() % (kPageBytes - kLeaving);
        job->swap_back = swap_back;
        engine->submit(job);
        const size_t other = random() % copies.size();
        if (i % 5 == 0) engine->promote(copies[other]->job);
        if (i % 3 == 0 && engine->cancel(copies[other]->job) == CopyEngine::Cancelled::kGone) {
            const CopyJob& unsent = *copies[other]->job;
            CHECK_EQ(unsent.leaving == nullptr, unsent.result.swap_back_bytes == kLeaving);
            counted += unsent.result.swap_back_bytes;
            gone.insert(other);
        }
    }
    int failed = 0;
    for (size_t i = 0; i < copies.size(); ++i) {
        if (gone.contains(i)) continue;
        const CopyResult result = copies[i]->wait();
        CHECK_EQ(result.swap_back_bytes, kLeaving);
        counted += kLeaving;
        failed += result.error != nullptr;
        if (result.error || result.cancelled) continue;
        CHECK_EQ(result.bytes, kPageBytes);
        CHECK(files.holds(copies[i]->slot, copies[i]->job->expert));
    }
    engine->stop();
    CHECK_EQ(counted, sent.load());
    CHECK(failed > 0 && !gone.empty());
}

// The engine is held in a report, so what is queued behind is decided before any of it starts.
void demands_and_promoted_prefetches_go_first(const Fixture& files) {
    const auto engine = files.engine(1);
    std::binary_semaphore reported(0), go_on(0);
    Copy first(0, Priority::kDemand);
    first.job->on_done = [&](const CopyResult&) {
        reported.release();
        go_on.acquire();
    };
    engine->submit(first.job);
    reported.acquire();
    std::vector<int32_t> order;  // one thread reports
    std::promise<void> all;
    Copies copies;
    for (int32_t page = 1; page <= 6; ++page) {
        copies.push_back(
            std::make_unique<Copy>(page, page <= 4 ? Priority::kPrefetch : Priority::kDemand));
        copies.back()->job->on_done = [&, page](const CopyResult&) {
            order.push_back(page);
            if (order.size() == 5) all.set_value();
        };
        engine->submit(copies.back()->job);
    }
    CHECK(engine->cancel(copies[0]->job) == CopyEngine::Cancelled::kGone);
    CHECK(engine->cancel(copies[5]->job) == CopyEngine::Cancelled::kTooLate);  // a demand
    engine->promote(copies[2]->job);
    go_on.release();
    all.get_future().wait();
    CHECK_EQ(order, (std::vector<int32_t>{5, 6, 3, 2, 4}));
}

void each_job_is_reported_once_or_gone(const Fixture& files) {
    const auto engine = files.engine(3);
    engine->set_chaos({.seed = 7, .max_delay_us = 300, .reorder = true, .fail_probability = 0.1});
    std::mt19937 random(11);
    Copies copies;
    std::vector<size_t> gone;
    for (int round = 0; round < 400; ++round) {
        const auto page = static_cast<int32_t>(random() % kPages);
        copies.push_back(std::make_unique<Copy>(
            page, random() % 3 == 0 ? Priority::kDemand : Priority::kPrefetch));
        engine->submit(copies.back()->job);
        const size_t other = random() % copies.size();
        if (random() % 4 == 0) engine->promote(copies[other]->job);
        if (random() % 4 == 0 && engine->cancel(copies[other]->job) == CopyEngine::Cancelled::kGone)
            gone.push_back(other);
    }
    int failed = 0, cancelled = 0;
    for (size_t i = 0; i < copies.size(); ++i) {
        if (std::find(gone.begin(), gone.end(), i) != gone.end()) continue;
        const CopyResult result = copies[i]->wait();
        failed += result.error != nullptr;
        cancelled += result.cancelled;
        if (result.error || result.cancelled) continue;
        CHECK_EQ(result.bytes, kPageBytes);
        CHECK(files.holds(copies[i]->slot, copies[i]->job->expert));
    }
    engine->stop();
    for (size_t i = 0; i < copies.size(); ++i) {
        const bool is_gone = std::find(gone.begin(), gone.end(), i) != gone.end();
        CHECK_EQ(copies[i]->reports.load(), is_gone ? 0 : 1);
    }
    CHECK(failed > 5 && failed < 120);
    CHECK(!gone.empty());
    std::printf("(%d failed, %d cancelled, %zu gone) ", failed, cancelled, gone.size());
}

void a_changed_file_is_an_error_and_the_engine_goes_on(const Fixture& files) {
    const auto engine = files.engine(2);
    const auto time = fs::last_write_time(files.path);
    fs::last_write_time(files.path, time + std::chrono::seconds(1));
    Copy changed(1, Priority::kDemand);
    engine->submit(changed.job);
    const CopyResult result = changed.wait();
    CHECK_THROWS(PageReadError, "changed while in use", std::rethrow_exception(result.error));
    fs::last_write_time(files.path, time);
    Copy restored(1, Priority::kDemand);
    engine->submit(restored.job);
    CHECK(!restored.wait().error);
    CHECK(files.holds(restored.slot, 1));

    fs::resize_file(files.path, 104 + 2 * kPageBytes);
    Copy cut(kPages - 1, Priority::kDemand);
    engine->submit(cut.job);
    CHECK_THROWS(PageReadError, "changed while in use", std::rethrow_exception(cut.wait().error));

    Copy unknown(kPages, Priority::kDemand);
    engine->submit(unknown.job);
    CHECK_THROWS(std::invalid_argument, "no page for layer 0 expert 24",
                 std::rethrow_exception(unknown.wait().error));
    write_file(files.path, files.bytes);
}

void stop_waits_for_what_runs_and_drops_the_rest(const Fixture& files) {
    for (int round = 0; round < 20; ++round) {
        auto engine = files.engine(2);
        engine->set_chaos({.seed = unsigned(round), .max_delay_us = 5000});
        Copies copies;
        for (int32_t page = 0; page < kPages; ++page) {
            copies.push_back(std::make_unique<Copy>(page, Priority::kDemand));
            engine->submit(copies.back()->job);
        }
        if (round % 2 == 0) copies[0]->wait();
        engine->stop();
        engine->stop();  // twice is fine
        int reported = 0;
        for (const auto& copy : copies) reported += copy->reports;
        CHECK(reported < kPages);
        Copy late(0, Priority::kDemand);
        engine->submit(late.job);
        engine.reset();
        CHECK_EQ(late.reports.load(), 0);
        // Nothing writes into a slot after stop: the sanitizers watch that these are freed.
    }
}

void unknown_kinds_and_sources_are_refused() {
    const auto files = std::make_shared<FileSource>(std::vector<std::string>{}, true);
    CHECK_THROWS(std::invalid_argument, "expected auto, io_uring or threads, got aio",
                 make_copy_engine(files, {.kind = "aio"}));
    class Memory final : public PageSource {
        std::vector<Chunk> chunks(int32_t, int32_t, size_t) const override { return {}; }
        uint64_t read(int32_t, int32_t, const Chunk&, std::byte*, Scratch&) const override {
            return 0;
        }
    };
    CHECK_THROWS(std::invalid_argument, "io_uring reads files",
                 make_copy_engine(std::make_shared<Memory>(), {.kind = "io_uring"}));
    CHECK_EQ(make_copy_engine(std::make_shared<Memory>(), {})->name(), std::string("threads"));
    const std::string why_not = why_no_io_uring();
    CHECK_EQ(make_copy_engine(files, {})->name(),
             std::string(why_not.empty() ? "io_uring" : "threads"));
    if (!why_not.empty())
        CHECK_THROWS(std::invalid_argument, why_not, make_copy_engine(files, {.kind = "io_uring"}));
}

}  // namespace

int main() {
    RUN(unknown_kinds_and_sources_are_refused);
    const std::string why_not = why_no_io_uring();
    if (!why_not.empty()) std::printf("io_uring: skipped, %s\n", why_not.c_str());
    for (const std::string kind : {"threads", "io_uring"}) {
        if (kind == "io_uring" && !why_not.empty()) continue;
        for (const bool direct : {true, false}) {
            std::printf("%s, %s\n", kind.c_str(), direct ? "direct" : "buffered");
            const auto with_files = [&](auto test) {
                return [&, test] { test(Fixture(kind, direct)); };
            };
            check::run("pages_arrive_whole", with_files(pages_arrive_whole));
            check::run("demands_and_promoted_prefetches_go_first",
                       with_files(demands_and_promoted_prefetches_go_first));
            check::run("what_lay_in_the_slot_is_sent_back_first",
                       with_files(what_lay_in_the_slot_is_sent_back_first));
            check::run("each_job_is_reported_once_or_gone",
                       with_files(each_job_is_reported_once_or_gone));
            check::run("a_changed_file_is_an_error_and_the_engine_goes_on",
                       with_files(a_changed_file_is_an_error_and_the_engine_goes_on));
            check::run("stop_waits_for_what_runs_and_drops_the_rest",
                       with_files(stop_waits_for_what_runs_and_drops_the_rest));
        }
    }
}
