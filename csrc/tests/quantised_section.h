// One matrix of a page in any format, filled with random codes, and its numbers by the formats'
// definitions: the plainest arithmetic in double, nothing shared with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>

#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace expert_case {

using moe_offload::cuda::WeightFormat;

// Sign, four bits of exponent, three of fraction; no infinities, all ones are NaN.
inline double e4m3_value(int code) {
    const int exponent = (code >> 3) & 15, fraction = code & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const double magnitude =
        exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10);
    return code & 128 ? -magnitude : magnitude;
}

inline double e2m1_value(int code) {
    const double magnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -magnitudes[code & 7] : magnitudes[code & 7];
}

inline double e8m0_value(int code) { return code == 255 ? NAN : std::ldexp(1.0, code - 127); }

struct QuantisedMatrix {
    WeightFormat format;
    bool is_bf16;  // T, and int4's scales; else fp16
    int rows, columns;
    int group;

    int64_t code_bytes() const {
        const int bits = format == WeightFormat::plain       ? 16
                         : format == WeightFormat::fp8_block ? 8
                                                             : 4;
        return int64_t(rows) * columns * bits / 8;
    }
    int64_t scale_bytes() const {
        switch (format) {
            case WeightFormat::fp8_block:
                return int64_t((rows + 127) / 128) * ((columns + 127) / 128) * 4;
            case WeightFormat::mxfp4:
                return int64_t(rows) * (columns / 32);
            case WeightFormat::int4_group:
                return int64_t(rows) * (columns / group) * 2;
            default:
                return 0;
        }
    }

    double to_double(uint16_t bits) const {
        return is_bf16 ? simt::to_float(simt::bf16{bits}) : simt::to_float(simt::f16{bits});
    }
    uint16_t narrow(double value) const {
        return is_bf16 ? simt::from_float<simt::bf16>(float(value)).bits
                       : simt::from_float<simt::f16>(float(value)).bits;
    }

    // Any codes but NaN, scaled so that a row times a normal vector is about 1.
    void fill(unsigned char* codes, unsigned char* scales, std::mt19937_64& random) const {
        std::uniform_real_distribution<double> factor(0.5, 1.5);
        for (int64_t i = 0; i < code_bytes(); ++i) {
            codes[i] = uint8_t(random());
            if (format == WeightFormat::fp8_block && (codes[i] & 127) == 127) codes[i] ^= 1;
        }
        const double size = 1 / std::sqrt(double(columns));
        if (format == WeightFormat::fp8_block) {
            for (int64_t i = 0; i < scale_bytes(); i += 4) {
                const float scale = float(size / 100 * factor(random));  // their r.m.s.
                std::memcpy(scales + i, &scale, 4);
            }
        } else if (format == WeightFormat::mxfp4) {
            const int exponent = int(std::lround(std::log2(size / 2.9)));
            for (int64_t i = 0; i < scale_bytes(); ++i)
                scales[i] = uint8_t(127 + exponent + int(random() % 3) - 1);
        } else {
            for (int64_t i = 0; i < scale_bytes(); i += 2) {
                const uint16_t bits = narrow(size / 4.6 * factor(random));
                std::memcpy(scales + i, &bits, 2);
            }
        }
    }

    // What the format says this number is; int4_group rounds it to T, as the kernels promise to.
    double weight(const unsigned char* codes, const unsigned char* scales, int row, int k) const {
        const int64_t at = int64_t(row) * columns + k;
        const int nibble = (codes[at / 2] >> (at % 2 * 4)) & 15;
        uint16_t bits;
        float scale;
        switch (format) {
            case WeightFormat::fp8_block:
                std::memcpy(&scale, scales + 4 * (row / 128 * ((columns + 127) / 128) + k / 128),
                            4);
                return e4m3_value(codes[at]) * scale;
            case WeightFormat::mxfp4:
                return e2m1_value(nibble) * e8m0_value(scales[row * (columns / 32) + k / 32]);
            case WeightFormat::int4_group:
                std::memcpy(&bits, scales + 2 * (row * (columns / group) + k / group), 2);
                return to_double(narrow((nibble - 8) * to_double(bits)));
            default:
                std::memcpy(&bits, codes + 2 * at, 2);
                return to_double(bits);
        }
    }
};

}  // namespace expert_case
