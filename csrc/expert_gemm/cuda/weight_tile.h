// How a prefill tile's 128 weight rows get into shared memory, 32 k at a time, as T, and from there
// into the matrix instructions' operands. Two steps each: fetch() starts, place() puts into a
// stage.
//
// Plain weights are copied by cp.async, so fetch() does nothing. Quantised ones are fetched into
// registers while a stage is multiplied, and unpacked and stored while the next one is: each number
// once per block, where unpacking operands would do it in every warp that shares them. What lies in
// shared memory are the bits of a page dequantised to T beforehand, so the two give equal results.
//
// Matrices stored [k, rows] lie in shared memory as they lie in the page, a line of 128 rows per k,
// and ldmatrix transposes: the operands, and so the results, are those of the same matrix [rows,
// k].
#pragma once

#include "expert_gemm/cuda/params.h"
#include "expert_gemm/cuda/weight_formats.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

constexpr int kPrefillThreads = 256;
constexpr int kPrefillBlockN = 128;  // weight rows
constexpr int kPrefillBlockK = 32;
constexpr int kPrefillRowBytes = kPrefillBlockK * 2;

// Operands of 16 weight rows by 16 k from rows of 32 k: (k low, k high) of eight rows, then of the
// next eight.
SIMT_FUNCTION void load_weight_operand(uint32_t (&b)[4], const unsigned char* stage, int first_row,
                                       int half) {
    const int lane = simt::lane_id();
    simt::ldmatrix_x4(
        b, stage + swizzle64(first_row + lane / 16 * 8 + lane % 8, half * 2 + lane / 8 % 2));
}

// `row_of(local)`: the matrix row of the tile's local-th of 128.
template <class T, class Format>
class WeightTile {
    static constexpr int kThreadsPerRow = kPrefillThreads / kPrefillBlockN;
    static constexpr int kLaneK = kPrefillBlockK / kThreadsPerRow;  // 16 numbers

  public:
    struct Fetched {
        simt::U4 codes;
        uint32_t scale;
    };

    template <class RowOf>
    SIMT_FUNCTION WeightTile(const WeightMatrix& matrix, RowOf&& row_of) : matrix_(matrix) {
        const int row = row_of(simt::thread_id() / kThreadsPerRow);
        row_ = uint32_t(row) * (uint32_t(matrix.k_size) / 16 * (Format::kBits / 4));
        scale_row_ = Format::scale_row(matrix, row);
    }

    // This thread's 16 of the columns k .. k + 31. Beyond the end nothing is read, and codes and
    // scales of zero bits are zeros in every format.
    SIMT_FUNCTION Fetched fetch(int k) const {
        Fetched fetched{};
        const int at = k + first_k();
        if (at >= matrix_.k_size) return fetched;
        const unsigned char* from =
            matrix_.codes + uint64_t(row_ + uint32_t(at) / 16 * (Format::kBits / 4)) * 8;
        if constexpr (Format::kBits == 8)
            fetched.codes = simt::load16<simt::Keep::reused>(from);
        else
            simt::load8<simt::Keep::reused>(from, fetched.codes.word[0], fetched.codes.word[1]);
        if constexpr (!Format::kScaleSums)
            fetched.scale = Format::load_scale(matrix_, scale_row_, at);
        return fetched;
    }

    SIMT_FUNCTION static void load_operand(uint32_t (&b)[4], const unsigned char* stage,
                                           int first_row, int half) {
        load_weight_operand(b, stage, first_row, half);
    }

    // A scale that serves 128 columns is read here: it is in L1, and no register is left to hold
    // it.
    SIMT_FUNCTION void place(const Fetched& fetched, int k, unsigned char* stage) const {
        const int row = simt::thread_id() / kThreadsPerRow;
        const float scale =
            Format::kScaleSums ? Format::scale_of(Format::load_scale(matrix_, scale_row_, k)) : 1;
        SIMT_UNROLL for (int part = 0; part < kLaneK / 8; ++part) {
            simt::U4 pairs = Format::unpack(fetched.codes, part, fetched.scale);
            if constexpr (Format::kScaleSums) pairs = times_float(pairs, scale);
            *reinterpret_cast<simt::U4*>(stage + swizzle64(row, first_k() / 8 + part)) = pairs;
        }
    }

