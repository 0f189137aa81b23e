#include "expert_gemm/cpu/thread_pool.h"

#include <pthread.h>

#include <chrono>

#include "expert_gemm/cpu/openmp.h"

namespace moe_offload {
namespace {

std::atomic<bool> forked{false};  // set in a child of fork(), which has none of the threads

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins until done() or until `limit` has passed; true when done.
template <typename F>
bool spin(std::chrono::microseconds limit, const F& done) {
    const auto end = std::chrono::steady_clock::now() + limit;
    do {
        for (int i = 0; i < 64; ++i) {
            if (done()) return true;
            relax();
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

constexpr std::chrono::microseconds kSpin{20};

}  // namespace

ThreadPool& ThreadPool::shared() {
    // Never destroyed: at exit another thread may still be inside, and a forked child could not
    // join threads it does not have.
    static ThreadPool* const pool = [] {
        pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
        return new ThreadPool;
    }();
    return *pool;
}

ThreadPool::~ThreadPool() {
    stop_.store(true);
    state_.fetch_add(kLoop);
    state_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::grow(int num_workers) {
    while (static_cast<int>(workers_.size()) < num_workers) {
        const int number = static_cast<int>(workers_.size());
        workers_.emplace_back([this, number] { work(number); });
    }
}

void ThreadPool::run_erased(int num_threads, int64_t num_tasks, void* context, Call call) {
    const int wanted =
        static_cast<int>(num_threads - 1 < num_tasks - 1 ? num_threads - 1 : num_tasks - 1);
    if (wanted >= 1 && !forked.load(std::memory_order_relaxed))
        if (const OpenMpParallel parallel = torch_openmp()) {
            // All its threads each time: a team that changes its size makes and ends threads.
            Loop loop{{0}, num_tasks, context, call};
            parallel([](void* data) { static_cast<Loop*>(data)->take_tasks(); }, &loop,
                     static_cast<unsigned>(num_threads), 0);
            return;
        }
    std::unique_lock<std::mutex> mine(caller_, std::defer_lock);
    if (wanted < 1 || forked.load(std::memory_order_relaxed) || !mine.try_lock()) {
        for (int64_t task = 0; task < num_tasks; ++task) call(context, task);
        return;
    }
    grow(wanted);
    wanted_ = wanted;
    loop_.num_tasks = num_tasks;
    loop_.context = context;
    loop_.call = call;
    loop_.next.store(0, std::memory_order_relaxed);
    state_.fetch_add(kLoop | kOpen);  // sequentially consistent with sleeping_ below and in work()
    if (sleeping_.load() > 0) state_.notify_all();
    loop_.take_tasks();
    state_.fetch_sub(kOpen);
    const auto left = [this] { return (state_.load(std::memory_order_acquire) & kInside) == 0; };
    while (!spin(kSpin, left)) std::this_thread::yield();  // a worker lost its core mid-task
}

void ThreadPool::Loop::take_tasks() {
    for (;;) {
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= num_tasks) return;
        call(context, task);
    }
}

void ThreadPool::work(int number) {
    uint64_t seen = 0;  // number of the last loop looked at
    while (!stop_.load(std::memory_order_relaxed)) {
        uint64_t state = state_.load(std::memory_order_acquire);
        const auto news = [&] {
            state = state_.load(std::memory_order_acquire);
            return state / kLoop != seen;
        };
        if (!spin(kSpin, news)) {
            sleeping_.fetch_add(1);
            state = state_.load();
            while (state / kLoop == seen) {
                state_.wait(state);
                state = state_.load();
            }
            sleeping_.fetch_sub(1);
        }
        seen = state / kLoop;
        while ((state & kOpen) && state / kLoop == seen) {
            if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acq_rel))
                continue;
            if (number < wanted_) loop_.take_tasks();
            state_.fetch_sub(1, std::memory_order_release);
            break;
        }
    }
}

}  // namespace moe_offload
