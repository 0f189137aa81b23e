// y = x W^T + b for a model's dense layers, with the kernels of the experts' second product.
//
// In decode a third or more of the bytes an MoE model reads are dense layers, and torch's product
// of a few 16-bit rows reads them at half of memory's rate (bench/linear.py). Bits depend on the
// instruction set, the dtype and on whether rows are few (kernels.h), not on threads, chunks or
// what else is multiplied in the same call.
#pragma once

#include <span>

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

struct LinearInput {
    const void* x;  // [rows, in], contiguous, in the kernels' dtype; so are the others
    int64_t rows, in;
};

struct LinearOutput {
    int64_t out;
    const std::byte* weight;  // [out] rows of `in` elements
    int64_t row_stride;       // bytes
    const std::byte* bias;    // [out] or null
    void* y;                  // [rows, out]
};

// Several layers of one input share their threads: no waiting between them.
void linear(const LinearInput& input, std::span<const LinearOutput> outputs, Dtype dtype,
            const Kernels& kernels, int num_threads);

}  // namespace moe_offload
