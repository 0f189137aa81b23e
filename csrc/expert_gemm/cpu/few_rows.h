// Few rows per expert: bound by the bytes of the weights.
//
// A tile is all MR rows of x times NR rows of weights, both contiguous along K: a weight vector is
// loaded once and used MR times, and lanes are summed at the end of K. How the NR rows are walked
// is what matters for the memory system:
//
//   streamed: one after the other, the order in memory. Hardware prefetchers follow it within a
//       page; where one begins, the first lines of the page 12 KiB ahead are prefetched, so that
//       its translation and its head are there in time. For vectors of a whole cache line, whose
//       one sum per row of x keeps up with memory (six cycles a line), and one or two rows of x:
//       they are loaded again for each weight row, and more of them leave the processor less far
//       ahead. Each line is also asked for as one that need not be kept, 256 bytes ahead, where
//       hardware prefetchers have it on its way: weights are read once, and without it they drive
//       everything else out of the caches, the code and data of what runs between two layers
//       above all. Decode of the benchmarks' OLMoE in memory is 1.05 x as fast for it (medians
//       of four interleaved processes 1.01 to 1.11; 2 KiB ahead 0.97 to 1.04, because then these
//       requests, of which a core has few, lead and not the prefetchers).
//       On Intel's processors (one was at hand, Emerald Rapids) such requests lead at any distance
//       and stop the prefetchers: there every line is prefetched into the L2, 8 KiB ahead, and
//       nothing else.
//   side by side: NR streams, each loaded row of x used NR times; the rows 64 KiB ahead are
//       prefetched into L2. That needs some 64 KiB before it helps.
//
// Zen 4, one core, one row of x, GB/s with pages of 4 KiB and of 2 MiB: streamed 26.6 and 31.5,
// eight rows side by side 26.0 and 29.9, a plain read of the same bytes 23.7 and 30.8. Two rows
// side by side without prefetches: 12 and 15. Emerald Rapids, two cores, pages of 2 MiB, plain
// reads: 18 without prefetches, 24 with those into the L2 4 to 128 KiB ahead, 14 with those that
// need not be kept; decode of Qwen3's experts 20 to 25 and 12 to 15, eight rows side by side 19.
#pragma once

#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

constexpr int64_t kMostFewRows = 8;  // these kernels take
constexpr int64_t kChunk = 48;  // outputs per row held before the epilogue; every NR divides it
// Rows of a chunk of outputs: room for the vector and the tile that reach beyond its end.
constexpr int64_t kChunkStride = kChunk + 8;
constexpr int64_t kPrefetchBytes = 64 << 10;
constexpr int64_t kPageBytes = 4096, kPagesAhead = 3, kHeadBytes = 512;  // streamed
constexpr int64_t kPassingBytes = 256, kAheadBytes = 8192;
constexpr int kStreamedRows = 2;

template <class Op, int MR>
constexpr bool is_streamed =
    MR <= kStreamedRows && Op::kStep * static_cast<int64_t>(sizeof(typename Op::T)) == 64;

// Whether streamed lines are asked for as ones that need not be kept.
inline bool lets_lines_pass() {
#if defined(__x86_64__)
    static const bool intel = __builtin_cpu_is("intel");
    return !intel;
#else
    return true;
#endif
}

// Weight rows per tile: as many as leave registers for them, their sums and one vector of x.
template <class Op>
constexpr int few_tile_rows(int rows) {
    constexpr int kWide[] = {8, 8, 8, 6, 4, 4, 3, 3};    // 32 registers
    constexpr int kNarrow[] = {8, 4, 3, 2, 2, 2, 1, 1};  // 16
    return Op::L::kWidth == 16 ? kWide[rows - 1] : kNarrow[rows - 1];
}

// Seven or eight rows of x leave 16 registers sums of one weight row only, for which all of x comes
// from the L2: weight rows are then multiplied by four of them first, and from the L1 by the
// others. AVX2 forced on one Zen 4 core, eight rows of OLMoE's shape: 30 GFLOP/s in one go, 48 in
// two (fp32), 44 and 59 (bf16); five or six rows lose a fifth.
template <class Op, int MR>
constexpr bool is_halved = Op::L::kWidth == 8 && MR > 6;

