// Numbers of the three dtypes as bytes, without any of the code that is tested.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "expert_gemm/params.h"

namespace moe_offload {

inline float widen(Dtype dtype, const std::byte* p) {
    if (dtype == Dtype::kF32) {
        float value;
        std::memcpy(&value, p, 4);
        return value;
    }
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    if (dtype == Dtype::kF16) {
        const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
        value = exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                         : std::ldexp(static_cast<float>(mantissa), -24);
        if (bits & 0x8000) value = -value;
    }
    return value;
}

// Random numbers of about `scale`, exact in every dtype (few mantissa bits).
inline std::vector<std::byte> draw(Dtype dtype, int64_t count, float scale, uint32_t seed) {
    std::mt19937 rng(seed);
    std::vector<std::byte> bytes(static_cast<size_t>(count) * item_size(dtype));
    for (int64_t i = 0; i < count; ++i) {
        const float value = scale * (static_cast<float>(rng() % 257) - 128.0f) / 128.0f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        std::byte* p = bytes.data() + static_cast<size_t>(i) * item_size(dtype);
        if (dtype == Dtype::kF32) {
            std::memcpy(p, &bits, 4);
        } else if (dtype == Dtype::kBF16) {
            const auto half = static_cast<uint16_t>(bits >> 16);
            std::memcpy(p, &half, 2);
        } else {
            const int32_t exponent = static_cast<int32_t>((bits >> 23) & 255) - 112;
            const auto half = static_cast<uint16_t>(
                exponent <= 0 ? 0
                              : ((bits >> 16) & 0x8000u) | (static_cast<uint32_t>(exponent) << 10) |
                                    ((bits >> 13) & 1023u));
            std::memcpy(p, &half, 2);
        }
    }
    return bytes;
}

}  // namespace moe_offload
