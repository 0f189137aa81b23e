// Decode on quantised weights.
#include "expert_gemm/cuda/decode_launch.cuh"

namespace moe_offload::cuda {
namespace {

template <class T>
void launch_format(const ExpertParams& p, const DecodeVariant& v, bool dependent, Stream stream) {
    switch (p.pages.format) {
        case WeightFormat::fp8_block:
            return launch_groups<T, Fp8BlockWeights<T>>(p, v, dependent, stream);
        case WeightFormat::int4_group:
            return launch_groups<T, Int4GroupWeights<T>>(p, v, dependent, stream);
        default:
            throw CudaError("moe_offload._cuda: decode has no kernel for weight format " +
                            std::to_string(int(p.pages.format)) + " with this dtype");
    }
}

}  // namespace

void launch_decode_quantised(const ExpertParams& p, const DecodeVariant& v, bool dependent,
                             Stream stream) {
    if (p.dtype == DType::f16)
        launch_format<simt::f16>(p, v, dependent, stream);
    else if (p.pages.format == WeightFormat::mxfp4)
        launch_groups<simt::bf16, Mxfp4Weights>(p, v, dependent, stream);
    else
        launch_format<simt::bf16>(p, v, dependent, stream);
}

}  // namespace moe_offload::cuda
