// The AMX tile instructions in plain C++, exact in every bit, so that the AMX kernel is tested on
// machines without AMX.
//
// Semantics of TDPBF16PS from the Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2: sums of the even and of the odd elements of each pair are kept apart, starting at
// zero, each step a fused multiply-add with round-to-nearest-even, denormal inputs as zero and
// denormal results flushed; the two sums are added, then added to C. MXCSR has no influence.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace moe_offload {
namespace amx_emulation {

struct Tile {
    alignas(64) uint8_t bytes[16][64];
};

inline Tile& tile(int number) {
    thread_local Tile tiles[8];
    return tiles[number];
}

inline float flush(float x) {  // denormals to zero of the same sign
    return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}

inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return flush(value);
}

inline void zero(int number) { std::memset(&tile(number), 0, sizeof(Tile)); }

inline void load(int number, const void* base, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(tile(number).bytes[row], static_cast<const uint8_t*>(base) + row * stride, 64);
}

inline void store(int number, void* base, int64_t stride) {
    for (int row = 0; row < 16; ++row)
        std::memcpy(static_cast<uint8_t*>(base) + row * stride, tile(number).bytes[row], 64);
}

inline void dot_bf16(int c_number, int a_number, int b_number) {
    for (int m = 0; m < 16; ++m) {
        uint16_t a[32];
        float c[16];
        std::memcpy(a, tile(a_number).bytes[m], 64);
        std::memcpy(c, tile(c_number).bytes[m], 64);
        float even[16] = {}, odd[16] = {};
        for (int k = 0; k < 16; ++k) {
            uint16_t b[32];
            std::memcpy(b, tile(b_number).bytes[k], 64);
            for (int n = 0; n < 16; ++n) {
                even[n] = flush(std::fma(from_bf16(a[2 * k]), from_bf16(b[2 * n]), even[n]));
                odd[n] = flush(std::fma(from_bf16(a[2 * k + 1]), from_bf16(b[2 * n + 1]), odd[n]));
            }
        }
        for (int n = 0; n < 16; ++n) c[n] = flush(flush(c[n]) + flush(even[n] + odd[n]));
        std::memcpy(tile(c_number).bytes[m], c, 64);
    }
}

}  // namespace amx_emulation
}  // namespace moe_offload
