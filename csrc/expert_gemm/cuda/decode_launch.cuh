// The decode kernels of decode.h as CUDA entry points, and their launcher, for one format of
// weights: decode.cu has the plain ones, decode_transposed.cu and decode_quantised.cu the others.
#pragma once

#include "expert_gemm/cuda/check.cuh"
#include "expert_gemm/cuda/decode.h"
#include "expert_gemm/cuda/launch.h"

namespace moe_offload::cuda {
namespace {

extern __shared__ __align__(16) unsigned char shared_memory[];

// Two blocks of 256 threads per SM need at most 128 registers; four token groups need more, and
// one block of them still has 48 KiB in flight.
constexpr int min_blocks(int token_groups) { return token_groups <= 2 ? 2 : 1; }

template <class T, class Format, int kTokenGroups>
__global__ void __launch_bounds__(32 * kDecodeMaxWarps, min_blocks(kTokenGroups))
    decode_up_kernel(const __grid_constant__ ExpertParams params) {
    decode_up<T, Format, kTokenGroups>(params, int(blockDim.x) / 32, shared_memory);
}

template <class T, class Format, int kTokenGroups>
__global__ void __launch_bounds__(32 * kDecodeMaxWarps, min_blocks(kTokenGroups))
    decode_down_kernel(const __grid_constant__ ExpertParams params) {
    decode_down<T, Format, kTokenGroups>(params, int(blockDim.x) / 32, shared_memory);
}

template <class T, class Format, int kTokenGroups>
void launch_pair(const ExpertParams& p, const DecodeVariant& v, bool dependent, Stream stream) {
    // With no group there still is a block per feature tile of down: it writes zeros.
    const unsigned groups = p.max_groups > 0 ? unsigned(p.max_groups) : 1u;
    const size_t up_shared = decode_shared_bytes<Format>(v.up_warps, kTokenGroups);
    const size_t down_shared = decode_shared_bytes<Format>(v.down_warps, kTokenGroups);
    const auto up = decode_up_kernel<T, Format, kTokenGroups>;
    const auto down = decode_down_kernel<T, Format, kTokenGroups>;
    allow_shared(up, up_shared, "decode_up", p);
    allow_shared(down, down_shared, "decode_down", p);
    start(up, dim3(decode_feature_tiles<Format>(p, false), groups), 32 * v.up_warps, up_shared,
          false, stream, "decode_up", p);
    start(down, dim3(decode_feature_tiles<Format>(p, true), groups), 32 * v.down_warps, down_shared,
          dependent, stream, "decode_down", p);
}

template <class T, class Format>
void launch_groups(const ExpertParams& p, const DecodeVariant& v, bool dependent, Stream stream) {
    switch (v.token_groups) {
        case 1:
            return launch_pair<T, Format, 1>(p, v, dependent, stream);
        case 2:
            return launch_pair<T, Format, 2>(p, v, dependent, stream);
        default:
            return launch_pair<T, Format, 4>(p, v, dependent, stream);
    }
}

}  // namespace
}  // namespace moe_offload::cuda
