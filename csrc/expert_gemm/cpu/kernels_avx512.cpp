// AVX-512 F, BW, DQ, VL: 16-bit weights are widened to fp32 tile by tile.
#include "expert_gemm/cpu/many_rows.h"

namespace moe_offload {

const Kernels* avx512_kernels(Dtype dtype) {
    using L = Avx512Lanes;
    static const Kernels f32 = make_kernels<VectorTile<FmaOp<L, float>, 3, 8>>("avx512");
    static const Kernels bf16 = make_kernels<VectorTile<FmaOp<L, BF16>, 3, 8>>("avx512");
    static const Kernels f16 = make_kernels<VectorTile<FmaOp<L, F16>, 3, 8>>("avx512");
    return dtype == Dtype::kF32 ? &f32 : dtype == Dtype::kBF16 ? &bf16 : &f16;
}

}  // namespace moe_offload
