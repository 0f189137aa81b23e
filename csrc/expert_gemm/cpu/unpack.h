// Quantised weights, as checkpoints store them, to bf16 in registers: 32 numbers at a time.
//
// A number is what the dequantised matrix holds, bit for bit: code times scale rounded once to
// bf16, which for mxfp4's powers of two is exact. Few rows multiply by it right away
// (few_quantised.h), many rows have it written to scratch first (dequantise.h). fp8: unpack_fp8.h.
//
//   mxfp4      A code is four bits, so its value under scale byte s is one of sixteen bf16: those
//              of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} with s - 127 added to the exponent. That sum stays
//              in range for s in [2, 252]; other scales take the slow way.
//   int4       A group of columns shares a scale, so its sixteen numbers -8 s ... 7 s are
//              multiplied (exactly, in fp32) and rounded once per group, and a code is a look-up.
//              Under fp16 scales they are rounded to fp16 first, as who dequantises does.
//
// Layouts and worked example: moe_offload/quantization.py. Scale byte 255 of mxfp4 is NaN.
#pragma once

#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

constexpr int64_t kWords = 32;  // numbers that are unpacked together
constexpr int64_t kGroup = 32;  // mxfp4 codes that share a scale

// ---- 32 numbers of bf16 ----------------------------------------------------------------------

template <class L>
struct Words {
    BF16 at[kWords];

    static Words load(const BF16* from) {
        Words words;
        std::memcpy(words.at, from, sizeof(words.at));
        return words;
    }
    void store(BF16* to) const { std::memcpy(to, at, sizeof(at)); }
};

#if defined(__AVX2__)
template <>
struct Words<Avx2Lanes> {
    __m256i half[2];

    static Words load(const BF16* from) {
        const auto* p = reinterpret_cast<const __m256i*>(from);
        return {{_mm256_loadu_si256(p), _mm256_loadu_si256(p + 1)}};
    }
    // Of words 0-7 and 16-23, 8-15 and 24-31.
    static Words in_order(__m256i a, __m256i b) {
        return {{_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)}};
    }
    void store(BF16* to) const {
        auto* p = reinterpret_cast<__m256i*>(to);
        _mm256_storeu_si256(p, half[0]);
        _mm256_storeu_si256(p + 1, half[1]);
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
struct Words<Avx512Lanes> {
    __m512i all;

    static Words load(const BF16* from) { return {_mm512_loadu_si512(from)}; }
    void store(BF16* to) const { _mm512_storeu_si512(to, all); }
};
#endif

#if defined(__AVX2__)
// Sixteen bf16 that VPSHUFB looks up, their lower and upper bytes, for either 128 bits.
struct ByteTable {
    __m256i low_bytes, high_bytes;

    // Of words' lower halves.
    static ByteTable of(__m256i first, __m256i second) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(first, second), 0xd8);
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                                _mm256_srli_epi16(words, 8)),
            0xd8);  // the sixteen lower ones, then the upper ones
        return {_mm256_permute2x128_si256(bytes, bytes, 0x00),
                _mm256_permute2x128_si256(bytes, bytes, 0x11)};
    }
};

// Rounded to bf16, in the lower half of each word; infinity is not carried out of by NaNs of a few
// bits.
inline __m256i rounded_bits(__m256 v) {
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(u, _mm256_set1_epi32(0x7fff));
    return _mm256_srli_epi32(_mm256_add_epi32(sum, odd), 16);
}

// The 32 codes of 16 bytes, a byte each.
inline __m256i nibbles(const uint8_t* codes) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(packed, nibble);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
// The 32 codes of 16 bytes look up a number each. Bit 4 of an index is of no matter: both halves of
// the table are the same sixteen.
inline __m512i look_up_nibbles(const uint8_t* codes, __m512i sixteen_twice) {
    const __m512i byte =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Word 2 i gets a byte's lower nibble, word 2 i + 1 its upper one: byte | byte << 12.
    const __m512i code = _mm512_madd_epi16(byte, _mm512_set1_epi32(0x1001));
    return _mm512_permutexvar_epi16(code, sixteen_twice);
}
#endif

