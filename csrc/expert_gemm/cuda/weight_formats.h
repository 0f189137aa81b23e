// The numbers of a page: layouts exactly as checkpoints hold them, and how codes become operands of
// the matrix instructions in registers. moe_offload/quantization.py is the twin in PyTorch.
//
//   plain       T itself; [rows, k], or transposed [k, rows], of transformers' gpt-oss in bf16
//   fp8_block   e4m3 [rows, k]; float scales [ceil(rows / 128), ceil(k / 128)], "weight_scale_inv"
//               of DeepSeek-V3 and Qwen3 FP8
//   mxfp4       "blocks" of gpt-oss [rows, k / 32, 16 bytes], two e2m1 a byte, the lower four bits
//               first; "scales" [rows, k / 32], e8m0: 2^(byte - 127) (OCP Microscaling 1.0)
//   int4_group  "weight_packed" of compressed-tensors [rows, k / 8] 32-bit words, eight codes each
//               from the lowest bits up, a code is the value + 8; "weight_scale" [rows, k / group]
//               of T
//
// Every code is exact in a 16-bit float, so what is decided here is where the scale goes. A scale
// of fp8_block belongs to 128 x 128 numbers, more than a decode step of one warp: it multiplies
// the step's sums in float and no weight is ever rounded (apply_to_sums). The 4-bit formats'
// 16-byte loads lie in one group, and the scale multiplies the weights: exact for mxfp4's powers of
// two (bf16 only, its scales do not fit fp16), one rounding to T for int4_group, which are the bits
// that compressed-tensors itself decompresses to.
//
// Worked example, e2m1: 0x31 is two codes, 1 then 3: 0.5 and 1.5. Under the scale byte 120 they are
// 2^-8 and 3 x 2^-8.
#pragma once

#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

constexpr uint32_t kMinusZeros = 0x80008000u;  // the third operand that makes fma2 a product

// Constants of T as pairs of equal halves.
template <class T>
struct PairConstants;
template <>
struct PairConstants<simt::bf16> {
    static constexpr int kE4m3Shift = 4;  // from the byte's place in a half's upper half
    static constexpr uint32_t kE4m3Mask = 0x07f007f0u;
    static constexpr uint32_t kE4m3Factor = 0x7b807b80u;    // 2^120: the exponents' biases differ
    static constexpr uint32_t kE4m3Overflow = 0x7b0d7b0du;  // 141 x 2^112: 448 stays, 480 does not
    static constexpr uint32_t kInt4Magic = 0x43434343u;     // upper byte of 128 + code
    static constexpr uint32_t kInt4Offset = 0xc308c308u;    // -(128 + 8)
    static constexpr uint32_t kOne = 0x3f803f80u;
};
template <>
struct PairConstants<simt::f16> {
    static constexpr int kE4m3Shift = 1;
    static constexpr uint32_t kE4m3Mask = 0x3f803f80u;
    static constexpr uint32_t kE4m3Factor = 0x5c005c00u;    // 2^8
    static constexpr uint32_t kE4m3Overflow = 0x58465846u;  // 136.75
    static constexpr uint32_t kInt4Magic = 0x64646464u;     // upper byte of 1024 + code
    static constexpr uint32_t kInt4Offset = 0xe408e408u;    // -(1024 + 8)
    static constexpr uint32_t kOne = 0x3c003c00u;
};

// Four e4m3 numbers to two pairs of T, exactly, subnormals too. The bits go where T has them and a
// product corrects the exponent. The NaN codes 0x7f and 0xff look like 480 then: times a number
// that overflows at 480 and not at 448, the largest finite one, and infinity times zero is NaN.
template <class T>
SIMT_FUNCTION void widen_e4m3(uint32_t codes, uint32_t (&pairs)[2]) {
    using C = PairConstants<T>;
    SIMT_UNROLL for (int i = 0; i < 2; ++i) {
        const uint32_t upper = simt::byte_permute(codes, 0, i == 0 ? 0x1404 : 0x3424);
        const uint32_t bits = ((upper >> C::kE4m3Shift) & C::kE4m3Mask) | (upper & kMinusZeros);
        const uint32_t value = simt::fma2<T>(bits, C::kE4m3Factor, kMinusZeros);
        const uint32_t overflow = simt::fma2<T>(value, C::kE4m3Overflow, kMinusZeros);
        pairs[i] = simt::fma2<T>(overflow, 0, value);
    }
}

