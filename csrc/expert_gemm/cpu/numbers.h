// Quantised weights to the vectors that an Op multiplies: 32 numbers at a time.
//
// In general those are unpack.h's words of bf16. On AVX2, which multiplies pairs in fp32, nibbles
// are looked up in the order that makes them pairs when they are unpacked.
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
inline Numbers<PairOp> Numbers<PairOp>::of(const Words<Avx2Lanes>& words) {
    return {{PairOp::widened(words.half[0]), PairOp::widened(words.half[1])}};
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
// The lower or upper four bits of 16 bytes in an order that unpacking within 128 bits undoes: codes
// 0, 2, 4, 6, 1, 3, 5, 7 and 16 to 23 likewise; 8 to 15 and 24 to 31.
inline __m256i pair_codes(const uint8_t* codes) {
    const __m256i twice =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    const __m256i bytes = _mm256_shuffle_epi8(
        twice, _mm256_setr_epi8(0, 1, 2, 3, 0, 1, 2, 3, 8, 9, 10, 11, 8, 9, 10, 11,  //
                                4, 5, 6, 7, 4, 5, 6, 7, 12, 13, 14, 15, 12, 13, 14, 15));
    const __m256i in_place = _mm256_srlv_epi32(bytes, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
    return _mm256_and_si256(in_place, _mm256_set1_epi8(15));
}

// What the codes mean: two bytes each, the upper half of an fp32.
inline Numbers<PairOp> look_up_pairs(__m256i codes, __m256i low_bytes, __m256i high_bytes) {
    const __m256i low = _mm256_shuffle_epi8(low_bytes, codes);
    const __m256i high = _mm256_shuffle_epi8(high_bytes, codes);
    const auto part = [](__m256i words) {
        const __m256i zero = _mm256_setzero_si256();
        return PairOp::Vec{_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, words)),
                           _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, words))};
    };
    return {{part(_mm256_unpacklo_epi8(low, high)), part(_mm256_unpackhi_epi8(low, high))}};
}

// 2^(scale - 127) of regular scales.
struct Powers {
    float of[256];
    constexpr Powers() : of() {
        float power = 0x1p-125f;
        for (int scale = 2; scale <= 252; ++scale, power *= 2.0f) of[scale] = power;
    }
};
constexpr Powers kPowers;

template <>
struct Mxfp4Numbers<PairOp> {
    static Numbers<PairOp> regular(const uint8_t* codes, uint8_t scale) {
        Numbers<PairOp> numbers =
            look_up_pairs(pair_codes(codes), e2m1_low_bytes(), e2m1_high_bytes());
        const __m256 power = _mm256_broadcast_ss(kPowers.of + scale);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            numbers.part[i].even = numbers.part[i].even * power;
            numbers.part[i].odd = numbers.part[i].odd * power;
        }
        return numbers;
    }
};

template <class Scale>
struct Int4Numbers<PairOp, Scale> {
    using Table = typename Int4<Avx2Lanes, Scale>::Table;
    static Table table(float scale) { return Int4<Avx2Lanes, Scale>::table(scale); }
    static Numbers<PairOp> numbers(const uint8_t* codes, const Table& table) {
        return look_up_pairs(pair_codes(codes), table.low_bytes, table.high_bytes);
    }
};
#endif

}  // namespace
}  // namespace moe_offload
