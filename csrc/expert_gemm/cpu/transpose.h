// Weights stored transposed, [K, N] (gpt-oss, Llama 4), brought into rows of K.
//
// The products read rows that are contiguous along K. Instead of a second set of them for the other
// layout, a thread turns the columns it is about to use, some 64 bytes wide and all of K, into rows
// in scratch that stays in its L2, and runs the same kernels there: the bits are those of a
// row-major matrix, on every instruction set. With many rows the cost vanishes beside the
// products; with few it must hide behind memory, hence the vector code and the prefetch of the next
// panel: from row to row of a panel lie kilobytes, which no hardware prefetcher follows.
#pragma once

#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

// run(): kK rows of kN elements, k_stride bytes apart, to kN rows of kK, to_stride bytes apart.
template <size_t Item>
struct TransposeBlock {
    static constexpr int64_t kK = 1, kN = 1;
    static void run(const std::byte* from, int64_t, std::byte* to, int64_t) {
        std::memcpy(to, from, Item);
    }
};

#if defined(__AVX512F__) && defined(__AVX512BW__)
template <>
struct TransposeBlock<4> {
    static constexpr int64_t kK = 16, kN = 16;
    static void run(const std::byte* from, int64_t k_stride, std::byte* to, int64_t to_stride) {
        transpose16([&](int k) { return _mm512_loadu_si512(from + k * k_stride); },
                    [&](int n, __m512i v) { _mm512_storeu_si512(to + n * to_stride, v); });
    }
};

// Two rows of K interleaved are pairs along K, words as above. Unpacking works within 128 bits, so
// the low halves hold columns 0-3, 8-11, 16-19, 24-27 and the high ones the others.
template <>
struct TransposeBlock<2> {
    static constexpr int64_t kK = 32, kN = 32;
    static void run(const std::byte* from, int64_t k_stride, std::byte* to, int64_t to_stride) {
        const auto row = [&](int k) { return _mm512_loadu_si512(from + k * k_stride); };
        const auto store = [&](int n, __m512i v) { _mm512_storeu_si512(to + n * to_stride, v); };
        transpose16([&](int i) { return _mm512_unpacklo_epi16(row(2 * i), row(2 * i + 1)); },
                    [&](int i, __m512i v) { store(i / 4 * 8 + i % 4, v); });
        transpose16([&](int i) { return _mm512_unpackhi_epi16(row(2 * i), row(2 * i + 1)); },
                    [&](int i, __m512i v) { store(i / 4 * 8 + i % 4 + 4, v); });
    }
};
#elif defined(__SSE2__)
inline __m128i load128(const std::byte* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
}
inline void store128(std::byte* to, __m128i v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), v);
}

template <>
struct TransposeBlock<4> {
    static constexpr int64_t kK = 4, kN = 4;
    static void run(const std::byte* from, int64_t k_stride, std::byte* to, int64_t to_stride) {
        __m128i a[4], b[4];
        for (int k = 0; k < 4; ++k) a[k] = load128(from + k * k_stride);
        for (int i = 0; i < 2; ++i) {
            b[2 * i] = _mm_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for (int i = 0; i < 2; ++i) {
            store128(to + 2 * i * to_stride, _mm_unpacklo_epi64(b[i], b[2 + i]));
            store128(to + (2 * i + 1) * to_stride, _mm_unpackhi_epi64(b[i], b[2 + i]));
        }
    }
};

template <>
struct TransposeBlock<2> {
    static constexpr int64_t kK = 8, kN = 8;
    static void run(const std::byte* from, int64_t k_stride, std::byte* to, int64_t to_stride) {
        __m128i a[8], b[8];
        for (int k = 0; k < 8; ++k) a[k] = load128(from + k * k_stride);
        for (int i = 0; i < 4; ++i) {  // pairs along K: columns 0-3, columns 4-7
            b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
        }
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 2; ++i) {  // fours along K: columns 0-1, columns 2-3
                a[4 * half + 2 * i] = _mm_unpacklo_epi32(b[4 * i + half], b[4 * i + 2 + half]);
                a[4 * half + 2 * i + 1] = _mm_unpackhi_epi32(b[4 * i + half], b[4 * i + 2 + half]);
            }
        for (int half = 0; half < 2; ++half)
            for (int j = 0; j < 2; ++j) {
                const __m128i low = a[4 * half + j], high = a[4 * half + 2 + j];
                std::byte* row = to + (4 * half + 2 * j) * to_stride;
                store128(row, _mm_unpacklo_epi64(low, high));
                store128(row + to_stride, _mm_unpackhi_epi64(low, high));
            }
    }
};
#endif

// to[n][k] = from[k][n] for n < columns; `prefetch` bytes further on in each row the same number of
// columns is fetched into L2 (0: none).
template <class T>
void transpose_panel(const std::byte* from, int64_t k_stride, int64_t columns, int64_t k_size,
                     int64_t prefetch, std::byte* to, int64_t to_stride) {
    using Block = TransposeBlock<sizeof(T)>;
    constexpr int64_t kItem = sizeof(T);
    for (int64_t k0 = 0; k0 < k_size; k0 += Block::kK) {
        const int64_t k1 = k0 + Block::kK < k_size ? k0 + Block::kK : k_size;
        if (prefetch)
            for (int64_t k = k0; k < k1; ++k)
                for (int64_t b = 0; b < columns * kItem; b += 64)
                    __builtin_prefetch(from + k * k_stride + b + prefetch, 0, 2);
        for (int64_t n0 = 0; n0 < columns; n0 += Block::kN) {
            if (k0 + Block::kK <= k_size && n0 + Block::kN <= columns) {
                Block::run(from + k0 * k_stride + n0 * kItem, k_stride,
                           to + n0 * to_stride + k0 * kItem, to_stride);
                continue;
            }
            for (int64_t n = n0; n < n0 + Block::kN && n < columns; ++n)
                for (int64_t k = k0; k < k1; ++k)
                    std::memcpy(to + n * to_stride + k * kItem, from + k * k_stride + n * kItem,
                                sizeof(T));
        }
    }
}

}  // namespace
}  // namespace moe_offload
