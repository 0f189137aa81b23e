// Few rows times weights stored transposed, [K, N] (gpt-oss, Llama 4), where they are.
//
// Lanes run along N here: a row of K is loaded and multiplied by one broadcast element of x (bf16
// pairs: two rows, interleaved). The sum that lane j of a row-major product holds (few_rows.h: all
// k that are j, in steps of a vector) is vector j of a block of columns, and at the end those are
// added as the lanes would be: so the bits are the row-major matrix's. These sums do not fit
// registers: a line of columns has its own loaded and stored once for each 512 rows of K. Those
// rows lie kilobytes apart, which hardware prefetchers do not follow: they are walked for all
// columns at hand before the next, which are prefetched meanwhile.
//
// gpt-oss's shape, two Zen 5 cores, GB/s here and with rows made of columns first (transpose.h,
// which takes more than kWorthRows): one token 41 and 25 (in pieces of 32 rows 26 to 29), eight
// tokens 34 and 30, 16 tokens or four rows an expert 28 and 29. AVX-512 without BF16: one token 37
// and 29, four 30 and 31. AVX2: 22 and 18, at 16 tokens 21 and 17, at 30 13 and 12.
#pragma once

#include "expert_gemm/cpu/few_rows.h"

namespace moe_offload {
namespace {

constexpr int64_t kPiece = 512;  // rows of K walked for all columns before the next

// One step: `kRows` rows of K and one cache line of columns, in vectors as products want them.
template <class Op>
struct ColumnStep {
    using L = typename Op::L;
    static constexpr int64_t kRows = 1;
    static constexpr int kVectors = 64 / (L::kWidth * static_cast<int>(sizeof(typename Op::T)));

    static typename Op::Vec load(const std::byte* row, int64_t, int v) {
        return L::load(reinterpret_cast<const typename Op::T*>(row) + v * L::kWidth);
    }
    // Sums to columns in order.
    static void store(float* to, const typename L::V* sums) {
        for (int v = 0; v < kVectors; ++v) L::store(to + v * L::kWidth, sums[v]);
    }
};

#if defined(__AVX2__)
template <>
struct ColumnStep<PairOp> {
    using L = PairOp::L;
    static constexpr int64_t kRows = 2;
    static constexpr int kVectors = 4;

    static PairOp::Vec load(const std::byte* row, int64_t k_stride, int v) {
        const auto at = [v](const std::byte* p) {
            return L::load(reinterpret_cast<const BF16*>(p) + v * L::kWidth);
        };
        return {at(row), at(row + k_stride)};
    }
    static void store(float* to, const L::V* sums) {
        for (int v = 0; v < kVectors; ++v) L::store(to + v * L::kWidth, sums[v]);
    }
};
#endif

#if defined(__AVX512BF16__)
template <>
struct ColumnStep<DotOp> {
    static constexpr int64_t kRows = 2;
    static constexpr int kVectors = 2;

    // Unpacking works within 128 bits: columns 0-3, 8-11, 16-19, 24-27, and the others.
    static __m512bh load(const std::byte* row, int64_t k_stride, int v) {
        const __m512i a = _mm512_loadu_si512(row), b = _mm512_loadu_si512(row + k_stride);
        return (__m512bh)(v ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b));
    }
    static void store(float* to, const __m512* sums) {
        const __m512i first =
            _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        _mm512_storeu_ps(to, _mm512_permutex2var_ps(sums[0], first, sums[1]));
        _mm512_storeu_ps(to + 16, _mm512_permutex2var_ps(sums[0], second, sums[1]));
    }
};
#endif

template <class Op>
struct FewColumns {
    using L = typename Op::L;
    using V = typename L::V;
    using X = typename Op::X;
    using Step = ColumnStep<Op>;
    static constexpr int64_t kItem = sizeof(typename Op::T), kLanes = L::kWidth;
    static constexpr int kVectors = Step::kVectors;
    static constexpr int64_t kBlock = kVectors * kLanes, kBlockBytes = kBlock * kItem;
    static constexpr int64_t kSums = kLanes * kBlock;           // of one row of x and a block
    static constexpr int kMostSums = L::kWidth == 16 ? 16 : 8;  // vectors in registers
    static constexpr int kMostRows = kMostSums / kVectors < 4 ? kMostSums / kVectors : 4;  // of x

    // Rows of x up to which this was the faster way; not measured on the portable path.
    static constexpr int64_t kWorthRows = L::kWidth == 16 ? (Step::kRows == 2 ? 2 : 1) : 8;

    // Columns whose sums stay in 64 KiB, 1024 at most.
    static int64_t at_a_time(int64_t rows) {
        const int64_t columns =
            (64 << 10) / (kLanes * static_cast<int64_t>(sizeof(float)) * rows) / kBlock * kBlock;
        return columns < 1024 ? columns : 1024;
    }
    static int64_t sums(int64_t rows) { return at_a_time(rows) * kLanes * rows; }

    const X* x;
    int64_t rows, x_stride;
    int64_t k_stride;  // bytes from row to row of K
    int64_t k_size;
    float* scratch;  // sums(rows)

