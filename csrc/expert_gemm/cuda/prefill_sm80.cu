// Prefill on plain weights, the entry of all sm_80 prefill launches, and the combine.
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/prefill_launch.cuh"

namespace moe_offload::cuda {
namespace {

constexpr int kCombineThreads = 256;

template <class T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ ExpertParams params) {
    combine_rows<T>(params, kCombineThreads);
}

}  // namespace

void launch_prefill(const ExpertParams& p, int block_m, Stream stream) {
    if (p.num_tokens == 0 || p.max_groups == 0) return;
    if (p.pages.format != WeightFormat::plain)
        launch_prefill_quantised(p, block_m, stream);
    else if (p.pages.transposed)
        launch_prefill_transposed(p, block_m, stream);
    else if (p.dtype == DType::bf16)
        launch_both<simt::bf16, PlainWeights<simt::bf16>>(p, block_m, stream);
    else
        launch_both<simt::f16, PlainWeights<simt::f16>>(p, block_m, stream);
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
