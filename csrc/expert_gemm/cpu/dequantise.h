// Quantised weights, as checkpoints store them, brought into rows of bf16.
//
// The products read bf16 rows, so a thread unpacks the few rows it is about to use into scratch
// that stays in its L2 (panel.h) and runs the same kernels there. A row of bf16 is what the
// dequantised matrix holds, bit for bit: code times scale rounded once to bf16, which for mxfp4's
// powers of two is exact. So a quantised page gives the bits of a dequantised one, and memory and
// disk move a half (fp8) or a quarter (mxfp4, int4) of its bytes.
//
//   mxfp4      A code is four bits, so its value under scale byte s is one of sixteen bf16: the
//   bits
//              of +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} with s - 127 added to the exponent. That sum stays
//              in range for s in [2, 252]; other scales take the slow way.
//   fp8 block  128 columns of up to 128 rows share a scale, so there are 128 magnitudes: they are
//              multiplied and rounded once per block row, and each code is a look-up. AVX2, which
//              has no look-up of that size, converts by way of fp16.
//   int4       A group of columns shares a scale, so its sixteen numbers -8 s ... 7 s are
//              multiplied (exactly, in fp32) and rounded once per group, and a code is a look-up.
//              Under fp16 scales they are rounded to fp16 first, as who dequantises does.
//
// Layouts and worked example: moe_offload/quantization.py. Scale byte 255 of mxfp4 is NaN.
#pragma once

#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

constexpr int64_t kGroup = 32;   // mxfp4 codes that share a scale
constexpr int64_t kBlock = 128;  // rows and columns of an fp8 block

alignas(32) constexpr uint16_t kE2m1[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                            0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0,
                                            0xc000, 0xc040, 0xc080, 0xc0c0};

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
struct Mxfp4 {  // 16 bytes to 32 numbers, for scales in [2, 252]
    static void group(const uint8_t* codes, uint8_t scale, BF16* to) {
        uint16_t values[16];
        const auto shift = static_cast<uint16_t>((scale - 127) * 128);
        for (int i = 0; i < 16; ++i)
            values[i] = static_cast<uint16_t>(kE2m1[i] + (i % 8 ? shift : 0));
        for (int64_t i = 0; i < kGroup / 2; ++i) {
            to[2 * i].bits = values[codes[i] & 15];
            to[2 * i + 1].bits = values[codes[i] >> 4];
        }
    }
};

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

alignas(64) constexpr float kInt4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

template <class Scale>
constexpr bool kInHalf = false;
template <>
constexpr bool kInHalf<F16> = true;

// `count` numbers of one int4 group, a multiple of 32. Scale: BF16 or F16, the type of its scale.
template <class L, class Scale>
struct Int4 {
    static void run(const uint8_t* codes, int64_t count, float scale, BF16* to) {
        using V = PortableLanes<L::kWidth>;
        BF16 values[16];
        for (int i = 0; i < 16; i += L::kWidth)
            V::store(values + i, round_to<V, Scale>(V::load(kInt4 + i) * scale));
        for (int64_t i = 0; i < count / 2; ++i) {
            to[2 * i] = values[codes[i] & 15];
            to[2 * i + 1] = values[codes[i] >> 4];
        }
    }
};

// The magnitudes of one block: all codes times its scale.
template <class L>
inline void fp8_table(float scale, BF16* table) {
    using V = PortableLanes<L::kWidth>;  // rounds by integers: what is tiny is not flushed
    for (int64_t i = 0; i < kBlock; i += L::kWidth)
        V::store(table + i, V::load(kE4m3.values + i) * V::set(scale));
}

// `count` codes of one block.
template <class L>
struct Fp8 {
    static constexpr bool kTables = true;
    static void run(const uint8_t* codes, int64_t count, const BF16* table, float, BF16* to) {
        for (int64_t i = 0; i < count; ++i)
            to[i].bits = static_cast<uint16_t>(table[codes[i] & 127].bits ^ (codes[i] & 128) << 8);
    }
};

