// The prefill kernels of prefill_sm80.h as CUDA entry points, and their launcher, for one format of
// weights: prefill_sm80.cu has the plain ones, prefill_transposed.cu and
// prefill_quantised.cu the others.
#pragma once

#include <algorithm>

#include "expert_gemm/cuda/check.cuh"
#include "expert_gemm/cuda/launch.h"
#include "expert_gemm/cuda/prefill_sm80.h"

namespace moe_offload::cuda {
namespace {

constexpr int kBlocksPerSm = 2;

extern __shared__ __align__(128) unsigned char shared_memory[];

template <class T, class Format, int kBlockM, bool kDown>
__global__ void __launch_bounds__(kPrefillThreads, kBlocksPerSm)
    prefill_sm80_kernel(const __grid_constant__ ExpertParams params) {
    prefill<T, Format, kBlockM, prefill_stages(kBlockM), kDown>(params, shared_memory);
}

template <class T, class Format, int kBlockM, bool kDown>
void launch_one(const ExpertParams& p, int num_sms, Stream stream) {
    // No more blocks than there can be tiles; the walk ends on the device's own counters.
    const int64_t row_tiles = int64_t(p.num_tokens) * p.top_k / kBlockM + p.max_groups;
    const int64_t tiles = row_tiles * prefill_feature_tiles(p, kDown);
    const unsigned blocks = unsigned(std::min<int64_t>(tiles, int64_t(num_sms) * kBlocksPerSm));
    const size_t shared = prefill_stages(kBlockM) * prefill_stage_bytes(kBlockM);
    start(prefill_sm80_kernel<T, Format, kBlockM, kDown>, dim3(blocks), kPrefillThreads, shared,
          false, stream, kDown ? "prefill down" : "prefill up", p);
}

template <class T, class Format>
void launch_both(const ExpertParams& p, int block_m, Stream stream) {
    int device = 0, num_sms = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", p);
    check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute", p);
    if (block_m == 64) {
        launch_one<T, Format, 64, false>(p, num_sms, stream);
        launch_one<T, Format, 64, true>(p, num_sms, stream);
    } else {
        launch_one<T, Format, 128, false>(p, num_sms, stream);
        launch_one<T, Format, 128, true>(p, num_sms, stream);
    }
}

}  // namespace
}  // namespace moe_offload::cuda
