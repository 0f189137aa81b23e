// Codes of fp8 blocks (e4m3) to bf16 in registers, as unpack.h does it for other formats.
//
// 128 columns of up to 128 rows share a scale, so there are 128 magnitudes: they are multiplied and
// rounded once per block row, and each code is a look-up. AVX2, which has no look-up of that size,
// looks up fractions.
#pragma once

#include "expert_gemm/cpu/unpack.h"

namespace moe_offload {
namespace {

constexpr int64_t kBlock = 128;  // rows and columns of a block

// What e4m3 codes 0 to 127 mean.
struct E4m3 {
    alignas(64) float values[kBlock];
    constexpr E4m3() : values() {
        for (int code = 0; code < kBlock; ++code) {
            const int exponent = code >> 3, fraction = code & 7;
            values[code] = static_cast<float>(exponent ? 8 + fraction : fraction) * 0x1p-9f;
            for (int i = 1; i < exponent; ++i) values[code] *= 2.0f;
        }
        values[127] = __builtin_nanf("");
    }
};
constexpr E4m3 kE4m3;

// The magnitudes of one block: all codes times its scale.
template <class L>
inline void fp8_magnitudes(float scale, BF16* to) {
    using V = PortableLanes<L::kWidth>;  // rounds by integers: what is tiny is not flushed
    for (int64_t i = 0; i < kBlock; i += L::kWidth)
        V::store(to + i, V::load(kE4m3.values + i) * V::set(scale));
}

// A block's table is made of its magnitudes and its scale; kMagnitudes: of the former.
template <class L>
struct Fp8 {
    static constexpr bool kMagnitudes = true;
    struct Table {
        const BF16* magnitudes;
    };
    static Table table(const BF16* magnitudes, float) { return {magnitudes}; }
    static Words<L> words(const uint8_t* codes, const Table& table) {
        Words<L> words;
        for (int64_t i = 0; i < kWords; ++i)
            words.at[i].bits = static_cast<uint16_t>(table.magnitudes[codes[i] & 127].bits ^
                                                     (codes[i] & 128) << 8);
        return words;
    }
};

#if defined(__AVX2__)
// A code's number is that of its fraction, one of eight, with four bits added to the exponent and
// the sign: byte look-ups of the former, shifts of the latter. Subnormal codes are eight fractions
// of their own, with nothing to add. NaN, and scales near the ends of the exponents' range, go by
// way of fp16.
template <>
struct Fp8<Avx2Lanes> {
    static constexpr bool kMagnitudes = false;
    struct Table {
        ByteTable fractions;  // bits of 0 to 7 times 2^-9, and of 8 / 8 to 15 / 8 times 2^-7
        __m256 scale;
        // In memory, because there are not enough registers for them, and a compiler that knows
        // their values makes them anew each time.
        __m256i magnitude, most, eight, fraction, added;
    };
    __attribute__((noinline)) static Table table(const BF16*, float scale) {
        const auto bits = [scale](__m256 fractions, float unit) {
            return rounded_bits(fractions * _mm256_set1_ps(unit) * _mm256_set1_ps(scale));
        };
        const __m256 eighths = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
        const float magnitude = scale < 0 ? -scale : scale;
        const bool plain = magnitude > 0x1p-100f && magnitude < 0x1p100f;
        return {
            ByteTable::of(bits(eighths, 0x1p-9f), bits(eighths + _mm256_set1_ps(8.0f), 0x1p-10f)),
            _mm256_set1_ps(scale),
            _mm256_set1_epi8(0x7f),
            _mm256_set1_epi8(plain ? 0x7e : -1),
            _mm256_set1_epi8(8),
            _mm256_set1_epi8(7),
            _mm256_set1_epi16(-0x7880)};
    }
    static Words<Avx2Lanes> words(const uint8_t* codes, const Table& table) {
        const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
        // Codes 0-7, 16-23 and 8-15, 24-31, so that unpacking within 128 bits leaves them in order.
        const __m256i code = _mm256_permute4x64_epi64(all, 0xd8);
        const __m256i magnitude = _mm256_and_si256(code, table.magnitude);
        const __m256i special = _mm256_cmpgt_epi8(magnitude, table.most);
        if (__builtin_expect(!_mm256_testz_si256(special, special), 0))
            return any_words(codes, table.scale);
        const __m256i normal =  // 8, or 0 for subnormal codes
            _mm256_and_si256(_mm256_min_epu8(magnitude, table.eight), table.eight);
        const __m256i index = _mm256_or_si256(_mm256_and_si256(code, table.fraction), normal);
        const __m256i low = _mm256_shuffle_epi8(table.fractions.low_bytes, index);
        const __m256i high = _mm256_shuffle_epi8(table.fractions.high_bytes, index);
        const auto sixteen = [&](__m256i bits, __m256i upper) {
            const __m256i moved = _mm256_srai_epi16(upper, 4);  // the sign stays
            return _mm256_add_epi16(bits, _mm256_and_si256(moved, table.added));
        };
        const __m256i zero = _mm256_setzero_si256();
        return {{sixteen(_mm256_unpacklo_epi8(low, high), _mm256_unpacklo_epi8(zero, code)),
                 sixteen(_mm256_unpackhi_epi8(low, high), _mm256_unpackhi_epi8(zero, code))}};
    }
    __attribute__((noinline)) static Words<Avx2Lanes> any_words(const uint8_t* codes,
                                                                __m256 scale) {
        const auto* p = reinterpret_cast<const __m128i*>(codes);
        return {
            {any_sixteen(_mm_loadu_si128(p), scale), any_sixteen(_mm_loadu_si128(p + 1), scale)}};
    }
    static __m256i any_sixteen(__m128i codes, __m256 scale) {
        const __m256i code = _mm256_cvtepu8_epi16(codes);
        const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
        const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(code, magnitude), 8);
        const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)),
                                             _mm256_set1_epi16(0x7e00));
        // As fp16 the bits are 2^-8 times the number, subnormals too.
        const __m256i half =
            _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
        const auto product = [scale](__m128i h) {
            return _mm256_cvtph_ps(h) * _mm256_set1_ps(256.0f) * scale;
        };
        const __m256i low = Avx2Lanes::bf16_bits(product(_mm256_castsi256_si128(half)));
        const __m256i high = Avx2Lanes::bf16_bits(product(_mm256_extracti128_si256(half, 1)));
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
struct Fp8<Avx512Lanes> {
    static constexpr bool kMagnitudes = true;
    struct Table {
        __m512i quarter[4];
    };
    static Table table(const BF16* magnitudes, float) {
        Table table;
        for (int i = 0; i < 4; ++i) table.quarter[i] = _mm512_loadu_si512(magnitudes + 32 * i);
        return table;
    }
    static Words<Avx512Lanes> words(const uint8_t* codes, const Table& table) {
        const __m512i code =
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
        const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
        // By the lower six bits each; lanes that are not asked keep their code.
        const __m512i some =
            _mm512_mask2_permutex2var_epi16(table.quarter[0], code, ~upper, table.quarter[1]);
        const __m512i magnitude =
            _mm512_mask2_permutex2var_epi16(table.quarter[2], some, upper, table.quarter[3]);
        const __m512i sign = _mm512_slli_epi16(code, 8);
        constexpr int kXorOfAnd = 0x78;  // a ^ (b & c)
        return {_mm512_ternarylogic_epi32(magnitude, sign, _mm512_set1_epi16(-0x8000), kXorOfAnd)};
    }
};
#endif

// `count` < 32 codes, zeros behind them whatever the scale.
template <class L>
inline Words<L> fp8_words_tail(const uint8_t* codes, int64_t count,
                               const typename Fp8<L>::Table& table) {
    uint8_t padded[kWords] = {};
    std::memcpy(padded, codes, static_cast<size_t>(count));
    BF16 numbers[kWords];
    Fp8<L>::words(padded, table).store(numbers);
    for (int64_t i = count; i < kWords; ++i) numbers[i] = BF16{};
    return Words<L>::load(numbers);
}

}  // namespace
}  // namespace moe_offload
