// How fast a core multiplies and adds when nothing has to be loaded: the roof of expert FFNs with
// many rows. The instructions are those of the kernels' own tile (VDPBF16PS, TDPBF16PS, fused
// multiply-adds in fp32), its sums as many as the tile has, all operands in registers.
#pragma once

#include <cstdint>

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

struct MultiplyRoof {
    int64_t operations = 0;  // a multiply-add counts as two
    double seconds = 0;
};

// In the calling thread, for at least `seconds`.
MultiplyRoof multiply_roof(const Kernels& kernels, double seconds);

}  // namespace moe_offload
