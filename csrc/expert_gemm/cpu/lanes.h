// The few vector operations the kernels are written in, once per instruction set.
//
// Everything sits in an unnamed namespace: this header is compiled several times with different
// instruction sets, and a function with external linkage could be merged across them by the linker
// and then run where it may not. For the same reason no file of the kernels uses standard library
// templates. Vectors are GCC and Clang vector types, so + - * / and comparisons need no wrapper.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moe_offload {
namespace {

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast_to(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// ---- portable: vectors of N floats that the compiler lowers to what there is ------------------

// The additions of sum(), of N vectors instead of lanes.
template <int N, class V, class At>
inline V added_by_halves(const At& at) {
    V v[N];
    for (int i = 0; i < N; ++i) v[i] = at(i);
#pragma GCC unroll 4
    for (int width = N / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] = v[i] + v[i + width];
    return v[0];
}

// GCC takes the size of a vector type as a literal only.
template <int N>
struct VectorTypes;
#define MOE_VECTOR_TYPES(N)                                     \
    template <>                                                 \
    struct VectorTypes<N> {                                     \
        typedef float V __attribute__((vector_size(4 * N)));    \
        typedef int32_t I __attribute__((vector_size(4 * N)));  \
        typedef uint32_t U __attribute__((vector_size(4 * N))); \
        typedef uint16_t H __attribute__((vector_size(2 * N))); \
    };
MOE_VECTOR_TYPES(4)
MOE_VECTOR_TYPES(8)
MOE_VECTOR_TYPES(16)
#undef MOE_VECTOR_TYPES

template <int N>
struct PortableLanes {
    static constexpr int kWidth = N;
    using V = typename VectorTypes<N>::V;
    using I = typename VectorTypes<N>::I;
    using U = typename VectorTypes<N>::U;
    using H = typename VectorTypes<N>::H;

    static V set(float x) { return V{} + x; }
    static V load(const float* p) {
        V v;
        std::memcpy(&v, p, sizeof(v));
        return v;
    }
    static void store(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }
    static V fma(V a, V b, V c) { return a * b + c; }
    static V select(I mask, V a, V b) { return (V)(((I)a & mask) | ((I)b & ~mask)); }

    static V load(const BF16* p) {
        H h;
        std::memcpy(&h, p, sizeof(h));
        return (V)(__builtin_convertvector(h, U) << 16);
    }
    // Half precision by exponent arithmetic: * 2^112 moves the exponent and normalises denormals.
    static V load(const F16* p) {
        H h;
        std::memcpy(&h, p, sizeof(h));
        const U u = __builtin_convertvector(h, U);
        const U magnitude = (u & 0x7fffu) << 13;
        const V scaled = (V)magnitude * set(0x1p112f);
        const I special = (I)(magnitude >= 0x0f800000u);  // infinity or NaN
        const U bits = ((U)scaled & ~(U)special) | ((magnitude | 0x7f800000u) & (U)special);
        return (V)(bits | ((u & 0x8000u) << 16));
    }
    static void store(BF16* p, V v) {
        const U u = (U)v;
        const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
        const U quiet = (u >> 16) | 0x40u;
        const U nan = (U)(v != v);
        const H h = __builtin_convertvector((rounded & ~nan) | (quiet & nan), H);
        std::memcpy(p, &h, sizeof(h));
    }
    static void store(F16* p, V v) {
        for (int i = 0; i < N; ++i) p[i].bits = half_bits(v[i]);
    }
    template <int M>
    static void sums(const V* v, float* out) {
        for (int i = 0; i < M; ++i) out[i] = sum(v[i]);
    }
    static float sum(V v) {
        float lanes[N];
        store(lanes, v);
        for (int width = N / 2; width > 0; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        return lanes[0];
    }

    template <class At>
    static V added(const At& at) {
        return added_by_halves<N, V>(at);
    }

    static uint16_t half_bits(float value) {
        const uint32_t u = bit_cast_to<uint32_t>(value), sign = (u >> 16) & 0x8000u;
        const uint32_t magnitude = u & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
        if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
        if (magnitude < 0x38800000u) {  // denormal: let float addition round at the right bit
            const float shifted = bit_cast_to<float>(magnitude) + 0.5f;
            return static_cast<uint16_t>(sign | (bit_cast_to<uint32_t>(shifted) - 0x3f000000u));
        }
        const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u;
        return static_cast<uint16_t>(sign | (rounded >> 13));
    }
};

// ---- AVX2 with FMA and F16C -------------------------------------------------------------------

#if defined(__AVX2__)
struct Avx2Lanes {
    static constexpr int kWidth = 8;
    typedef __m256 V;
    typedef int32_t I __attribute__((vector_size(32)));

    static V set(float x) { return _mm256_set1_ps(x); }
    static V load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
    static V select(I mask, V a, V b) { return _mm256_blendv_ps(b, a, (V)mask); }
    static V load(const BF16* p) {
        const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    }
    static V load(const F16* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static void store(BF16* p, V v) {
        const __m256i bits = bf16_bits(v);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(bits, bits), 0x08);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
    }
    // Rounded to bf16, in the lower half of each word.
    static __m256i bf16_bits(V v) {
        const __m256i u = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
        const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(sum, quiet, nan), 16);
    }
    static void store(F16* p, V v) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0));
    }
    template <int N>
    static void sums(const V* v, float* out) {
        int i = 0;
        for (; i + 8 <= N; i += 8) _mm256_storeu_ps(out + i, eight_sums(v + i));
        for (; i < N; ++i) out[i] = sum(v[i]);
    }
    // sum() of eight vectors at once, the same additions.
    static V eight_sums(const V* v) {
        V a[4], b[2];
        for (int i = 0; i < 4; ++i)
            a[i] = _mm256_permute2f128_ps(v[i], v[i + 4], 0x20) +
                   _mm256_permute2f128_ps(v[i], v[i + 4], 0x31);
        for (int i = 0; i < 2; ++i)
            b[i] = _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44) +
                   _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee);
        return _mm256_shuffle_ps(b[0], b[1], 0x88) + _mm256_shuffle_ps(b[0], b[1], 0xdd);
    }
    template <class At>
    static V added(const At& at) {
        return added_by_halves<8, V>(at);
    }
    static float sum(V v) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }
};

