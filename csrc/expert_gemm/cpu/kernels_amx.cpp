// AMX-BF16. Few rows use VDPBF16PS: they are bound by memory, and tiles would multiply padding.
#include <immintrin.h>

#include <cstdint>

namespace {
// Palette 1: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;
}  // namespace

#define MOE_TILE_BEGIN() _tile_loadconfig(&kTileConfig)
#define MOE_TILE_END() _tile_release()
#define MOE_TILE_ZERO(tile) _tile_zero(tile)
#define MOE_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define MOE_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define MOE_TILE_DOT(c, a, b) _tile_dpbf16ps(c, a, b)

#include "expert_gemm/cpu/amx_tile.h"

namespace moe_offload {

const Kernels* amx_kernels(Dtype dtype) {
    static const Kernels bf16 = make_kernels<AmxTile<Avx512Lanes>, DotOp>("amx");
    return dtype == Dtype::kBF16 ? &bf16 : nullptr;
}

}  // namespace moe_offload
