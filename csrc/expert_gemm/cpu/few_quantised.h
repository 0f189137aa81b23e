// Few rows times quantised weights, unpacked in registers (unpack.h).
//
// Rows of weights lie side by side as in few_tile (few_rows.h), and each element is summed in the
// same order there, so the bits are those of the dequantised matrix. Codes of an expert are read
// once and nothing is written, where dequantising rows to scratch first writes and reads two bytes
// a number.
#pragma once

#include "expert_gemm/cpu/dequantise.h"
#include "expert_gemm/cpu/few_rows.h"
#include "expert_gemm/cpu/numbers.h"

namespace moe_offload {
namespace {

// Codes of so many bytes further on are prefetched: less than plain rows' (few_rows.h), because a
// task has fewer bytes and its last ones are not asked for in time. Zen 5, two cores, one token,
// GB/s of mxfp4, fp8, int4: 31 34 25 with 64 KiB, 32 38 33 with 16, 34 to 35 39 to 50 41 with 4.
constexpr int64_t kCodesAhead = 4 << 10;

// Weight rows per tile: four hide the latency of a step behind the unpacking, and have pointers to
// codes and scales in registers.
template <class Op>
constexpr int quantised_tile_rows(int rows) {
    const int most = few_tile_rows<Op>(rows);
    return most < 4 ? most : 4;
}

// From so many rows of x on, rows of weights are unpacked to bf16 in the L1 instead.
template <class Op>
constexpr int kUnpackedFrom = has_places<Op> ? 6 : kMostFewRows<Op> + 1;

// Sums of MR rows of x times NR rows of weights.
template <class Op, int MR, int NR>
struct FewSums {
    using L = typename Op::L;
    typename L::V acc[MR * NR];

    FewSums() {
        for (int i = 0; i < MR * NR; ++i) acc[i] = L::set(0.0f);
    }
    // 32 numbers of each weight row, or as many as `parts` steps have. unpack(n): row n's. Where
    // registers are few, one row after the other.
    template <class Unpack>
    void add(const typename Op::X* x, int64_t x_stride, const Unpack& unpack,
             int parts = Numbers<Op>::kParts) {
        constexpr int kBeside = L::kWidth == 16 ? NR : 1;
#pragma GCC unroll 8
        for (int first = 0; first < NR; first += kBeside) {
            Numbers<Op> w[kBeside];
#pragma GCC unroll 8
            for (int n = 0; n < kBeside; ++n) w[n] = unpack(first + n);
#pragma GCC unroll 8
            for (int part = 0; part < parts; ++part)
#pragma GCC unroll 8
                for (int m = 0; m < MR; ++m) {
                    const typename Op::Vec xv = Op::load_x(x + m * x_stride + part * Op::kStep);
#pragma GCC unroll 8
                    for (int n = 0; n < kBeside; ++n) {
                        typename L::V& sum = acc[m * NR + first + n];
                        sum = Op::step(sum, xv, w[n].part[part]);
                    }
                }
        }
    }
    void store(float* c, int64_t ldc) const { store_sums<L, MR, NR>(acc, c, ldc); }
};

// What a tile of NR weight rows reads.
template <int NR>
struct QuantisedRows {
    const uint8_t* codes[NR];
    const std::byte* scales[NR];
    int64_t ahead;  // bytes from codes to those to prefetch; 0: none

    // Once for each cache line of a row of codes.
    void prefetch(int64_t offset) const {
        for (int n = 0; n < NR; ++n) __builtin_prefetch(codes[n] + offset + ahead, 0, 2);
    }
};

struct Mxfp4Rows {
    static int64_t row_bytes(int64_t k_size) { return k_size / 2; }
    static int64_t scale_bytes(int64_t k_size, int64_t) { return k_size / kGroup; }

    template <class Op, int MR, int NR>
    static void tile(const typename Op::X* x, int64_t x_stride, const QuantisedRows<NR>& rows,
                     const FewMatrix&, int64_t k_size, float* c, int64_t ldc) {
        bool regular = true;
        for (int n = 0; n < NR; ++n)
            regular = regular && are_regular(reinterpret_cast<const uint8_t*>(rows.scales[n]),
                                             k_size / kGroup);
        (regular ? &walk<Op, MR, NR, true> : &walk<Op, MR, NR, false>)(x, x_stride, rows, k_size, c,
                                                                       ldc);
    }

