// What differs between instruction sets inside the products: how one step multiplies.
//
// An Op names the dtype T of weights, the type X of packed x and h, how many k one vector step
// covers (few rows) and how many k one packed element covers (many rows). FmaOp widens everything
// to fp32; DotOp feeds bf16 pairs to VDPBF16PS.
#pragma once

#include "expert_gemm/cpu/lanes.h"

namespace moe_offload {
namespace {

inline float widen(float x) { return x; }
inline float widen(BF16 x) { return bit_cast_to<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(F16 x) {
    const uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
    const uint32_t bits = magnitude >= 0x0f800000u
                              ? magnitude | 0x7f800000u
                              : bit_cast_to<uint32_t>(bit_cast_to<float>(magnitude) * 0x1p112f);
    return bit_cast_to<float>(bits | sign);
}

// v rounded to T and widened again.
template <typename L, typename T>
inline typename L::V round_to(typename L::V v) {
    T lanes[L::kWidth];
    L::store(lanes, v);
    return L::load(lanes);
}
#if defined(__AVX512F__) && defined(__AVX512BW__)
// Sixteen rows of sixteen 32-bit words to columns; a null row is zero.
// to[i * stride .. + 16 words) = word i of every row.
template <class Load, class Store>
inline void transpose16(const Load& load, const Store& store) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(i);
    for (int i = 0; i < 8; ++i) {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 2; ++j) {
            a[4 * i + 2 * j] = _mm512_unpacklo_epi64(b[4 * i + j], b[4 * i + 2 + j]);
            a[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(b[4 * i + j], b[4 * i + 2 + j]);
        }
    // a[4 i + w]: words w, w + 4, w + 8, w + 12 (one per 128-bit lane) of rows 4 i .. 4 i + 3
    for (int w = 0; w < 4; ++w) {
        const __m512i p = _mm512_shuffle_i32x4(a[w], a[4 + w], 0x88);  // words w, w + 8
        const __m512i q = _mm512_shuffle_i32x4(a[w], a[4 + w], 0xdd);  // w + 4, w + 12
        const __m512i r = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0x88);
        const __m512i s = _mm512_shuffle_i32x4(a[8 + w], a[12 + w], 0xdd);
        store(w, _mm512_shuffle_i32x4(p, r, 0x88));
        store(w + 8, _mm512_shuffle_i32x4(p, r, 0xdd));
        store(w + 4, _mm512_shuffle_i32x4(q, s, 0x88));
        store(w + 12, _mm512_shuffle_i32x4(q, s, 0xdd));
    }
}

template <typename T>  // floats of T, or pairs of it when X is 16-bit
inline void transpose_rows(const T* const* from, float* to, int64_t stride) {
    transpose16(
        [&](int i) {
            return from[i] ? _mm512_castps_si512(Avx512Lanes::load(from[i]))
                           : _mm512_setzero_si512();
        },
        [&](int i, __m512i v) { _mm512_storeu_si512(to + i * stride, v); });
}
inline void transpose_rows(const BF16* const* from, BF16* to, int64_t stride, bool half = false) {
    transpose16(
        [&](int i) { return from[i] ? _mm512_loadu_si512(from[i]) : _mm512_setzero_si512(); },
        [&](int i, __m512i v) {
            if (half)  // only the first eight rows
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride),
                                    _mm512_castsi512_si256(v));
            else
                _mm512_storeu_si512(to + i * stride, v);
        });
}
#endif

// Does this Op keep few rows of x and h in another order than theirs?
template <class Op>
constexpr bool has_places = requires { &Op::place; };

// Does this Op transpose rows by vectors when it packs?
template <class Op>
constexpr bool has_transpose = requires { &Op::transpose; };

// Can it multiply half a vector of rows at twice the rate?
template <class Op>
constexpr bool has_half = requires { typename Op::HalfV; };

// Its sums then; else a placeholder.
template <class Op>
struct HalfSum {
    using V = char;
};
template <class Op>
    requires has_half<Op>
struct HalfSum<Op> {
    using V = typename Op::HalfV;
};

template <typename Lanes, typename Weight>
struct FmaOp {
    using L = Lanes;
    using V = typename L::V;
    using T = Weight;  // of the weights
    using X = float;   // of packed x and h
    static constexpr int kStep = L::kWidth;
    static constexpr int kPair = 1;
    static constexpr int kBlockPad = 1;  // K of packed rows is a multiple of it

    using Vec = V;
    static Vec load_x(const X* p) { return L::load(p); }
    static Vec load_w(const T* p) { return L::load(p); }
    static Vec load_w_tail(const T* p, int64_t count) {
        T buffer[L::kWidth] = {};
        std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
        return L::load(buffer);
    }
    static V step(V acc, Vec x, Vec w) { return L::fma(x, w, acc); }
    static void store_x(X* to, Vec x) { L::store(to, x); }
    static Vec broadcast_lane(const X* step, int64_t lane) { return L::set(step[lane]); }

