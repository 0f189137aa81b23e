// The many-rows tile on AMX: 32 weight rows times 32 rows of x as 2 x 2 tile registers.
//
// TDPBF16PS computes C[16][16] += A[16][32] B[32][16] with B as pairs, [16][16][2]. A is sixteen
// weight rows where they lie, B is a packed block as it is (kernels.h): neither is rearranged. Rows
// and k beyond the matrix come from a small zero-padded copy, only at its edges.
//
// The including file defines the tile instructions: MOE_TILE_LOAD, _STORE, _ZERO, _DOT and
// MOE_TILE_BEGIN, _END; tile numbers must be literals.
#pragma once

#include "expert_gemm/cpu/many_rows.h"

namespace moe_offload {
namespace {

template <class Lanes>
struct AmxOp {  // epilogue and layout: those of a 16-lane instruction set with bf16 pairs
    using L = Lanes;
    using T = BF16;
    using X = BF16;
    using B = BF16;
    static constexpr int kPair = 2;
    static constexpr bool kConvert = false;
    static void store_pair(X* h, int64_t, typename L::V a, typename L::V b) {
        BF16 lo[L::kWidth], hi[L::kWidth];
        L::store(lo, a);
        L::store(hi, b);
        for (int i = 0; i < L::kWidth; ++i) {
            h[2 * i] = lo[i];
            h[2 * i + 1] = hi[i];
        }
    }
    static void store_h(X*, typename L::V) {}  // f comes in pairs here
    static X to_x(T value) { return value; }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    static void transpose(const T* const* from, X* to, int64_t stride) {
        transpose_rows(from, to, stride);
    }
#endif
};

template <class Lanes>
struct AmxTile {
    static_assert(Lanes::kWidth == 16);
    using Op = AmxOp<Lanes>;
    static constexpr int kMaxVectors = 2;
    static constexpr int kRows = 32;
    static constexpr int kBlockPad = 32;  // k per tile

    static void begin() { MOE_TILE_BEGIN(); }
    static void end() { MOE_TILE_END(); }

    // Sixteen weight rows from k on, as one A operand.
    struct Rows {
        const BF16* const* row;
        int64_t stride;  // elements; 0: not evenly spaced
        alignas(64) BF16 padded[16 * 32];

        explicit Rows(const BF16* const* rows) : row(rows), stride(rows[1] - rows[0]) {
            if (row[15] - row[0] != 15 * stride) stride = 0;
        }
        const BF16* at(int64_t k, int64_t k_size, int64_t* stride_bytes) {
            if (stride != 0 && k + 32 <= k_size) {
                *stride_bytes = stride * 2;
                return row[0] + k;
            }
            const int64_t count = k_size - k < 32 ? k_size - k : 32;
            std::memset(padded, 0, sizeof(padded));
            for (int i = 0; i < 16; ++i)
                std::memcpy(padded + 32 * i, row[i] + k, static_cast<size_t>(count) * 2);
            *stride_bytes = 64;
            return padded;
        }
    };

    template <class Block>
    static void run(const BF16* x, const BF16* const* w, int64_t k_size, int64_t prefetch,
                    float* c) {
        constexpr int MV = Block::kVectors;
        Rows first(w), second(w + 16);
        constexpr int64_t kStride = MV * 64;  // bytes from one pair of k to the next
        MOE_TILE_ZERO(0);
        MOE_TILE_ZERO(2);
        if constexpr (MV == 2) {
            MOE_TILE_ZERO(1);
            MOE_TILE_ZERO(3);
        }
        for (int64_t k = 0; k < k_size; k += 32) {
            int64_t stride_bytes;
            if (prefetch)
                for (int n = 0; n < kRows; ++n) __builtin_prefetch(w[n] + k + prefetch, 0, 2);
            const BF16* block = x + k * MV * 16;
            MOE_TILE_LOAD(6, block, kStride);
            const BF16* a = first.at(k, k_size, &stride_bytes);
            MOE_TILE_LOAD(4, a, stride_bytes);
            MOE_TILE_DOT(0, 4, 6);
            a = second.at(k, k_size, &stride_bytes);
            MOE_TILE_LOAD(5, a, stride_bytes);
            MOE_TILE_DOT(2, 5, 6);
            if constexpr (MV == 2) {
                MOE_TILE_LOAD(7, block + 32, kStride);
                MOE_TILE_DOT(1, 4, 7);
                MOE_TILE_DOT(3, 5, 7);
            }
        }
        MOE_TILE_STORE(0, c, kStride);
        MOE_TILE_STORE(2, c + 16 * MV * 16, kStride);
        if constexpr (MV == 2) {
            MOE_TILE_STORE(1, c + 16, kStride);
            MOE_TILE_STORE(3, c + 16 * MV * 16 + 16, kStride);
        }
    }

    // The same products of operands that stay in tile registers.
    static int64_t multiply(int64_t rounds) {
        alignas(64) BF16 operand[16 * 32];
        alignas(64) float sums[4 * 16 * 16];
        std::memset(operand, 0x3f, sizeof(operand));  // 0.7
        begin();
        MOE_TILE_ZERO(0);
        MOE_TILE_ZERO(1);
        MOE_TILE_ZERO(2);
        MOE_TILE_ZERO(3);
        MOE_TILE_LOAD(4, operand, 64);
        MOE_TILE_LOAD(5, operand, 64);
        MOE_TILE_LOAD(6, operand, 64);
        MOE_TILE_LOAD(7, operand, 64);
        for (int64_t round = 0; round < rounds; ++round) {
            MOE_TILE_DOT(0, 4, 6);
            MOE_TILE_DOT(2, 5, 6);
            MOE_TILE_DOT(1, 4, 7);
            MOE_TILE_DOT(3, 5, 7);
        }
        MOE_TILE_STORE(0, sums, 64);
        MOE_TILE_STORE(1, sums + 256, 64);
        MOE_TILE_STORE(2, sums + 512, 64);
        MOE_TILE_STORE(3, sums + 768, 64);
        asm volatile("" ::"r"(sums) : "memory");  // they are wanted
        end();
        return rounds * 4 * 16 * 16 * 32 * 2;
    }
};

}  // namespace
}  // namespace moe_offload
