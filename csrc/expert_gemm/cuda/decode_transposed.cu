// Decode on plain weights stored [k, rows].
#include "expert_gemm/cuda/decode_launch.cuh"

namespace moe_offload::cuda {

void launch_decode_transposed(const ExpertParams& p, const DecodeVariant& v, bool dependent,
                              Stream stream) {
    if (p.dtype == DType::bf16)
        launch_groups<simt::bf16, TransposedWeights<simt::bf16>>(p, v, dependent, stream);
    else
        launch_groups<simt::f16, TransposedWeights<simt::f16>>(p, v, dependent, stream);
}

}  // namespace moe_offload::cuda