#if defined(__AVX2__)
// The 32 codes of 16 bytes, a byte each.
inline __m256i nibbles(const uint8_t* codes) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i nibble = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(packed, nibble);
    const __m128i odd = _mm_and_si128(_mm_srli_epi16(packed, 4), nibble);
    return _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
}

// Words 0-7 and 16-23, 8-15 and 24-31, in order.
inline void store_words(BF16* to, __m256i a, __m256i b) {
    __m256i* out = reinterpret_cast<__m256i*>(to);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(a, b, 0x31));
}

template <>
struct Mxfp4<Avx2Lanes> {
    static void group(const uint8_t* codes, uint8_t scale, BF16* to) {
        const __m256i code = nibbles(codes);
        // Bytes of kE2m1, low and high.
        const __m256i low_bytes = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64));
        const __m256i high_bytes = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 63, 63, 63, 64, 64, 64, 64, -128, -65, -65, -65, -64, -64, -64, -64));
        const __m256i low = _mm256_shuffle_epi8(low_bytes, code);
        const __m256i high = _mm256_shuffle_epi8(high_bytes, code);
        const __m256i shift = _mm256_set1_epi16(static_cast<int16_t>((scale - 127) * 128));
        const auto scaled = [&](__m256i value) {
            const __m256i magnitude = _mm256_slli_epi16(value, 1);
            const __m256i zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
            return _mm256_add_epi16(value, _mm256_andnot_si256(zero, shift));
        };
        store_words(to, scaled(_mm256_unpacklo_epi8(low, high)),
                    scaled(_mm256_unpackhi_epi8(low, high)));
    }
};

template <class Scale>
struct Int4<Avx2Lanes, Scale> {
    static void run(const uint8_t* codes, int64_t count, float scale, BF16* to) {
        const auto rounded = [scale](const float* eight) {
            __m256 product = _mm256_load_ps(eight) * _mm256_set1_ps(scale);
            if constexpr (kInHalf<Scale>) {
                product = _mm256_cvtph_ps(_mm256_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT));
                // Rounding could carry out of NaN's fraction; that of a bf16 scale has no such
                // bits.
                const __m256 nan = _mm256_cmp_ps(product, product, _CMP_UNORD_Q);
                product = _mm256_blendv_ps(product, _mm256_set1_ps(__builtin_nanf("")), nan);
            }
            const __m256i u = _mm256_castps_si256(product);
            const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
            const __m256i sum = _mm256_add_epi32(u, _mm256_set1_epi32(0x7fff));
            return _mm256_srli_epi32(_mm256_add_epi32(sum, odd), 16);
        };
        const __m256i words =
            _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded(kInt4), rounded(kInt4 + 8)), 0xd8);
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packus_epi16(_mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                                _mm256_srli_epi16(words, 8)),
            0xd8);  // the sixteen lower ones, then the upper ones
        const __m256i low_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x00);
        const __m256i high_bytes = _mm256_permute2x128_si256(bytes, bytes, 0x11);
        for (int64_t i = 0; i < count; i += 32) {
            const __m256i code = nibbles(codes + i / 2);
            const __m256i low = _mm256_shuffle_epi8(low_bytes, code);
            const __m256i high = _mm256_shuffle_epi8(high_bytes, code);
            store_words(to + i, _mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        }
    }
};