// Elements from one row of few-row x or h to the next. The extra vector keeps rows of 4096 bytes
// from falling into one set of the L1 cache.
template <class Op>
constexpr int64_t few_stride(int64_t k) {
    return (k + Op::kStep - 1) / Op::kStep * Op::kStep + Op::kStep;
}

// c[m * ldc + n] = the lanes of acc[m * NR + n], added up.
template <class L, int MR, int NR>
inline void store_sums(const typename L::V* acc, float* c, int64_t ldc) {
    float sums[MR * NR + 16];
    L::template sums<MR * NR>(acc, sums);
    for (int m = 0; m < MR; ++m)
        for (int n = 0; n < NR; ++n) c[m * ldc + n] = sums[m * NR + n];
}

// How many weight rows ahead of a tile lie `bytes`, in whole tiles.
inline int64_t rows_ahead(int64_t bytes, int64_t row_bytes, int64_t tile_rows) {
    return (bytes / row_bytes / tile_rows + 1) * tile_rows;
}

// c[m * ldc + n] = sum_k x[m][k] w[n][k]
template <class Op, int MR, int NR>
inline void few_tile(const typename Op::X* x, int64_t x_stride, const typename Op::T* const* w,
                     int64_t k_size, int64_t prefetch, float* c, int64_t ldc) {
    using L = typename Op::L;
    typename L::V acc[MR * NR];
    for (int i = 0; i < MR * NR; ++i) acc[i] = L::set(0.0f);
    int64_t k = 0;
    const auto step = [&](const typename Op::Vec* ws) {
#pragma GCC unroll 8
        for (int m = 0; m < MR; ++m) {
            const typename Op::Vec xv = Op::load_x(x + m * x_stride + k);
            for (int n = 0; n < NR; ++n) acc[m * NR + n] = Op::step(acc[m * NR + n], xv, ws[n]);
        }
    };
    for (; k + Op::kStep <= k_size; k += Op::kStep) {
        typename Op::Vec ws[NR];
        for (int n = 0; n < NR; ++n) {
            ws[n] = Op::load_w(w[n] + k);
            __builtin_prefetch(w[n] + k + prefetch, 0, 2);
        }
        step(ws);
    }
    if (k < k_size) {
        typename Op::Vec ws[NR];
        for (int n = 0; n < NR; ++n) ws[n] = Op::load_w_tail(w[n] + k, k_size - k);
        step(ws);
    }
    store_sums<L, MR, NR>(acc, c, ldc);
}

// The same, each weight row to its end before the next begins.
template <class Op, int MR, int NR, bool LetPass>
inline void few_tile_streamed(const typename Op::X* x, int64_t x_stride,
                              const typename Op::T* const* w, int64_t k_size, float* c,
                              int64_t ldc) {
    using L = typename Op::L;
    constexpr int64_t kPage = kPageBytes / static_cast<int64_t>(sizeof(typename Op::T));
    typename L::V all[MR * NR];
    for (int n = 0; n < NR; ++n) {
        typename L::V acc[MR];
        for (int m = 0; m < MR; ++m) acc[m] = L::set(0.0f);
        const auto step = [&](typename Op::Vec wv, int64_t k) {
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m)
                acc[m] = Op::step(acc[m], Op::load_x(x + m * x_stride + k), wv);
        };
        const int64_t whole = k_size / Op::kStep * Op::kStep;
        for (int64_t begin = 0; begin < whole; begin += kPage) {
            const int64_t end = begin + kPage < whole ? begin + kPage : whole;
            const auto at = reinterpret_cast<uintptr_t>(w[n] + begin);
            const uintptr_t page = (at + kPageBytes - 1) / kPageBytes * kPageBytes;
            if (LetPass && page < reinterpret_cast<uintptr_t>(w[n] + end))
                for (int64_t line = 0; line < kHeadBytes; line += 64)
                    __builtin_prefetch(
                        reinterpret_cast<const void*>(page + kPagesAhead * kPageBytes + line), 0,
                        2);
            for (int64_t k = begin; k < end; k += Op::kStep) {
                const auto* const at_k = reinterpret_cast<const std::byte*>(w[n] + k);
                if constexpr (LetPass)
                    __builtin_prefetch(at_k + kPassingBytes, 0, 0);
                else
                    __builtin_prefetch(at_k + kAheadBytes, 0, 2);
                step(Op::load_w(w[n] + k), k);
            }
        }
        if (whole < k_size) step(Op::load_w_tail(w[n] + whole, k_size - whole), whole);
        for (int m = 0; m < MR; ++m) all[m * NR + n] = acc[m];
    }
    store_sums<L, MR, NR>(all, c, ldc);
}

