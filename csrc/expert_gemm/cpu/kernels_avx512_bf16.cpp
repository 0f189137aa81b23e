// AVX-512 with VDPBF16PS: bf16 pairs straight into fp32 sums. It treats denormals as zero.
#include "expert_gemm/cpu/many_rows.h"

namespace moe_offload {

const Kernels* avx512_bf16_kernels(Dtype dtype) {
    static const Kernels bf16 = make_kernels<VectorTile<DotOp, 3, 8>>("avx512_bf16");
    return dtype == Dtype::kBF16 ? &bf16 : nullptr;
}

}  // namespace moe_offload
