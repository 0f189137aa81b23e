// Decode on plain weights, and the entry of all decode launches.
#include "expert_gemm/cuda/decode_launch.cuh"

namespace moe_offload::cuda {

void launch_decode(const ExpertParams& p, const DecodeVariant& v, bool dependent, Stream stream) {
    if (p.num_tokens == 0) return;
    if (p.pages.format != WeightFormat::plain)
        launch_decode_quantised(p, v, dependent, stream);
    else if (p.pages.transposed)
        launch_decode_transposed(p, v, dependent, stream);
    else if (p.dtype == DType::bf16)
        launch_groups<simt::bf16, PlainWeights<simt::bf16>>(p, v, dependent, stream);
    else
        launch_groups<simt::f16, PlainWeights<simt::f16>>(p, v, dependent, stream);
}

}  // namespace moe_offload::cuda