template <>
struct Fp8<Avx2Lanes> {
    static constexpr bool kTables = false;
    static void run(const uint8_t* codes, int64_t count, const BF16*, float scale, BF16* to) {
        int64_t i = 0;
        for (; i + 16 <= count; i += 16) sixteen(codes + i, scale, to + i);
        if (i == count) return;
        alignas(16) uint8_t tail[16] = {};
        BF16 out[16];
        std::memcpy(tail, codes + i, static_cast<size_t>(count - i));
        sixteen(tail, scale, out);
        std::memcpy(to + i, out, static_cast<size_t>(count - i) * sizeof(BF16));
    }
    static void sixteen(const uint8_t* codes, float scale, BF16* to) {
        const __m256i code =
            _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
        const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
        const __m256i sign = _mm256_slli_epi16(_mm256_xor_si256(code, magnitude), 8);
        const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f)),
                                             _mm256_set1_epi16(0x7e00));
        // As fp16 the bits are 2^-8 times the number, subnormals too.
        const __m256i half =
            _mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign), nan);
        const auto product = [scale](__m128i h) {
            return _mm256_cvtph_ps(h) * _mm256_set1_ps(256.0f) * _mm256_set1_ps(scale);
        };
        Avx2Lanes::store(to, product(_mm256_castsi256_si128(half)));
        Avx2Lanes::store(to + 8, product(_mm256_extracti128_si256(half, 1)));
    }
};
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__)
// The 32 codes of 16 bytes look up a number each. Bit 4 of an index is of no matter: both halves of
// the table are the same sixteen.
inline __m512i look_up_nibbles(const uint8_t* codes, __m256i sixteen) {
    const __m512i byte =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    // Word 2 i gets a byte's lower nibble, word 2 i + 1 its upper one.
    const __m512i code = _mm512_or_si512(byte, _mm512_slli_epi32(byte, 12));
    return _mm512_permutexvar_epi16(code, _mm512_broadcast_i64x4(sixteen));
}

template <>
struct Mxfp4<Avx512Lanes> {
    static void group(const uint8_t* codes, uint8_t scale, BF16* to) {
        const __m512i value =
            look_up_nibbles(codes, _mm256_load_si256(reinterpret_cast<const __m256i*>(kE2m1)));
        const __mmask32 nonzero = _mm512_test_epi16_mask(value, _mm512_set1_epi16(0x7fff));
        const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>((scale - 127) * 128));
        _mm512_storeu_si512(to, _mm512_mask_add_epi16(value, nonzero, value, shift));
    }
};

template <class Scale>
struct Int4<Avx512Lanes, Scale> {
    static void run(const uint8_t* codes, int64_t count, float scale, BF16* to) {
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
        const __m256i values = _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16));
        for (int64_t i = 0; i < count; i += 32)
            _mm512_storeu_si512(to + i, look_up_nibbles(codes + i / 2, values));
    }
};

template <>
struct Fp8<Avx512Lanes> {
    static constexpr bool kTables = true;
    static void run(const uint8_t* codes, int64_t count, const BF16* table, float, BF16* to) {
        const __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 32);
        const __m512i t2 = _mm512_loadu_si512(table + 64), t3 = _mm512_loadu_si512(table + 96);
        const auto look_up = [&](__m256i bytes) {
            const __m512i code = _mm512_cvtepu8_epi16(bytes);
            const __m512i small = _mm512_permutex2var_epi16(t0, code, t1);  // by the lower six bits
            const __m512i large = _mm512_permutex2var_epi16(t2, code, t3);
            const __mmask32 upper = _mm512_test_epi16_mask(code, _mm512_set1_epi16(64));
            const __m512i value = _mm512_mask_mov_epi16(small, upper, large);
            const __m512i sign =
                _mm512_and_si512(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(-0x8000));
            return _mm512_xor_si512(value, sign);
        };
        int64_t i = 0;
        for (; i + 32 <= count; i += 32)
            _mm512_storeu_si512(
                to + i, look_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i))));
        if (i < count) {
            const __mmask32 tail = (1u << (count - i)) - 1u;
            _mm512_mask_storeu_epi16(to + i, tail,
                                     look_up(_mm256_maskz_loadu_epi8(tail, codes + i)));
        }
    }
};
#endif