  private:
    SIMT_FUNCTION static int first_k() { return simt::thread_id() % kThreadsPerRow * kLaneK; }
    SIMT_FUNCTION static simt::U4 times_float(simt::U4 pairs, float scale) {
        SIMT_UNROLL for (int i = 0; i < 4; ++i) pairs.word[i] =
            simt::pack<T>(simt::unpack_low<T>(pairs.word[i]) * scale,
                          simt::unpack_high<T>(pairs.word[i]) * scale);
        return pairs;
    }

    WeightMatrix matrix_;
    uint32_t row_;  // in units of 8 bytes, half the registers of a pointer
    uint32_t scale_row_;
};

// The same by cp.async.
template <class T>
class WeightTile<T, PlainWeights<T>> {
  public:
    struct Fetched {};

    template <class RowOf>
    SIMT_FUNCTION WeightTile(const WeightMatrix& matrix, RowOf&& row_of) : matrix_(matrix) {
        SIMT_UNROLL for (int i = 0; i < 2; ++i) rows_[i] =
            row_of(simt::thread_id() / 4 + 64 * i) * uint32_t(matrix.k_size / 8);
    }
    SIMT_FUNCTION Fetched fetch(int) const { return {}; }
    SIMT_FUNCTION void place(Fetched, int k, unsigned char* stage) const {
        const int row = simt::thread_id() / 4, chunk = simt::thread_id() % 4;
        const int at = k / 8 + chunk;
        const bool inside = at * 8 < matrix_.k_size;
        SIMT_UNROLL for (int i = 0; i < kPrefillBlockN / 64; ++i) {
            const uint64_t offset = inside ? uint64_t(rows_[i] + at) * 16 : 0;
            simt::cp_async(stage + swizzle64(row + 64 * i, chunk), matrix_.codes + offset,
                           inside ? 16 : 0);
        }
    }
    SIMT_FUNCTION static void load_operand(uint32_t (&b)[4], const unsigned char* stage,
                                           int first_row, int half) {
        load_weight_operand(b, stage, first_row, half);
    }

  private:
    WeightMatrix matrix_;
    uint32_t rows_[2];  // in units of 16 bytes
};

// The same from a matrix [k, rows]. `row_of` is asked for multiples of eight, with the seven rows
// that follow in memory.
template <class T>
class WeightTile<T, TransposedWeights<T>> {
    static constexpr int kChunks = kPrefillBlockN / 8;  // of a k, 16 bytes each

  public:
    struct Fetched {};

    template <class RowOf>
    SIMT_FUNCTION WeightTile(const WeightMatrix& matrix, RowOf&& row_of)
        : matrix_(matrix), chunk_(row_of(simt::thread_id() % kChunks * 8) / 8) {}
    SIMT_FUNCTION Fetched fetch(int) const { return {}; }
    SIMT_FUNCTION void place(Fetched, int k, unsigned char* stage) const {
        const int local = simt::thread_id() / kChunks, chunk = simt::thread_id() % kChunks;
        SIMT_UNROLL for (int i = 0; i < 2; ++i) {
            const int at = k + local + i * kPrefillBlockK / 2;
            const bool inside = at < matrix_.k_size;
            const int64_t offset = inside ? (int64_t(at) * (matrix_.rows / 8) + chunk_) * 16 : 0;
            simt::cp_async(stage + swizzle256(local + i * kPrefillBlockK / 2, chunk),
                           matrix_.codes + offset, inside ? 16 : 0);
        }
    }
    SIMT_FUNCTION static void load_operand(uint32_t (&b)[4], const unsigned char* stage,
                                           int first_row, int half) {
        const int lane = simt::lane_id();
        simt::ldmatrix_x4_trans(b, stage + swizzle256(half * 16 + lane / 8 % 2 * 8 + lane % 8,
                                                      first_row / 8 + lane / 16));
    }

  private:
    WeightMatrix matrix_;
    int chunk_;  // of every k, this thread's eight rows
};

}  // namespace moe_offload::cuda