// A matrix as these kernels read it.
struct FewMatrix {
    const std::byte* base;
    int64_t row_stride;  // bytes

    // Quantised, few_quantised.h: row n is stored row first + n * step, rows without gaps.
    const std::byte* scales;  // of stored row 0
    int64_t first, step, group;
    BF16* magnitudes;        // of one row of fp8 blocks, [K in whole blocks]
    int64_t block_row = -1;  // which one's they are
};

// c[m][n - begin] for rows n in [begin, end) of a matrix, MR rows of x. Nothing beyond row `limit`
// is prefetched, unless rows are streamed.
template <class Op>
using FewProduct = void (*)(const typename Op::X* x, int64_t x_stride, FewMatrix& matrix,
                            int64_t begin, int64_t end, int64_t limit, int64_t k_size, float* c);

// FewProduct of a plain matrix.
template <class Op, int MR>
void few_product(const typename Op::X* x, int64_t x_stride, FewMatrix& matrix, int64_t begin,
                 int64_t end, int64_t limit, int64_t k_size, float* c) {
    constexpr int kHalf = is_halved<Op, MR> ? 4 : MR, NR = few_tile_rows<Op>(kHalf);
    using T = typename Op::T;
    const int64_t row_stride = matrix.row_stride;
    const int64_t ahead = rows_ahead(kPrefetchBytes, row_stride, NR);
    for (int64_t n = begin; n < end; n += NR) {
        const T* w[NR];
        for (int64_t i = 0; i < NR; ++i)
            w[i] = reinterpret_cast<const T*>(matrix.base +
                                              (n + i < end ? n + i : end - 1) * row_stride);
        if constexpr (is_streamed<Op, MR>) {
            const auto tile = lets_lines_pass() ? &few_tile_streamed<Op, MR, NR, true>
                                                : &few_tile_streamed<Op, MR, NR, false>;
            tile(x, x_stride, w, k_size, c + (n - begin), kChunkStride);
            continue;
        }
        const int64_t prefetch = n + ahead + NR <= limit ? ahead * row_stride : 0;
        float* to = c + (n - begin);
        few_tile<Op, kHalf, NR>(x, x_stride, w, k_size, prefetch / static_cast<int64_t>(sizeof(T)),
                                to, kChunkStride);
        if constexpr (kHalf < MR)
            few_tile<Op, MR - kHalf, NR>(x + kHalf * x_stride, x_stride, w, k_size, 0,
                                         to + kHalf * kChunkStride, kChunkStride);
    }
}

template <class Op>
inline void add_bias(float* c, const std::byte* bias, int64_t stride, int64_t begin,
                     int64_t count) {
    if (!bias) return;
    for (int64_t n = 0; n < count; ++n)
        c[n] += widen(*reinterpret_cast<const typename Op::T*>(bias + (begin + n) * stride));
}

template <class Op>
void pack_few(const void* hidden, const int64_t* tokens, int64_t rows, int64_t k, void* out) {
    using T = typename Op::T;
    using X = typename Op::X;
    const int64_t stride = few_stride<Op>(k);
    for (int64_t m = 0; m < rows; ++m) {
        const T* from = static_cast<const T*>(hidden) + tokens[m] * k;
        X* to = static_cast<X*>(out) + m * stride;
        for (int64_t i = 0; i < k; ++i) to[i] = Op::to_x(from[i]);
        for (int64_t i = k; i < stride; ++i) to[i] = X{};
    }
}

}  // namespace
}  // namespace moe_offload
