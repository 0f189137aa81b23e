// The AMX kernel over an emulation of its instructions: for tests, on any machine.
#include "expert_gemm/cpu/amx_emulation.h"

#define MOE_TILE_BEGIN() static_cast<void>(0)
#define MOE_TILE_END() static_cast<void>(0)
#define MOE_TILE_ZERO(tile) amx_emulation::zero(tile)
#define MOE_TILE_LOAD(tile, base, stride) amx_emulation::load(tile, base, stride)
#define MOE_TILE_STORE(tile, base, stride) amx_emulation::store(tile, base, stride)
#define MOE_TILE_DOT(c, a, b) amx_emulation::dot_bf16(c, a, b)

#include "expert_gemm/cpu/amx_tile.h"

namespace moe_offload {

const Kernels* amx_emulated_kernels(Dtype dtype) {
    using L = PortableLanes<16>;
    static const Kernels bf16 =
        make_kernels<AmxTile<L>, FmaOp<PortableLanes<4>, BF16>>("amx_emulated");
    return dtype == Dtype::kBF16 ? &bf16 : nullptr;
}

}  // namespace moe_offload