    template <class Op, int MR, int NR, bool Regular>
    static void walk(const typename Op::X* x, int64_t x_stride, const QuantisedRows<NR>& rows,
                     int64_t k_size, float* c, int64_t ldc) {
        FewSums<Op, MR, NR> sums;
        const uint8_t *codes[NR], *scales[NR];
        for (int n = 0; n < NR; ++n) {
            codes[n] = rows.codes[n];
            scales[n] = reinterpret_cast<const uint8_t*>(rows.scales[n]);
        }
        for (int64_t k = 0; k < k_size; k += kGroup) {
            if (k % 128 == 0) rows.prefetch(k / 2);
            sums.add(x + k, x_stride, [&](int n) {
                const uint8_t* at = codes[n] + k / 2;
                const uint8_t scale = scales[n][k / kGroup];
                return Regular ? Mxfp4Numbers<Op>::regular(at, scale)
                               : Numbers<Op>::of(mxfp4_words<typename Op::L>(at, scale));
            });
        }
        sums.store(c, ldc);
    }
};

// Scale: type of a scale, BF16 or F16.
template <class Scale>
struct Int4Rows {
    static int64_t row_bytes(int64_t k_size) { return k_size / 2; }
    static int64_t scale_bytes(int64_t k_size, int64_t group) {
        return k_size / group * static_cast<int64_t>(sizeof(Scale));
    }

