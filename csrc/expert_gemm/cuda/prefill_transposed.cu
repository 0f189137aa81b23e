// Prefill on plain weights stored [k, rows], for every architecture.
#include "expert_gemm/cuda/prefill_launch.cuh"

namespace moe_offload::cuda {

void launch_prefill_transposed(const ExpertParams& p, int block_m, Stream stream) {
    if (p.dtype == DType::bf16)
        launch_both<simt::bf16, TransposedWeights<simt::bf16>>(p, block_m, stream);
    else
        launch_both<simt::f16, TransposedWeights<simt::f16>>(p, block_m, stream);
}

}  // namespace moe_offload::cuda