// Eight e2m1 numbers to four pairs of bf16, by a table of eight magnitudes' bytes.
SIMT_FUNCTION simt::U4 widen_e2m1(uint32_t codes) {
    const uint32_t magnitudes = codes & 0x77777777u;
    simt::U4 pairs;
    SIMT_UNROLL for (int i = 0; i < 2; ++i) {
        const uint32_t choice = magnitudes >> (16 * i);
        const uint32_t lower = simt::byte_permute(0xc0800000u, 0xc0804000u, choice);
        uint32_t upper = simt::byte_permute(0x3f3f3f00u, 0x40404040u, choice);
        upper |= simt::byte_permute(codes << 4, codes, i == 0 ? 0x5140 : 0x7362) & 0x80808080u;
        pairs.word[2 * i] = simt::byte_permute(lower, upper, 0x5140);
        pairs.word[2 * i + 1] = simt::byte_permute(lower, upper, 0x7362);
    }
    return pairs;
}

// Eight codes of int4_group to four pairs of T, -8 to 7: a code in the last bits of 128 (1024 in
// fp16) adds itself to it.
template <class T>
SIMT_FUNCTION simt::U4 widen_int4(uint32_t codes) {
    using C = PairConstants<T>;
    const uint32_t even = codes & 0x0f0f0f0fu, odd = (codes >> 4) & 0x0f0f0f0fu;
    simt::U4 pairs;
    SIMT_UNROLL for (int i = 0; i < 4; ++i) {
        const uint32_t four = simt::byte_permute(even, odd, i < 2 ? 0x5140 : 0x7362);
        const uint32_t two = simt::byte_permute(four, C::kInt4Magic, i % 2 == 0 ? 0x4140 : 0x4342);
        pairs.word[i] = simt::fma2<T>(two, C::kOne, C::kInt4Offset);
    }
    return pairs;
}

// 2^(code - 127) as a pair of bf16: the code is the exponent field, but 0 is subnormal there and
// 255 is NaN.
SIMT_FUNCTION uint32_t widen_e8m0(uint32_t code) {
    const uint32_t bits = (code << 7) | (((code + 1) & 0xff) <= 1 ? 0x40u : 0u);
    return bits * 0x10001u;
}

template <class T>
SIMT_FUNCTION simt::U4 times(simt::U4 pairs, uint32_t scale) {
    SIMT_UNROLL for (int i = 0; i < 4; ++i) pairs.word[i] =
        simt::fma2<T>(pairs.word[i], scale, kMinusZeros);
    return pairs;
}

// One matrix of a page.
struct WeightMatrix {
    const unsigned char* codes;   // [rows, k_size]
    const unsigned char* scales;  // as the format has them
    int rows;
    int k_size;
    int log2_group;

    TILE_FUNCTION static WeightMatrix make(const ExpertParams& p, const unsigned char* page,
                                           bool down) {
        return {page + (down ? p.pages.down_offset : p.pages.up_offset),
                page + (down ? p.pages.down_scale_offset : p.pages.up_scale_offset),
                down ? p.hidden : p.up_rows(), down ? p.inner_size : p.hidden, p.pages.log2_group};
    }
};

// A format tells the kernels:
//   kTransposed    matrices are [k, rows]: kernels have code of their own for those, and need
//                  none of what follows
//   kBits          of one number; 16 bytes hold 128 / kBits of them
//   kRowsPerScale  of a lane's four weight rows g, g + 8, g + 16, g + 24, how many share a scale
//                  (without scales 0). Tiles start at multiples of 16 rows, so g and g + 8 are in
//                  the same 128 rows.
//   kScaleSums     scale_of() multiplies the sums of one step, in float; else unpack() scales
//   scale_row      bytes from `scales` to a row's;  load_scale  the one for column k, as bits
//   unpack         numbers 8 part ... 8 part + 7 of 16 bytes, as pairs of T
template <class T>
struct PlainWeights {
    static constexpr WeightFormat kFormat = WeightFormat::plain;
    static constexpr bool kTransposed = false;
    static constexpr int kBits = 16;
    static constexpr int kRowsPerScale = 0;
    static constexpr bool kScaleSums = false;

