#include "expert_gemm/cpu/multiply_roof.h"

#include <chrono>

namespace moe_offload {

MultiplyRoof multiply_roof(const Kernels& kernels, double seconds) {
    using Clock = std::chrono::steady_clock;
    constexpr double kWorthTiming = 1e-3;  // a call this long hides what surrounds its loop
    MultiplyRoof roof;
    int64_t rounds = 1;
    do {
        const auto start = Clock::now();
        const int64_t operations = kernels.multiply(rounds);
        const double took = std::chrono::duration<double>(Clock::now() - start).count();
        if (took < kWorthTiming) {
            rounds *= 2;
            continue;
        }
        roof.operations += operations;
        roof.seconds += took;
    } while (roof.seconds < seconds);
    return roof;
}

}  // namespace moe_offload
