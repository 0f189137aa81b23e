// Portable kernels: what the compiler makes of four floats (SSE2, NEON, ...). Runs everywhere.
#include "expert_gemm/cpu/many_rows.h"

namespace moe_offload {

const Kernels* plain_kernels(Dtype dtype) {
    using L = PortableLanes<4>;
    static const Kernels f32 = make_kernels<VectorTile<FmaOp<L, float>, 1, 8>>("plain");
    static const Kernels bf16 = make_kernels<VectorTile<FmaOp<L, BF16>, 1, 8>>("plain");
    static const Kernels f16 = make_kernels<VectorTile<FmaOp<L, F16>, 1, 8>>("plain");
    return dtype == Dtype::kF32 ? &f32 : dtype == Dtype::kBF16 ? &bf16 : &f16;
}

}  // namespace moe_offload
