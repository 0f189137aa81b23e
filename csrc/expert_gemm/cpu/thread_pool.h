// Threads that share loops with the caller: torch's where there is torch (openmp.h says why), else
// a few persistent ones, as follows.
//
// The caller takes part and never waits for a thread that has not begun: threads that wake late
// find the loop closed and go back to sleep, so a call costs no more than doing it alone. After a
// loop a thread spins for a moment (the phases of one FFN follow each other within microseconds),
// then sleeps, because torch's own threads want the same cores.
//
// Any thread may call `run`; while one caller has the pool, others do their loop alone (OpenMP has
// threads for each). A forked child has no threads and does everything alone.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <type_traits>
#include <vector>

namespace moe_offload {

class ThreadPool {
  public:
    static ThreadPool& shared();  // lives as long as the process

    ThreadPool() = default;
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // body(task) for every task in [0, num_tasks), each once, in no order, on at most num_threads
    // threads. Returns when all are done. The body must not throw and not call run.
    template <typename F>
    void run(int num_threads, int64_t num_tasks, F&& body) {
        using Body = std::remove_reference_t<F>;
        run_erased(num_threads, num_tasks, &body,
                   [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); });
    }

  private:
    using Call = void (*)(void* context, int64_t task);

    void run_erased(int num_threads, int64_t num_tasks, void* context, Call call);
    void work(int number);
    void grow(int num_workers);

    // Number of the loop << 17 | open << 16 | workers inside. A worker may look at the loop below
    // only after it has counted itself in while the loop was open.
    static constexpr uint64_t kOpen = 1u << 16, kInside = kOpen - 1, kLoop = uint64_t{1} << 17;
    std::atomic<uint64_t> state_{0};
    std::atomic<int> sleeping_{0};
    std::atomic<bool> stop_{false};

    std::mutex caller_;  // held by the thread whose loop it is
    std::vector<std::thread> workers_;

    struct Loop {
        alignas(64) std::atomic<int64_t> next{0};
        int64_t num_tasks = 0;
        void* context = nullptr;
        Call call = nullptr;
        void take_tasks();
    };
    Loop loop_;
    int wanted_ = 0;  // workers numbered below take part in it
};

}  // namespace moe_offload