    // c[m * ldc + n] = sum_k x[m][k] w[k][n] for n < columns, rounded up to whole blocks; `next`:
    // row 0 of the columns that come then, or null.
    void multiply(const std::byte* w, int64_t columns, const std::byte* next, float* c,
                  int64_t ldc) const {
        const int64_t whole = k_size / Op::kStep * Op::kStep;
        for (int64_t k = 0; k < k_size;) {
            const int64_t end = k < whole ? (k + kPiece < whole ? k + kPiece : whole) : k_size;
            for (int64_t n = 0; n < columns; n += kBlock) {
                const std::byte* at = w + k * k_stride + n * kItem;
                prefetch(at, k, end, next ? next - w - k * k_stride : 0);
                float* const sums = scratch + n / kBlock * rows * kSums;
                if (end > whole || columns - n < kBlock)
                    padded(at, k, end, columns - n, sums);
                else
                    add(at, k_stride, k, end, sums);
            }
            k = end;
        }
        for (int64_t n = 0; n < columns; n += kBlock)
            for (int64_t m = 0; m < rows; ++m) {
                const float* sums = scratch + (n / kBlock * rows + m) * kSums;
                V totals[kVectors];
                for (int v = 0; v < kVectors; ++v)
                    totals[v] =
                        L::added([&](int j) { return L::load(sums + j * kBlock + v * kLanes); });
                Step::store(c + m * ldc + n, totals);
            }
    }

  private:
    // What follows rows [k, end): as many further on, or of the next columns.
    void prefetch(const std::byte* at, int64_t k, int64_t end, int64_t to_next) const {
        for (int64_t i = k; i < end; ++i, at += k_stride) {
            const bool here = end + i - k < k_size;
            if (!here && !to_next) continue;
            const std::byte* row = here ? at + (end - k) * k_stride : at + to_next;
            for (int64_t b = 0; b < kBlockBytes; b += 64) __builtin_prefetch(row + b, 0, 2);
        }
    }

    // A block beyond the last column or row: zeros stand there.
    void padded(const std::byte* at, int64_t k, int64_t end, int64_t columns, float* sums) const {
        alignas(64) std::byte block[Op::kStep * kBlockBytes];
        const int64_t count = columns < kBlock ? columns : kBlock;
        for (; k < end; k += Op::kStep, at += Op::kStep * k_stride) {
            std::memset(block, 0, sizeof(block));
            for (int64_t i = 0; i < Op::kStep && k + i < end; ++i)
                std::memcpy(block + i * kBlockBytes, at + i * k_stride,
                            static_cast<size_t>(count * kItem));
            add(block, kBlockBytes, k, k + Op::kStep, sums);
        }
    }

    // sums[m][j] += x[m][k] w[k], of whole steps of a vector.
    void add(const std::byte* at, int64_t stride, int64_t k, int64_t end, float* sums) const {
        for (int64_t m = 0; m < rows; m += kMostRows) {
            const X* xm = x + m * x_stride + k;
            float* const to = sums + m * kSums;
            const int64_t steps = (end - k) / Op::kStep;
            const int64_t some = rows - m < kMostRows ? rows - m : kMostRows;
            if (some == 1) add_rows<1>(xm, at, stride, steps, k == 0, to);
            if constexpr (kMostRows >= 2)
                if (some == 2) add_rows<2>(xm, at, stride, steps, k == 0, to);
            if constexpr (kMostRows >= 3)
                if (some == 3) add_rows<3>(xm, at, stride, steps, k == 0, to);
            if constexpr (kMostRows >= 4)
                if (some == 4) add_rows<4>(xm, at, stride, steps, k == 0, to);
        }
    }

    template <int MR>
    void add_rows(const X* from, const std::byte* at, int64_t stride, int64_t steps, bool first,
                  float* sums) const {
        constexpr int kMost = kMostSums / kVectors / MR;
        constexpr int kFit = kMost < 2 ? 1 : kMost < 4 ? 2 : kMost < 8 ? 4 : 8;
        constexpr int JR = kFit < kLanes ? kFit : static_cast<int>(kLanes);
        static_assert(kLanes % JR == 0);
        for (int64_t j = 0; j < kLanes; j += JR) {
            V acc[MR][JR][kVectors];
            const auto each = [&](const auto& body) {
#pragma GCC unroll 4
                for (int m = 0; m < MR; ++m)
#pragma GCC unroll 8
                    for (int i = 0; i < JR; ++i)
#pragma GCC unroll 4
                        for (int v = 0; v < kVectors; ++v)
                            body(acc[m][i][v], sums + m * kSums + (j + i) * kBlock + v * kLanes);
            };
            each([&](V& sum, const float* p) { sum = first ? L::set(0.0f) : L::load(p); });
            const std::byte* row = at + j * Step::kRows * stride;
            const X* xk = from;
            for (int64_t s = 0; s < steps; ++s, row += Op::kStep * stride, xk += Op::kStep)
#pragma GCC unroll 8
                for (int i = 0; i < JR; ++i)
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v) {
                        const typename Op::Vec w =
                            Step::load(row + i * Step::kRows * stride, stride, v);
#pragma GCC unroll 4
                        for (int m = 0; m < MR; ++m)
                            acc[m][i][v] = Op::step(
                                acc[m][i][v], Op::broadcast_lane(xk + m * x_stride, j + i), w);
                    }
            each([&](const V& sum, float* p) { L::store(p, sum); });
        }
    }
};

}  // namespace
}  // namespace moe_offload
