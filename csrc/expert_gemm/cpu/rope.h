// Rotary position embeddings, in place (Su et al., "RoFormer", arXiv 2104.09864).
//
// As transformers' models write them: x * cos + rotate_half(x) * sin, where rotate_half puts the
// second half of the rotated elements, negated, in front of the first, and each product and the sum
// are rounded to the dtype. Bits are torch's, on every instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

struct RopeArgs {
    std::byte* x;  // [rows, heads, size], contiguous
    int64_t rows, heads, size;
    const std::byte* cos;  // of row 0, `rotated` elements in x's dtype
    const std::byte* sin;
    int64_t row_stride;  // bytes from row to row of cos and of sin
    int64_t rotated;     // even; the first elements of a head, the others stay
};

void rotate(const RopeArgs& args, Dtype dtype);

}  // namespace moe_offload