    SIMT_FUNCTION static uint32_t scale_row(const WeightMatrix&, int) { return 0; }
    SIMT_FUNCTION static uint32_t load_scale(const WeightMatrix&, uint32_t, int) { return 0; }
    SIMT_FUNCTION static float scale_of(uint32_t) { return 1.0f; }
    SIMT_FUNCTION static simt::U4 unpack(const simt::U4& packed, int, uint32_t) { return packed; }
};

template <class T>
struct TransposedWeights {
    static constexpr WeightFormat kFormat = WeightFormat::plain;
    static constexpr bool kTransposed = true;
};

template <class T>
struct Fp8BlockWeights {
    static constexpr WeightFormat kFormat = WeightFormat::fp8_block;
    static constexpr bool kTransposed = false;
    static constexpr int kBits = 8;
    static constexpr int kRowsPerScale = 2;
    static constexpr bool kScaleSums = true;

    SIMT_FUNCTION static uint32_t scale_row(const WeightMatrix& m, int row) {
        return uint32_t(row) / 128 * ceil_div(m.k_size, 128) * 4;
    }
    SIMT_FUNCTION static uint32_t load_scale(const WeightMatrix& m, uint32_t row, int k) {
        return simt::load4(m.scales + (row + uint32_t(k) / 128 * 4));
    }
    SIMT_FUNCTION static float scale_of(uint32_t bits) {
        float scale;
        memcpy(&scale, &bits, 4);
        return scale;
    }
    SIMT_FUNCTION static simt::U4 unpack(const simt::U4& packed, int part, uint32_t) {
        uint32_t low[2], high[2];
        widen_e4m3<T>(packed.word[2 * part], low);
        widen_e4m3<T>(packed.word[2 * part + 1], high);
        return {{low[0], low[1], high[0], high[1]}};
    }
};

struct Mxfp4Weights {
    static constexpr WeightFormat kFormat = WeightFormat::mxfp4;
    static constexpr bool kTransposed = false;
    static constexpr int kBits = 4;
    static constexpr int kRowsPerScale = 1;
    static constexpr bool kScaleSums = false;

    SIMT_FUNCTION static uint32_t scale_row(const WeightMatrix& m, int row) {
        return uint32_t(row) * (uint32_t(m.k_size) / 32);
    }
    SIMT_FUNCTION static uint32_t load_scale(const WeightMatrix& m, uint32_t row, int k) {
        return simt::load1(m.scales + (row + uint32_t(k) / 32));
    }
    SIMT_FUNCTION static float scale_of(uint32_t) { return 1.0f; }
    SIMT_FUNCTION static simt::U4 unpack(const simt::U4& packed, int part, uint32_t scale) {
        return times<simt::bf16>(widen_e2m1(packed.word[part]), widen_e8m0(scale));
    }
};

template <class T>
struct Int4GroupWeights {
    static constexpr WeightFormat kFormat = WeightFormat::int4_group;
    static constexpr bool kTransposed = false;
    static constexpr int kBits = 4;
    static constexpr int kRowsPerScale = 1;
    static constexpr bool kScaleSums = false;

    SIMT_FUNCTION static uint32_t scale_row(const WeightMatrix& m, int row) {
        return uint32_t(row) * uint32_t(m.k_size >> m.log2_group) * 2;
    }
    SIMT_FUNCTION static uint32_t load_scale(const WeightMatrix& m, uint32_t row, int k) {
        return simt::load2(m.scales + (row + uint32_t(k >> m.log2_group) * 2));
    }
    SIMT_FUNCTION static float scale_of(uint32_t) { return 1.0f; }
    SIMT_FUNCTION static simt::U4 unpack(const simt::U4& packed, int part, uint32_t scale) {
        return times<T>(widen_int4<T>(packed.word[part]), scale * 0x10001u);
    }
};

}  // namespace moe_offload::cuda
