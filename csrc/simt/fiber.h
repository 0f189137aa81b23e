// A function with a stack of its own that can stop in the middle and be resumed: what a GPU thread
// is in emulation. One scheduler, one OS thread. On x86-64 a switch is a dozen instructions;
// elsewhere it is swapcontext (about twenty times slower). The address sanitizer is told of each
// switch, so it checks fibers as it checks any stack.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>

namespace simt {

class Fiber {
  public:
    explicit Fiber(size_t stack_bytes = 256 * 1024);
    ~Fiber();
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    // Makes `entry` what the next resume() begins with. A function that never ended is forgotten;
    // its destructors do not run. `entry` must not throw.
    void start(std::function<void()> entry);
    // Runs until the function suspends or ends.
    void resume();
    // Called inside the fiber: back to whoever resumed it.
    void suspend();
    bool done() const;

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace simt
