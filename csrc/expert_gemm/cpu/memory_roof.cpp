#include "expert_gemm/cpu/memory_roof.h"

#include <chrono>
#include <cstring>

namespace moe_offload {
namespace {

template <bool Prefetch>
uint64_t sum_of(const std::byte* data, size_t nbytes, size_t ahead) {
    uint64_t sums[8] = {};
    for (size_t i = 0; i < nbytes; i += 64) {
        if constexpr (Prefetch) __builtin_prefetch(data + i + ahead, 0, 2);
        uint64_t line[8];
        std::memcpy(line, data + i, 64);
        for (int j = 0; j < 8; ++j) sums[j] += line[j];
    }
    uint64_t sum = 0;
    for (const uint64_t part : sums) sum += part;
    return sum;
}

}  // namespace

MemoryRoof memory_roof(const std::byte* data, size_t nbytes, size_t ahead) {
    const auto start = std::chrono::steady_clock::now();
    MemoryRoof roof;
    roof.sum = ahead ? sum_of<true>(data, nbytes, ahead) : sum_of<false>(data, nbytes, 0);
    roof.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return roof;
}

}  // namespace moe_offload
