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

constexpr int64_t kChunk = 48;  // outputs per row held before the epilogue; every NR divides it
// Rows of a chunk of outputs: room for the vector and the tile that reach beyond its end.
constexpr int64_t kChunkStride = kChunk + 8;
constexpr int64_t kPrefetchBytes = 64 << 10;
constexpr int64_t kPageBytes = 4096, kPagesAhead = 3, kHeadBytes = 512;  // streamed
constexpr int64_t kPassingBytes = 256, kAheadBytes = 8192;
constexpr int kStreamedRows = 2;

// Rows of x these kernels take. Pairs: as long as they are not slower than many_rows.h, which
// widens weights to scratch first. Two Zen 3 cores, 64 experts of Qwen3's shape, ms with 9, 16 and
// 24 rows each: 60, 104 and 132, there 120, 120 and 132.
template <class Op>
constexpr int kMostFewRows = has_places<Op> ? 24 : 8;

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
    constexpr int kPairs[] = {4, 4, 3, 2, 2, 2, 1, 1};   // a vector fills two of 16
    return Op::L::kWidth == 16 ? kWide[rows - 1]
           : has_places<Op>    ? kPairs[rows - 1]
                               : kNarrow[rows - 1];
}

// Rows of x multiplied at once, by as many weight rows as leave them registers; the others follow
// and find the weights in the L1. In one go, seven or eight leave 16 registers sums of one weight
// row only, for which all of x comes from the L2: AVX2 forced on one Zen 4 core, eight rows of
// OLMoE's shape, 30 GFLOP/s in one go, 48 in two (fp32), and five or six rows lose a fifth. Pairs
// are fastest three by three, one Zen 3 core of 92 GFLOP/s from registers: eight rows 76, where
// elements widened in order had 66 in two goes; four rows 67 in one go, 77 two by two.
template <class Op, int MR>
constexpr int rows_at_once() {
    if (Op::L::kWidth == 16) return MR;
    if (has_places<Op>) return MR == 4 ? 2 : MR > 4 ? 3 : MR;
    return MR > 6 ? 4 : MR;
}

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

// What a tile prefetches: the weights `further` elements on, of all its weight rows, or of those
// that `rows` points at.
template <class Op>
struct Ahead {
    int64_t further;
    const typename Op::T* const* rows;
};

// c[m * ldc + n] = sum_k x[m][k] w[n][k]. `Fetched` weight rows are prefetched.
template <class Op, int MR, int NR, int Fetched = NR>
inline void few_tile(const typename Op::X* x, int64_t x_stride, const typename Op::T* const* w,
                     int64_t k_size, Ahead<Op> ahead, float* c, int64_t ldc) {
    using L = typename Op::L;
    typename L::V acc[MR * NR];
    for (int i = 0; i < MR * NR; ++i) acc[i] = L::set(0.0f);
    int64_t k = 0;
    // Pairs ask for each line four times, as 16-bit elements widened in order do: with two, two Zen
    // 3 cores read pages of 4 KiB 3 to 9 % slower. Where others compute meanwhile, twice is enough.
    constexpr int kTries = has_places<Op> && Fetched > 1 ? 2 : 1;
    // A pair takes two registers: weight rows one after the other leave room for the sums.
    constexpr int kBeside = has_places<Op> && MR <= 3 ? 1 : NR;
    const auto step = [&](const auto& load) {
#pragma GCC unroll 8
        for (int first = 0; first < NR; first += kBeside) {
            typename Op::Vec ws[kBeside];
            for (int n = 0; n < kBeside; ++n) ws[n] = load(first + n);
#pragma GCC unroll 8
            for (int m = 0; m < MR; ++m) {
                const typename Op::Vec xv = Op::load_x(x + m * x_stride + k);
                for (int n = 0; n < kBeside; ++n) {
                    typename L::V& sum = acc[m * NR + first + n];
                    sum = Op::step(sum, xv, ws[n]);
                }
            }
        }
    };
    for (; k + Op::kStep <= k_size; k += Op::kStep)
        step([&](int n) {
            if (n < Fetched)
#pragma GCC unroll 2
                for (int i = 0; i < kTries; ++i)
                    __builtin_prefetch((Fetched < NR ? ahead.rows : w)[n] + k + ahead.further +
                                           i * Op::kStep / kTries,
                                       0, 2);
            return Op::load_w(w[n] + k);
        });
    if (k < k_size) step([&](int n) { return Op::load_w_tail(w[n] + k, k_size - k); });
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

// The same of MR rows of x, `Some` of them at a time, each of which prefetches its share.
template <class Op, int MR, int Some, int NR, int Part = 0>
inline void few_tiles(const typename Op::X* x, int64_t x_stride, const typename Op::T* const* w,
                      int64_t k_size, int64_t prefetch, float* c) {
    constexpr int kParts = (MR + Some - 1) / Some, kFirst = Part * Some;
    constexpr int kRows = MR - kFirst < Some ? MR - kFirst : Some;
    constexpr int kFetched = (NR + kParts - 1) / kParts;
    const typename Op::T* fetched[kFetched];
    for (int i = 0; i < kFetched; ++i) fetched[i] = w[(Part * kFetched + i) % NR];
    few_tile<Op, kRows, NR, kFetched>(x + kFirst * x_stride, x_stride, w, k_size,
                                      {prefetch, fetched}, c + kFirst * kChunkStride, kChunkStride);
    if constexpr (Part + 1 < kParts)
        few_tiles<Op, MR, Some, NR, Part + 1>(x, x_stride, w, k_size, prefetch, c);
}

// A matrix as these kernels read it.
struct FewMatrix {
    const std::byte* base;
    int64_t row_stride;  // bytes

    // Quantised, few_quantised.h: row n is stored row first + n * step, rows without gaps.
    const std::byte* scales;  // of stored row 0
    int64_t first, step, group;
    BF16* scratch;           // few_scratch_bytes
    int64_t block_row = -1;  // of fp8: whose magnitudes those are, [K in whole blocks]
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
    constexpr int kRows = rows_at_once<Op, MR>(), NR = few_tile_rows<Op>(kRows);
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
        few_tiles<Op, MR, kRows, NR>(x, x_stride, w, k_size,
                                     prefetch / static_cast<int64_t>(sizeof(T)), to);
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
        int64_t i = 0;
        for (; i + Op::kStep <= k; i += Op::kStep) Op::store_x(to + i, Op::load_w(from + i));
        if (i < k) {
            Op::store_x(to + i, Op::load_w_tail(from + i, k - i));
            i += Op::kStep;
        }
        for (; i < stride; ++i) to[i] = X{};
    }
}

}  // namespace
}  // namespace moe_offload