// ---- mxfp4 -----------------------------------------------------------------------------------

alignas(32) constexpr uint16_t kE2m1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                            0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                            0xc000, 0xc040, 0xc080, 0xc0c0};

// What a scale byte adds to the bits of a number that is not zero, in both halves of a word.
struct Mxfp4Shifts {
    uint32_t of[256];
    constexpr Mxfp4Shifts() : of() {
        for (uint32_t scale = 0; scale < 256; ++scale)
            of[scale] = ((scale - 127) * 128 & 0xffff) * 0x10001;
    }
};
constexpr Mxfp4Shifts kMxfp4Shifts;

inline bool is_regular(uint8_t scale) { return static_cast<uint8_t>(scale - 2) <= 250; }

inline bool are_regular(const uint8_t* scales, int64_t count) {
    bool regular = true;
    int64_t i = 0;
#if defined(__AVX512F__) && defined(__AVX512BW__)
    for (; i < count; i += 64) {
        const __mmask64 some = count - i < 64 ? (uint64_t{1} << (count - i)) - 1 : ~uint64_t{0};
        const __m512i less =
            _mm512_sub_epi8(_mm512_maskz_loadu_epi8(some, scales + i), _mm512_set1_epi8(2));
        regular &= _mm512_mask_cmpgt_epu8_mask(some, less, _mm512_set1_epi8(-6)) == 0;  // 250
    }
#endif
    for (; i < count; ++i) regular &= is_regular(scales[i]);
    return regular;
}

// Any scale: the product in fp32, which holds it exactly or overflows as bf16 does.
inline void mxfp4_group_slow(const uint8_t* codes, uint8_t scale, BF16* to) {
    const uint32_t power = scale == 255 ? 0x7fc00000u : scale ? uint32_t{scale} << 23 : 0x400000u;
    const float factor = bit_cast_to<float>(power);
    for (int64_t i = 0; i < kGroup; ++i) {
        const int code = codes[i / 2] >> (i % 2 * 4) & 15;
        to[i].bits =
            static_cast<uint16_t>(bit_cast_to<uint32_t>(widen(BF16{kE2m1[code]}) * factor) >> 16);
    }
}

template <class L>
struct Mxfp4 {  // 16 bytes to 32 numbers, for regular scales
    static Words<L> regular(const uint8_t* codes, uint8_t scale) {
        uint16_t values[16];
        const auto shift = static_cast<uint16_t>(kMxfp4Shifts.of[scale]);
        for (int i = 0; i < 16; ++i)
            values[i] = static_cast<uint16_t>(kE2m1[i] + (i % 8 ? shift : 0));
        Words<L> words;
        for (int64_t i = 0; i < kGroup / 2; ++i) {
            words.at[2 * i].bits = values[codes[i] & 15];
            words.at[2 * i + 1].bits = values[codes[i] >> 4];
        }
        return words;
    }
};

#if defined(__AVX2__)
// Bytes of kE2m1.
inline __m256i e2m1_low_bytes() {
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
}
inline __m256i e2m1_high_bytes() {
    return _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64));
}

template <>
struct Mxfp4<Avx2Lanes> {
    static Words<Avx2Lanes> regular(const uint8_t* codes, uint8_t scale) {
        const __m256i code = nibbles(codes);
        const __m256i low = _mm256_shuffle_epi8(e2m1_low_bytes(), code);
        const __m256i high = _mm256_shuffle_epi8(e2m1_high_bytes(), code);
        const __m256i shift = _mm256_set1_epi32(static_cast<int32_t>(kMxfp4Shifts.of[scale]));
        const auto scaled = [&](__m256i value) {
            const __m256i magnitude = _mm256_slli_epi16(value, 1);
            const __m256i zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
            return _mm256_add_epi16(value, _mm256_andnot_si256(zero, shift));
        };
        return Words<Avx2Lanes>::in_order(scaled(_mm256_unpacklo_epi8(low, high)),
                                          scaled(_mm256_unpackhi_epi8(low, high)));
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
struct Mxfp4<Avx512Lanes> {
    static Words<Avx512Lanes> regular(const uint8_t* codes, uint8_t scale) {
        const __m512i values =
            _mm512_broadcast_i64x4(_mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1)));
        const __m512i shift = _mm512_set1_epi32(static_cast<int32_t>(kMxfp4Shifts.of[scale]));
        constexpr __mmask32 kNotZero = 0xfefefefe;  // codes 0 and 8 are
        return {look_up_nibbles(codes, _mm512_mask_add_epi16(values, kNotZero, values, shift))};
    }
};
#endif

