// The launchers: each takes one parameter struct and the caller's stream, starts work and returns.
// They never wait for the device and allocate nothing, so all can be captured in a CUDA graph. The
// caller has made the device current (Python does, see moe_offload/cuda_kernels.py). A launch that
// fails is a CudaError that says which call, and leaves the process usable.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "expert_gemm/cuda/params.h"
#include "expert_gemm/cuda/variants.h"

namespace moe_offload::cuda {

class CudaError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

using Stream = void*;  // cudaStream_t, without CUDA's headers

// decode_up then decode_down. `dependent`: let the second start while the first drains (sm_90+).
void launch_decode(const ExpertParams& params, const DecodeVariant& variant, bool dependent,
                   Stream stream);

// launch_decode for pages that are not plain.
void launch_decode_quantised(const ExpertParams& params, const DecodeVariant& variant,
                             bool dependent, Stream stream);

// launch_decode for plain pages stored [k, rows].
void launch_decode_transposed(const ExpertParams& params, const DecodeVariant& variant,
                              bool dependent, Stream stream);

// Both projections of the groups given, rows left in `partial` (of dtype) by sorted row.
void launch_prefill(const ExpertParams& params, int block_m, Stream stream);

// launch_prefill for pages that are not plain.
void launch_prefill_quantised(const ExpertParams& params, int block_m, Stream stream);

// launch_prefill for plain pages stored [k, rows].
void launch_prefill_transposed(const ExpertParams& params, int block_m, Stream stream);

// The same on sm_90a, by wgmma. Plain weights [rows, k] in a slab (no page table) of `num_slots`
// slots.
void launch_prefill_sm90(const ExpertParams& params, int64_t num_slots, int block_m, Stream stream);

// After all groups of a prefill layer: the tokens' weighted sums.
void launch_combine(const ExpertParams& params, Stream stream);

}  // namespace moe_offload::cuda