inline void prefetch_row(const uint8_t* from, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <class L>
void dequantise_mxfp4(const DequantiseArgs& a) {
    const int64_t groups = a.k_size / kGroup, row_bytes = a.k_size / 2;
    for (int64_t n = a.begin; n < a.end; ++n) {
        const auto* codes = reinterpret_cast<const uint8_t*>(a.codes) + n * row_bytes;
        const auto* scales = reinterpret_cast<const uint8_t*>(a.scales) + n * groups;
        auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
        if (a.prefetch) prefetch_row(codes + a.prefetch, row_bytes);
        for (int64_t g = 0; g < groups; ++g)
            if (static_cast<uint8_t>(scales[g] - 2) <= 250)
                Mxfp4<L>::group(codes + g * 16, scales[g], to + g * kGroup);
            else
                mxfp4_group_slow(codes + g * 16, scales[g], to + g * kGroup);
    }
}

// Scale: type of a scale, BF16 or F16.
template <class L, class Scale>
void dequantise_int4(const DequantiseArgs& a) {
    const int64_t groups = a.k_size / a.group, row_bytes = a.k_size / 2;
    for (int64_t n = a.begin; n < a.end; ++n) {
        const auto* codes = reinterpret_cast<const uint8_t*>(a.codes) + n * row_bytes;
        const auto* scales = reinterpret_cast<const Scale*>(a.scales) + n * groups;
        auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
        if (a.prefetch) prefetch_row(codes + a.prefetch, row_bytes);
        for (int64_t g = 0; g < groups; ++g)
            Int4<L, Scale>::run(codes + g * a.group / 2, a.group, widen(scales[g]),
                                to + g * a.group);
    }
}

// Scale: type of a scale, float or BF16.
template <class L, class Scale>
void dequantise_fp8(const DequantiseArgs& a) {
    constexpr int64_t kTables = 32;  // of so many blocks at a time, 8 KiB
    alignas(64) BF16 tables[Fp8<L>::kTables ? kTables * kBlock : 1];
    const int64_t blocks = (a.k_size + kBlock - 1) / kBlock;
    const auto* codes = reinterpret_cast<const uint8_t*>(a.codes);
    for (int64_t top = a.begin; top < a.end;) {  // rows that lie in the same blocks
        const int64_t next = (top / kBlock + 1) * kBlock, bottom = next < a.end ? next : a.end;
        const auto* scales = reinterpret_cast<const Scale*>(a.scales) + top / kBlock * blocks;
        for (int64_t b0 = 0; b0 < blocks; b0 += kTables) {
            const int64_t b1 = b0 + kTables < blocks ? b0 + kTables : blocks;
            if constexpr (Fp8<L>::kTables)
                for (int64_t b = b0; b < b1; ++b)
                    fp8_table<L>(widen(scales[b]), tables + (b - b0) * kBlock);
            for (int64_t n = top; n < bottom; ++n) {
                const uint8_t* row = codes + n * a.k_size;
                auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
                const int64_t end = b1 * kBlock < a.k_size ? b1 * kBlock : a.k_size;
                if (a.prefetch) prefetch_row(row + b0 * kBlock + a.prefetch, end - b0 * kBlock);
                for (int64_t b = b0; b < b1; ++b) {
                    const int64_t left = a.k_size - b * kBlock;
                    const BF16* table = Fp8<L>::kTables ? tables + (b - b0) * kBlock : tables;
                    Fp8<L>::run(row + b * kBlock, left < kBlock ? left : kBlock, table,
                                widen(scales[b]), to + b * kBlock);
                }
            }
        }
        top = bottom;
    }
}

template <class L>
void dequantise(const DequantiseArgs& a) {
    if (a.format == WeightFormat::kMxfp4) return dequantise_mxfp4<L>(a);
    if (a.format == WeightFormat::kInt4Group) return dequantise_int4<L, BF16>(a);
    if (a.format == WeightFormat::kInt4GroupF16) return dequantise_int4<L, F16>(a);
    if (a.format == WeightFormat::kFp8Block) return dequantise_fp8<L, float>(a);
    dequantise_fp8<L, BF16>(a);
}

}  // namespace
}  // namespace moe_offload
