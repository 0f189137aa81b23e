// How the products of a layer's experts and of a dense layer are cut into tasks for threads.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "expert_gemm/cpu/buffers.h"
#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

// Waking a thread pays from about this much work on, in bytes read (about 20 us).
constexpr int64_t kWorthSharing = 256 << 10;
// A thread keeps a chunk of weight rows to itself, so chunks bound the imbalance; below 64 KiB they
// cost more.
constexpr int64_t kChunksPerThread = 32, kMinChunkBytes = 64 << 10;

// `rows` rounded up to whole steps, one at least.
constexpr int64_t whole_steps(int64_t rows, int64_t step) {
    return std::max(step, (rows + step - 1) / step * step);
}

// A task's scratch, uninitialised (ProductArgs::scratch).
inline Buffer make_scratch(size_t nbytes) { return nbytes ? Buffer(nbytes) : Buffer(); }

}  // namespace moe_offload
