#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Saves the registers a call must preserve on the present stack, stores the stack pointer in *from
// and continues at `to`. Floating point control words are the process's and never changed here.
extern "C" void simt_switch_stack(void** from, void* to);
asm(R"(
.text
.globl simt_switch_stack
.hidden simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size simt_switch_stack, .-simt_switch_stack
)");
#endif

namespace simt {

struct Fiber::State {
    void* stack = nullptr;
    size_t stack_bytes = 0;
    std::function<void()> entry;
    bool done = true;
#if defined(__x86_64__)
    void* fiber_sp = nullptr;
    void* scheduler_sp = nullptr;
#else
    ucontext_t fiber_context{};
    ucontext_t scheduler_context{};
#endif
    // What the sanitizer wants to know of the other side of a switch.
    void* fiber_fake_stack = nullptr;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;

    void to_fiber() {
#if defined(SIMT_ASAN)
        __sanitizer_start_switch_fiber(&scheduler_fake_stack, stack, stack_bytes);
#endif
#if defined(__x86_64__)
        simt_switch_stack(&scheduler_sp, fiber_sp);
#else
        swapcontext(&scheduler_context, &fiber_context);
#endif
#if defined(SIMT_ASAN)
        __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
    }

    void to_scheduler(bool last) {
#if defined(SIMT_ASAN)
        __sanitizer_start_switch_fiber(last ? nullptr : &fiber_fake_stack, scheduler_stack,
                                       scheduler_stack_bytes);
#else
        (void)last;
#endif
#if defined(__x86_64__)
        simt_switch_stack(&fiber_sp, scheduler_sp);
#else
        swapcontext(&fiber_context, &scheduler_context);
#endif
        arrived(fiber_fake_stack);
    }

    void arrived(void* fake_stack) {
#if defined(SIMT_ASAN)
        __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#else
        (void)fake_stack;
#endif
    }

    static thread_local State* starting;  // makecontext passes no pointers

    static void run() {
        State* self = starting;
        self->arrived(nullptr);
        self->entry();
        self->done = true;
        self->to_scheduler(true);
        __builtin_unreachable();
    }
};

thread_local Fiber::State* Fiber::State::starting = nullptr;

Fiber::Fiber(size_t stack_bytes) : state_(std::make_unique<State>()) {
    void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    state_->stack = stack;
    state_->stack_bytes = stack_bytes;
}

Fiber::~Fiber() {
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(state_->stack, state_->stack_bytes);
#endif
    munmap(state_->stack, state_->stack_bytes);
}

void Fiber::start(std::function<void()> entry) {
    State& s = *state_;
#if defined(SIMT_ASAN)
    __asan_unpoison_memory_region(s.stack, s.stack_bytes);  // frames that were never left
#endif
    s.entry = std::move(entry);
    s.done = false;
    s.fiber_fake_stack = nullptr;
#if defined(__x86_64__)
    // As if simt_switch_stack had been called from the first instruction of run(): six registers,
    // then its address; the stack is then aligned as it is at the entry of a function.
    auto top = (reinterpret_cast<uintptr_t>(s.stack) + s.stack_bytes) & ~uintptr_t(15);
    auto* sp = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 6; ++i) sp[i] = nullptr;
    sp[6] = reinterpret_cast<void*>(&State::run);
    sp[7] = nullptr;  // run() returns to nowhere
    s.fiber_sp = sp;
#else
    getcontext(&s.fiber_context);
    s.fiber_context.uc_stack.ss_sp = s.stack;
    s.fiber_context.uc_stack.ss_size = s.stack_bytes;
    s.fiber_context.uc_link = nullptr;
    makecontext(&s.fiber_context, &State::run, 0);
#endif
}

void Fiber::resume() {
    State::starting = state_.get();
    state_->to_fiber();
}

void Fiber::suspend() { state_->to_scheduler(false); }

bool Fiber::done() const { return state_->done; }

}  // namespace simt
