// Quantised weights to the vectors that an Op multiplies: 32 numbers at a time.
//
// In general those are unpack.h's words of bf16. AVX2 multiplies fp32 and would widen them again,
// so there look-ups give fp32 at once: eight nibbles are one 32-bit word shifted by eight amounts,
// and eight values fill a register.
#pragma once

#include "expert_gemm/cpu/unpack_fp8.h"

namespace moe_offload {
namespace {

template <class Op>
struct Numbers {
    static constexpr int kParts = kWords / Op::kStep;
    typename Op::Vec part[kParts];

    static Numbers of(const Words<typename Op::L>& words) {
        Numbers numbers;
        for (int i = 0; i < kParts; ++i) numbers.part[i] = Op::load_w(words.at + i * Op::kStep);
        return numbers;
    }
};

#if defined(__AVX2__)
template <>
inline Numbers<FmaOp<Avx2Lanes, BF16>> Numbers<FmaOp<Avx2Lanes, BF16>>::of(
    const Words<Avx2Lanes>& words) {
    const auto wide = [](__m128i eight) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
    };
    return {{wide(_mm256_castsi256_si128(words.half[0])),
             wide(_mm256_extracti128_si256(words.half[0], 1)),
             wide(_mm256_castsi256_si128(words.half[1])),
             wide(_mm256_extracti128_si256(words.half[1], 1))}};
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
inline Numbers<FmaOp<Avx512Lanes, BF16>> Numbers<FmaOp<Avx512Lanes, BF16>>::of(
    const Words<Avx512Lanes>& words) {
    const auto wide = [](__m256i sixteen) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(sixteen), 16));
    };
    return {
        {wide(_mm512_castsi512_si256(words.all)), wide(_mm512_extracti64x4_epi64(words.all, 1))}};
}
#endif

#if defined(__AVX512BF16__)
template <>
inline Numbers<DotOp> Numbers<DotOp>::of(const Words<Avx512Lanes>& words) {
    return {{(__m512bh)words.all}};
}
#endif

template <class Op>
struct Mxfp4Numbers {
    using L = typename Op::L;
    static Numbers<Op> regular(const uint8_t* codes, uint8_t scale) {
        return Numbers<Op>::of(Mxfp4<L>::regular(codes, scale));
    }
};

// Scale: BF16 or F16, the type of a group's scale.
template <class Op, class Scale>
struct Int4Numbers {
    using L = typename Op::L;
    using Table = typename Int4<L, Scale>::Table;
    static Table table(float scale) { return Int4<L, Scale>::table(scale); }
    static Numbers<Op> numbers(const uint8_t* codes, const Table& table) {
        return Numbers<Op>::of(Int4<L, Scale>::words(codes, table));
    }
};

template <class Op>
struct Fp8Numbers {
    using L = typename Op::L;
    using Table = typename Fp8<L>::Table;
    static Table table(const BF16* magnitudes, float scale) {
        return Fp8<L>::table(magnitudes, scale);
    }
    static Numbers<Op> numbers(const uint8_t* codes, const Table& table) {
        return Numbers<Op>::of(Fp8<L>::words(codes, table));
    }
    // `count` < 32 codes, zeros behind them.
    static Numbers<Op> tail(const uint8_t* codes, int64_t count, const Table& table) {
        return Numbers<Op>::of(fp8_words_tail<L>(codes, count, table));
    }
};

#if defined(__AVX2__)
using Avx2Op = FmaOp<Avx2Lanes, BF16>;

