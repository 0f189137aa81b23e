// AVX2 with FMA and F16C: x86 since 2013. Compiled with those flags, called only where they run.
#include "expert_gemm/cpu/many_rows.h"

namespace moe_offload {

const Kernels* avx2_kernels(Dtype dtype) {
    using L = Avx2Lanes;
    static const Kernels f32 = make_kernels<VectorTile<FmaOp<L, float>, 3, 24>>("avx2");
    static const Kernels bf16 = make_kernels<VectorTile<FmaOp<L, BF16>, 3, 24>, PairOp>("avx2");
    static const Kernels f16 = make_kernels<VectorTile<FmaOp<L, F16>, 3, 24>>("avx2");
    return dtype == Dtype::kF32 ? &f32 : dtype == Dtype::kBF16 ? &bf16 : &f16;
}

}  // namespace moe_offload