    template <class Op, int MR, int NR>
    static void tile(const typename Op::X* x, int64_t x_stride, const QuantisedRows<NR>& rows,
                     const FewMatrix& matrix, int64_t k_size, float* c, int64_t ldc) {
        using Unpack = Int4Numbers<Op, Scale>;
        FewSums<Op, MR, NR> sums;
        for (int64_t begin = 0, g = 0; begin < k_size; begin += matrix.group, ++g) {
            typename Unpack::Table tables[NR];
#pragma GCC unroll 8
            for (int n = 0; n < NR; ++n)
                tables[n] = Unpack::table(widen(reinterpret_cast<const Scale*>(rows.scales[n])[g]));
            for (int64_t k = begin; k < begin + matrix.group; k += kWords) {
                if (k % 128 == 0) rows.prefetch(k / 2);
                sums.add(x + k, x_stride,
                         [&](int n) { return Unpack::numbers(rows.codes[n] + k / 2, tables[n]); });
            }
        }
        sums.store(c, ldc);
    }
};

// All rows of a tile are of one row of blocks, whose magnitudes are at hand.
template <class Scale>
struct Fp8Rows {
    template <class Op, int MR, int NR>
    static void tile(const typename Op::X* x, int64_t x_stride, const QuantisedRows<NR>& rows,
                     const FewMatrix& matrix, int64_t k_size, float* c, int64_t ldc) {
        using Unpack = Fp8Numbers<Op>;
        FewSums<Op, MR, NR> sums;
        const auto* scales = reinterpret_cast<const Scale*>(rows.scales[0]);
        for (int64_t begin = 0; begin < k_size; begin += kBlock) {
            const int64_t end = begin + kBlock < k_size ? begin + kBlock : k_size;
            const auto table = Unpack::table(matrix.scratch + begin, widen(scales[begin / kBlock]));
            int64_t k = begin;
            for (; k + kWords <= end; k += kWords) {
                if (k % 64 == 0) rows.prefetch(k);
                sums.add(x + k, x_stride,
                         [&](int n) { return Unpack::numbers(rows.codes[n] + k, table); });
            }
            if (k == end) continue;
            sums.add(
                x + k, x_stride,
                [&](int n) { return Unpack::tail(rows.codes[n] + k, end - k, table); },
                static_cast<int>((end - k + Op::kStep - 1) / Op::kStep));
        }
        sums.store(c, ldc);
    }
};

// The tiles of rows n in [n, n + NR), or of those before `end`.
template <class Op, int MR, class Rows, int NR>
inline void quantised_tile(const typename Op::X* x, int64_t x_stride, const QuantisedRows<NR>& rows,
                           const FewMatrix& matrix, int64_t k_size, float* c) {
    constexpr int kHalf = Op::L::kWidth == 16 || MR <= 6 ? MR : 4;
    Rows::template tile<Op, kHalf, NR>(x, x_stride, rows, matrix, k_size, c, kChunkStride);
    if constexpr (kHalf < MR)
        Rows::template tile<Op, MR - kHalf, NR>(x + kHalf * x_stride, x_stride, rows, matrix,
                                                k_size, c + kHalf * kChunkStride, kChunkStride);
}

// FewProduct of matrices whose rows have scales of their own.
template <class Op, int MR, class Rows>
void few_product_quantised(const typename Op::X* x, int64_t x_stride, FewMatrix& matrix,
                           int64_t begin, int64_t end, int64_t limit, int64_t k_size, float* c) {
    constexpr int NR = quantised_tile_rows<Op>(Op::L::kWidth == 16 || MR <= 6 ? MR : 4);
    const int64_t row_bytes = Rows::row_bytes(k_size);
    const int64_t scale_bytes = Rows::scale_bytes(k_size, matrix.group);
    const int64_t ahead = rows_ahead(kCodesAhead, row_bytes * matrix.step, NR);
    for (int64_t n = begin; n < end; n += NR) {
        QuantisedRows<NR> rows;
        rows.ahead = n + ahead + NR <= limit ? ahead * row_bytes * matrix.step : 0;
        for (int64_t i = 0; i < NR; ++i) {
            const int64_t row = matrix.first + (n + i < end ? n + i : end - 1) * matrix.step;
            rows.codes[i] = reinterpret_cast<const uint8_t*>(matrix.base + row * row_bytes);
            rows.scales[i] = matrix.scales + row * scale_bytes;
        }
        quantised_tile<Op, MR, Rows>(x, x_stride, rows, matrix, k_size, c + (n - begin));
    }
}

// FewProduct of fp8 blocks: a tile ends where its row of blocks does.
template <class Op, int MR, class Scale>
void few_product_fp8(const typename Op::X* x, int64_t x_stride, FewMatrix& matrix, int64_t begin,
                     int64_t end, int64_t limit, int64_t k_size, float* c) {
    using L = typename Op::L;
    constexpr int NR = quantised_tile_rows<Op>(Op::L::kWidth == 16 || MR <= 6 ? MR : 4);
    const int64_t blocks = (k_size + kBlock - 1) / kBlock;
    const int64_t ahead = rows_ahead(kCodesAhead, k_size * matrix.step, NR);
    for (int64_t n = begin; n < end;) {
        const int64_t block_row = (matrix.first + n * matrix.step) / kBlock;
        const int64_t below =
            (block_row + 1) * kBlock - matrix.first;  // stored rows of it, at most
        const int64_t next = (below + matrix.step - 1) / matrix.step;
        const int64_t stop = next < end ? next : end;
        const std::byte* const scales =
            matrix.scales + block_row * blocks * static_cast<int64_t>(sizeof(Scale));
        if (Fp8<L>::kMagnitudes && matrix.block_row != block_row) {
            for (int64_t b = 0; b < blocks; ++b)
                fp8_magnitudes<L>(widen(reinterpret_cast<const Scale*>(scales)[b]),
                                  matrix.scratch + b * kBlock);
            matrix.block_row = block_row;
        }
        for (; n < stop; n += NR) {
            QuantisedRows<NR> rows;
            rows.ahead = n + ahead + NR <= limit ? ahead * k_size * matrix.step : 0;
            for (int64_t i = 0; i < NR; ++i) {
                const int64_t row = n + i < stop ? n + i : stop - 1;
                rows.codes[i] = reinterpret_cast<const uint8_t*>(
                    matrix.base + (matrix.first + row * matrix.step) * k_size);
                rows.scales[i] = scales;
            }
            quantised_tile<Op, MR, Fp8Rows<Scale>>(x, x_stride, rows, matrix, k_size,
                                                   c + (n - begin));
        }
        n = stop;
    }
}

// FewProduct of any of them by way of rows of bf16 in scratch.
template <class Op, int MR, WeightFormat Format>
void few_product_unpacked(const typename Op::X* x, int64_t x_stride, FewMatrix& matrix,
                          int64_t begin, int64_t end, int64_t limit, int64_t k_size, float* c) {
    constexpr int kRows = rows_at_once<Op, MR>(), NR = kUnpackedRows;
    constexpr bool kFourBits =
        Format != WeightFormat::kFp8Block && Format != WeightFormat::kFp8BlockBF16;
    const int64_t row_bytes = (kFourBits ? k_size / 2 : k_size) * matrix.step;
    const int64_t stride = unpacked_stride(k_size), ahead = rows_ahead(kCodesAhead, row_bytes, NR);
    for (int64_t n = begin; n < end; n += NR) {
        const BF16* w[NR];
        for (int64_t i = 0; i < NR; ++i) {
            const int64_t row = matrix.first + (n + i < end ? n + i : end - 1) * matrix.step;
            DequantiseArgs a{};
            a.format = Format;
            a.codes = matrix.base;
            a.scales = matrix.scales;
            a.k_size = k_size;
            a.begin = row;
            a.end = row + 1;
            a.prefetch = n + ahead + NR <= limit ? ahead * row_bytes : 0;
            a.to = reinterpret_cast<std::byte*>(matrix.scratch + i * stride);
            a.group = matrix.group;
            dequantise<typename Op::L>(a);
            w[i] = matrix.scratch + i * stride;
        }
        few_tiles<Op, MR, kRows, NR>(x, x_stride, w, k_size, 0, c + (n - begin));
    }
}

template <class Op, int MR, WeightFormat Format>
constexpr FewProduct<Op> quantised_product() {
    if constexpr (MR >= kUnpackedFrom<Op>)
        return &few_product_unpacked<Op, MR, Format>;
    else if constexpr (Format == WeightFormat::kMxfp4)
        return &few_product_quantised<Op, MR, Mxfp4Rows>;
    else if constexpr (Format == WeightFormat::kInt4Group)
        return &few_product_quantised<Op, MR, Int4Rows<BF16>>;
    else if constexpr (Format == WeightFormat::kInt4GroupF16)
        return &few_product_quantised<Op, MR, Int4Rows<F16>>;
    else if constexpr (Format == WeightFormat::kFp8Block)
        return &few_product_fp8<Op, MR, float>;
    else
        return &few_product_fp8<Op, MR, BF16>;
}

}  // namespace
}  // namespace moe_offload