// Four bytes: a code in the lower four bits of each word.
inline __m256i eight_codes(const uint8_t* codes) {
    int32_t eight;
    std::memcpy(&eight, codes, 4);
    return _mm256_srlv_epi32(_mm256_set1_epi32(eight),
                             _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
}

template <>
struct Mxfp4Numbers<Avx2Op> {
    static Numbers<Avx2Op> regular(const uint8_t* codes, uint8_t scale) {
        // The exponent's shift is in the upper half of the word; code 0 stays zero.
        const __m256i shift = _mm256_and_si256(
            _mm256_set1_epi32(static_cast<int32_t>(kMxfp4Shifts.of[scale])),
            _mm256_setr_epi32(0, -65536, -65536, -65536, -65536, -65536, -65536, -65536));
        const __m256i ones = _mm256_castps_si256(_mm256_setr_ps(0, 0.5f, 1, 1.5f, 2, 3, 4, 6));
        const __m256 magnitudes = _mm256_castsi256_ps(_mm256_add_epi32(ones, shift));
        Numbers<Avx2Op> numbers;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m256i code = eight_codes(codes + 4 * i);
            const __m256 sign = _mm256_and_ps(_mm256_castsi256_ps(_mm256_slli_epi32(code, 28)),
                                              _mm256_set1_ps(-0.0f));
            numbers.part[i] = _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, code), sign);
        }
        return numbers;
    }
};

template <class Scale>
struct Int4Numbers<Avx2Op, Scale> {
    struct Table {
        __m256 low, high;
    };
    static Table table(float scale) {
        using Unpack = Int4<Avx2Lanes, Scale>;
        return {widened(Unpack::rounded(kInt4, scale)), widened(Unpack::rounded(kInt4 + 8, scale))};
    }
    static Numbers<Avx2Op> numbers(const uint8_t* codes, const Table& table) {
        Numbers<Avx2Op> numbers;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m256i code = eight_codes(codes + 4 * i);
            numbers.part[i] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, code),
                                               _mm256_permutevar8x32_ps(table.high, code),
                                               _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
        }
        return numbers;
    }
    static __m256 widened(__m256i bf16_bits) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(bf16_bits, 16));
    }
};

template <>
struct Fp8Numbers<Avx2Op> {
    struct Table {
        __m256 scale;    // of a block
        __m256 of_half;  // 256 times that: what the bits as fp16 are multiplied by
        bool plain;      // it is far from overflow, and not NaN
    };
    static Table table(const BF16*, float scale) {
        return {_mm256_set1_ps(scale), _mm256_set1_ps(256.0f * scale),
                scale > -0x1p100f && scale < 0x1p100f};
    }
    static Numbers<Avx2Op> numbers(const uint8_t* codes, const Table& table) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        const __m256i nan = _mm256_cmpeq_epi8(_mm256_and_si256(all, _mm256_set1_epi8(0x7f)),
                                              _mm256_set1_epi8(0x7f));
        if (__builtin_expect(!table.plain || !_mm256_testz_si256(nan, nan), 0))
            return Numbers<Avx2Op>::of(Fp8<Avx2Lanes>::words(codes, {table.scale}));
        Numbers<Avx2Op> numbers;
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const __m256i code =
                _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes) + i));
            // As fp16 the bits are 2^-8 times the number; the sum moves the sign up by one.
            const __m256i bits = _mm256_slli_epi16(code, 7);
            const __m256i half =
                _mm256_add_epi16(bits, _mm256_and_si256(bits, _mm256_set1_epi16(0x4000)));
            numbers.part[2 * i] = rounded(_mm256_castsi256_si128(half), table.of_half);
            numbers.part[2 * i + 1] = rounded(_mm256_extracti128_si256(half, 1), table.of_half);
        }
        return numbers;
    }
    static Numbers<Avx2Op> tail(const uint8_t* codes, int64_t count, const Table& table) {
        return Numbers<Avx2Op>::of(fp8_words_tail<Avx2Lanes>(codes, count, {table.scale}));
    }
    // To bf16; there is no NaN.
    static __m256 rounded(__m128i half, __m256 of_half) {
        const __m256i u = _mm256_castps_si256(_mm256_cvtph_ps(half) * of_half);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        return _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(-65536)));
    }
};
#endif

}  // namespace
}  // namespace moe_offload