    // Many rows: weights as floats, converted tile by tile when they are 16-bit.
    using B = float;
    static constexpr bool kConvert = sizeof(T) == 2;
    static Vec broadcast(const B* p) { return L::set(*p); }
    static Vec broadcast_last(const B* p) { return L::set(*p); }
    static Vec load_packed(const X* p) { return L::load(p); }

    // h of rows f and f + 1, for one vector of rows; `h` points at f's.
    static void store_pair(X* h, int64_t next, V a, V b) {
        if constexpr (kConvert) {
            a = round_to<L, T>(a);
            b = round_to<L, T>(b);
        }
        L::store(h, a);
        L::store(h + next, b);
    }
    static void store_h(X* h, V v) {
        if constexpr (kConvert) v = round_to<L, T>(v);
        L::store(h, v);
    }
    static X to_x(T value) { return widen(value); }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    static void transpose(const T* const* from, X* to, int64_t stride)
        requires(kStep == 16)
    {
        transpose_rows(from, to, stride);
    }
#endif
};

#if defined(__AVX2__)
// Few rows of bf16 in fp32: a vector of them is widened to its even and its odd elements, by a
// shift and a mask, where widening them in order takes a shuffle and a shift for each half. x and h
// lie likewise, for each step first its even elements.
struct PairOp {
    using L = Avx2Lanes;
    using V = __m256;
    using T = BF16;
    using X = float;
    static constexpr int kStep = 16;

    struct Vec {
        V even, odd;
    };
    // Where element i of a row of x or h lies.
    static constexpr int64_t place(int64_t i) {
        return i / kStep * kStep + i % 2 * L::kWidth + i % kStep / 2;
    }
    static Vec widened(__m256i pairs) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
    }
    static Vec load_x(const X* p) { return {L::load(p), L::load(p + L::kWidth)}; }
    static Vec load_w(const T* p) {
        return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static Vec load_w_tail(const T* p, int64_t count) {
        T buffer[kStep] = {};
        std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
        return load_w(buffer);
    }
    static V step(V acc, Vec x, Vec w) { return L::fma(x.odd, w.odd, L::fma(x.even, w.even, acc)); }
    static void store_x(X* to, Vec x) {
        L::store(to, x.even);
        L::store(to + L::kWidth, x.odd);
    }
    static Vec broadcast_lane(const X* step, int64_t lane) {
        return {L::set(step[lane]), L::set(step[L::kWidth + lane])};
    }
    static void store_h(X* h, V v) { L::store(h, round_to<L, T>(v)); }
};
#endif

#if defined(__AVX512BF16__)
struct DotOp {
    using L = Avx512Lanes;
    using V = __m512;
    using T = BF16;
    using X = BF16;
    static constexpr int kStep = 32;
    static constexpr int kPair = 2;
    static constexpr int kBlockPad = 2;

    using Vec = __m512bh;
    static Vec load_x(const X* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec load_w(const T* p) { return (__m512bh)_mm512_loadu_si512(p); }
    static Vec load_w_tail(const T* p, int64_t count) {
        const __mmask32 mask = (1u << count) - 1u;
        return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
    }
    static V step(V acc, Vec x, Vec w) { return _mm512_dpbf16_ps(acc, x, w); }
    static void store_x(X* to, Vec x) { _mm512_storeu_si512(to, (__m512i)x); }
    static Vec broadcast_lane(const X* step, int64_t lane) { return broadcast(step + 2 * lane); }

    using B = BF16;
    static constexpr bool kConvert = false;
    static Vec broadcast(const B* p) {
        int32_t pair;
        std::memcpy(&pair, p, 4);
        return (__m512bh)_mm512_set1_epi32(pair);
    }
    static Vec broadcast_last(const B* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }
    static Vec load_packed(const X* p) { return load_x(p); }

    // Eight rows beside whole vectors of them. Zen 4 takes two such steps a cycle.
    using HalfV = __m256;
    using HalfVec = __m256bh;
    static HalfVec load_half(const X* p) {
        return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    }
    static HalfVec half(Vec v) { return (__m256bh)_mm512_castsi512_si256((__m512i)v); }
    static HalfV step(HalfV acc, HalfVec x, HalfVec w) { return _mm256_dpbf16_ps(acc, x, w); }
    static V whole(HalfV v) { return _mm512_zextps256_ps512(v); }

    static __m512i words(V a, V b) {
        const __m512i lo = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(a));
        const __m512i hi = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(b));
        return _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16));
    }
    static void store_pair(X* h, int64_t, V a, V b) { _mm512_storeu_si512(h, words(a, b)); }
    static void store_half_pair(X* h, V a, V b) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), _mm512_castsi512_si256(words(a, b)));
    }
    static void store_h(X* h, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(h), (__m256i)_mm512_cvtneps_pbh(v));
    }
    static X to_x(T value) { return value; }
    static void transpose(const T* const* from, X* to, int64_t stride) {
        transpose_rows(from, to, stride);
    }
    static void transpose_half(const T* const* from, X* to, int64_t stride) {
        transpose_rows(from, to, stride, true);
    }
};
#endif

}  // namespace
}  // namespace moe_offload