// Columns c[0 .. 8)[0 .. 8) to rows.
inline void transpose8(const float* c, int64_t ldc, __m256 (&row)[8]) {
    __m256 a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(c + i * ldc);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
    }
    for (int half = 0; half < 2; ++half) {
        const __m256 p = b[4 * half], q = b[4 * half + 1], r = b[4 * half + 2], s = b[4 * half + 3];
        a[4 * half] = _mm256_shuffle_ps(p, r, 0x44);
        a[4 * half + 1] = _mm256_shuffle_ps(p, r, 0xee);
        a[4 * half + 2] = _mm256_shuffle_ps(q, s, 0x44);
        a[4 * half + 3] = _mm256_shuffle_ps(q, s, 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        row[i] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x20);
        row[i + 4] = _mm256_permute2f128_ps(a[i], a[i + 4], 0x31);
    }
}
#endif

// ---- AVX-512 (F, BW, DQ, VL) ------------------------------------------------------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)
struct Avx512Lanes {
    static constexpr int kWidth = 16;
    typedef __m512 V;
    typedef int32_t I __attribute__((vector_size(64)));

    static V set(float x) { return _mm512_set1_ps(x); }
    static V load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
    static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
    static V select(I mask, V a, V b) {
        return _mm512_mask_blend_ps(_mm512_movepi32_mask((__m512i)mask), b, a);
    }
    static V load(const BF16* p) {
        const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    }
    static V load(const F16* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store(BF16* p, V v) {
        const __m512i u = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        const __m512i bits = _mm512_mask_or_epi32(sum, nan, u, _mm512_set1_epi32(0x400000));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
    }
    static void store(F16* p, V v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0));
    }
    // The additions of sums(), of sixteen vectors instead of lanes.
    template <class At>
    static V added(const At& at) {
        V quarter[4];
        for (int i = 0; i < 4; ++i)
            quarter[i] = (at(4 * i) + at(4 * i + 2)) + (at(4 * i + 1) + at(4 * i + 3));
        return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
    }
    // The lanes of each vector added up, sixteen vectors by transposition instead of one by one.
    template <int N>
    static void sums(const V* v, float* out) {  // out has room for N rounded up to 16
        for (int first = 0; first < N; first += 16) {
            V a[16], b[8], c[4];
            for (int i = 0; i < 16; ++i) a[i] = first + i < N ? v[first + i] : _mm512_setzero_ps();
            for (int i = 0; i < 8; ++i)
                b[i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]) +
                       _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            for (int i = 0; i < 4; ++i) {
                const __m512d p = _mm512_castps_pd(b[2 * i]), q = _mm512_castps_pd(b[2 * i + 1]);
                c[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)) +
                       _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
            }
            const V d =
                _mm512_shuffle_f32x4(c[0], c[1], 0x88) + _mm512_shuffle_f32x4(c[0], c[1], 0xdd);
            const V e =
                _mm512_shuffle_f32x4(c[2], c[3], 0x88) + _mm512_shuffle_f32x4(c[2], c[3], 0xdd);
            _mm512_storeu_ps(out + first,
                             _mm512_shuffle_f32x4(d, e, 0x88) + _mm512_shuffle_f32x4(d, e, 0xdd));
        }
    }
};
#endif

}  // namespace
}  // namespace moe_offload