// One group of any scale.
template <class L>
inline Words<L> mxfp4_words(const uint8_t* codes, uint8_t scale) {
    if (__builtin_expect(is_regular(scale), 1)) return Mxfp4<L>::regular(codes, scale);
    BF16 numbers[kGroup];
    mxfp4_group_slow(codes, scale, numbers);
    return Words<L>::load(numbers);
}

// ---- int4 ------------------------------------------------------------------------------------

alignas(64) constexpr float kInt4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

template <class Scale>
constexpr bool kInHalf = false;
template <>
constexpr bool kInHalf<F16> = true;

// Scale: BF16 or F16, the type of a group's scale.
template <class L, class Scale>
struct Int4 {
    struct Table {
        BF16 values[16];
    };
    static Table table(float scale) {
        using V = PortableLanes<L::kWidth>;
        Table table;
        for (int i = 0; i < 16; i += L::kWidth)
            V::store(table.values + i, round_to<V, Scale>(V::load(kInt4 + i) * scale));
        return table;
    }
    static Words<L> words(const uint8_t* codes, const Table& table) {
        Words<L> words;
        for (int64_t i = 0; i < kWords / 2; ++i) {
            words.at[2 * i] = table.values[codes[i] & 15];
            words.at[2 * i + 1] = table.values[codes[i] >> 4];
        }
        return words;
    }
};

#if defined(__AVX2__)
template <class Scale>
struct Int4<Avx2Lanes, Scale> {
    using Table = ByteTable;
    // Eight numbers of the table, in the lower half of each word.
    static __m256i rounded(const float* eight, float scale) {
        __m256 product = _mm256_load_ps(eight) * _mm256_set1_ps(scale);
        if constexpr (kInHalf<Scale>) {
            product = _mm256_cvtph_ps(_mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
            // Rounding could carry out of NaN's fraction; that of a bf16 scale has no such bits.
            const __m256 nan = _mm256_cmp_ps(product, product, _CMP_UNORD_Q);
            product = _mm256_blendv_ps(product, _mm256_set1_ps(__builtin_nanf("")), nan);
        }
        return rounded_bits(product);
    }
    static Table table(float scale) {
        return ByteTable::of(rounded(kInt4, scale), rounded(kInt4 + 8, scale));
    }
    static Words<Avx2Lanes> words(const uint8_t* codes, const Table& table) {
        const __m256i code = nibbles(codes);
        const __m256i low = _mm256_shuffle_epi8(table.low_bytes, code);
        const __m256i high = _mm256_shuffle_epi8(table.high_bytes, code);
        return Words<Avx2Lanes>::in_order(_mm256_unpacklo_epi8(low, high),
                                          _mm256_unpackhi_epi8(low, high));
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <class Scale>
struct Int4<Avx512Lanes, Scale> {
    struct Table {
        __m512i twice;
    };
    static Table table(float scale) {
        // Rounded by integers, as on AVX2: VCVTNEPS2BF16 would flush what is tiny.
        __m512 product = _mm512_load_ps(kInt4) * _mm512_set1_ps(scale);
        if constexpr (kInHalf<Scale>) {
            product = _mm512_cvtph_ps(_mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
            const __mmask16 nan = _mm512_cmp_ps_mask(product, product, _CMP_UNORD_Q);
            product = _mm512_mask_mov_ps(product, nan, _mm512_set1_ps(__builtin_nanf("")));
        }
        const __m512i u = _mm512_castps_si512(product);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        return {_mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)))};
    }
    static Words<Avx512Lanes> words(const uint8_t* codes, const Table& table) {
        return {look_up_nibbles(codes, table.twice)};
    }
};
#endif

}  // namespace
}  // namespace moe_offload
