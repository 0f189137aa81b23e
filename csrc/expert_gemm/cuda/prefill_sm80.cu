// The prefill kernels of prefill_sm80.h and the combine as CUDA entry points, and their launchers.
#include "expert_gemm/cuda/prefill_sm80.h"

#include <algorithm>

#include "expert_gemm/cuda/check.cuh"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/launch.h"

namespace moe_offload::cuda {
namespace {

constexpr int kBlocksPerSm = 2;
constexpr int kCombineThreads = 256;

extern __shared__ __align__(128) unsigned char shared_memory[];

template <class T, int kBlockM, bool kDown>
__global__ void __launch_bounds__(kPrefillThreads, kBlocksPerSm)
    prefill_sm80_kernel(const __grid_constant__ ExpertParams params) {
    prefill<T, kBlockM, prefill_stages(kBlockM), kDown>(params, shared_memory);
}

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ ExpertParams params) {
    combine_rows<T>(params, kCombineThreads);
}

template <class T, int kBlockM, bool kDown>
void launch(const ExpertParams& p, int num_sms, Stream stream) {
    // No more blocks than there can be tiles; the walk ends on the device's own counters.
    const int64_t row_tiles = int64_t(p.num_tokens) * p.top_k / kBlockM + p.max_groups;
    const int64_t tiles = row_tiles * prefill_feature_tiles(p, kDown);
    const unsigned blocks = unsigned(std::min<int64_t>(tiles, int64_t(num_sms) * kBlocksPerSm));
    const size_t shared = prefill_stages(kBlockM) * prefill_stage_bytes(kBlockM);
    start(prefill_sm80_kernel<T, kBlockM, kDown>, dim3(blocks), kPrefillThreads, shared, false,
          stream, kDown ? "prefill down" : "prefill up", p);
}

template <class T>
void launch(const ExpertParams& p, int block_m, int num_sms, Stream stream) {
    if (block_m == 64) {
        launch<T, 64, false>(p, num_sms, stream);
        launch<T, 64, true>(p, num_sms, stream);
    } else {
        launch<T, 128, false>(p, num_sms, stream);
        launch<T, 128, true>(p, num_sms, stream);
    }
}

}  // namespace

void launch_prefill(const ExpertParams& p, int block_m, Stream stream) {
    if (p.num_tokens == 0 || p.max_groups == 0) return;
    int device = 0, num_sms = 0;
    check(cudaGetDevice(&device), "cudaGetDevice", p);
    check(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute", p);
    if (p.dtype == DType::bf16)
        launch<simt::bf16>(p, block_m, num_sms, stream);
    else
        launch<simt::f16>(p, block_m, num_sms, stream);
}

void launch_combine(const ExpertParams& p, Stream stream) {
    if (p.num_tokens == 0) return;
    const int64_t chunks = int64_t(p.num_tokens) * (p.hidden / 8);
    const dim3 grid(unsigned((chunks + kCombineThreads - 1) / kCombineThreads));
    if (p.dtype == DType::bf16)
        start(combine_kernel<simt::bf16>, grid, kCombineThreads, 0, false, stream, "combine", p);
    else
        start(combine_kernel<simt::f16>, grid, kCombineThreads, 0, false, stream, "combine", p);
}

}  // namespace moe_offload::cuda
