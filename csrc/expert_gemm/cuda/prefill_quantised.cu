// Prefill on quantised weights, for every architecture: on sm_90a too, where the bulk copies of
// prefill_sm90.cu would need an unpacking warpgroup between copy and product.
#include "expert_gemm/cuda/prefill_launch.cuh"

namespace moe_offload::cuda {
namespace {

template <class T>
void launch_format(const ExpertParams& p, int block_m, Stream stream) {
    switch (p.pages.format) {
        case WeightFormat::fp8_block:
            return launch_both<T, Fp8BlockWeights<T>>(p, block_m, stream);
        case WeightFormat::int4_group:
            return launch_both<T, Int4GroupWeights<T>>(p, block_m, stream);
        default:
            throw CudaError("moe_offload._cuda: prefill has no kernel for weight format " +
                            std::to_string(int(p.pages.format)) + " with this dtype");
    }
}

}  // namespace

void launch_prefill_quantised(const ExpertParams& p, int block_m, Stream stream) {
    if (p.dtype == DType::f16)
        launch_format<simt::f16>(p, block_m, stream);
    else if (p.pages.format == WeightFormat::mxfp4)
        launch_both<simt::bf16, Mxfp4Weights>(p, block_m, stream);
    else
        launch_format<simt::bf16>(p, block_m, stream);
}

}  // namespace moe_offload::cuda
