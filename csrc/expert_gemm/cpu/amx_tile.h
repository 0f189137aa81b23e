// The many-rows tile on AMX: 32 weight rows times 32 rows of x as 2 x 2 tile registers.
//
// TDPBF16PS computes C[16][16] += A[16][32] B[32][16] with B as pairs, [16][16][2]. B is a packed
// block as it is (kernels.h). A is sixteen weight rows: for few blocks where they lie; for more,
// and where K is not whole tiles, all 32 rows are packed first, tile after tile: rows 4096 bytes
// apart fall into one set of the L1.
//
// A tile load takes 8 cycles from the L1 and a product 16, so 4 and 4 could take 64. What is needed
// for it, Emerald Rapids, two cores, [1536, 2048] x [2048, 512]: in place without prefetches
// 0.56 TFLOP/s, packed 0.65, with the operands of the next 32 k prefetched into the L1 1.05. The
// prefetches lie between the tile instructions, eight after each: in a stretch they gained half of
// that. Loads that lead to the L1 anyhow, product after product, were no faster (1.06), and with
// eight empty instructions after each 1.6: tile instructions back to back hold one another up.
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
    static void store_pair(X* h, [[maybe_unused]] int64_t next, typename L::V a, typename L::V b) {
#if defined(__AVX512BF16__)
        // The emulation's values but for denormals, which are zero in the next product anyhow.
        DotOp::store_pair(h, next, a, b);
#else
        BF16 lo[L::kWidth], hi[L::kWidth];
        L::store(lo, a);
        L::store(hi, b);
        for (int i = 0; i < L::kWidth; ++i) {
            h[2 * i] = lo[i];
            h[2 * i + 1] = hi[i];
        }
#endif
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
    static constexpr int64_t kBlockRows = 32;
    static constexpr int kBlockPad = 32;  // k per tile
    // One or two rows are streamed in VDPBF16PS's kernel and keep up with memory, four do not
    // (Emerald Rapids, two cores, [2048, 2048], GB/s: 17 with one or two rows, 11.5 with four, 17
    // with eight on tiles).
    static constexpr int64_t kFewRows = 2;
    // Blocks of x up to which weights are not packed: 256 and 512 tokens of Qwen3's shape took 52
    // and 60 ms with packing, 34 and 56 without, 1024 as long.
    static constexpr int64_t kInPlace = 4;

    static void begin() { MOE_TILE_BEGIN(); }
    static void end() { MOE_TILE_END(); }

    // What a packed tile of weights needs: [K / 32][32 rows][32].
    static size_t scratch_bytes(int64_t max_k) {
        return static_cast<size_t>((max_k + 31) / 32) * kRows * 32 * sizeof(BF16);
    }

    // Two A operands per 32 k, `step` elements from one 32 k to the next.
    struct Rows {
        const BF16* const* from;
        const BF16 *first, *second;
        int64_t stride, step;  // elements
        int64_t ahead;         // elements to what is fetched into the L2 meanwhile; 0: nothing
        int64_t blocks;        // each fetches its share of it
    };

    static Rows take(const BF16* const* from, int64_t k_size, int64_t ahead, int64_t num_rows,
                     std::byte* scratch) {
        const int64_t blocks = (num_rows + 31) / 32, stride = from[1] - from[0];
        bool even = k_size % 32 == 0;
        for (int n = 1; n < kRows; ++n) even = even && (n == 16 || from[n] - from[n - 1] == stride);
        if (even && blocks <= kInPlace) return {from, from[0], from[16], stride, 32, ahead, blocks};
        BF16* const packed = reinterpret_cast<BF16*>(scratch);
        for (int n = 0; n < kRows; ++n) {
            const BF16* const soon = from[n + 8 < kRows ? n + 8 : n];
            BF16* to = packed + 32 * n;
            int64_t k = 0;
            for (; k + 32 <= k_size; k += 32, to += 32 * kRows) {
                __builtin_prefetch(soon + k, 0, 2);
                std::memcpy(to, from[n] + k, 64);
            }
            if (k < k_size) {
                std::memset(to, 0, 64);
                std::memcpy(to, from[n] + k, static_cast<size_t>(k_size - k) * sizeof(BF16));
            }
        }
        return {from, packed, packed + 16 * 32, 32, 32 * kRows, ahead, blocks};
    }

    template <class Block>
    static void run(const BF16* x, const Rows& w, int64_t k_size, int64_t block_number, float* c) {
        constexpr int MV = Block::kVectors;
        constexpr int64_t kStride = MV * 64;  // bytes from one pair of k to the next
        const int64_t stride = w.stride * 2;
        // This block's share of the rows to fetch into the L2.
        const int64_t begin = w.ahead ? kRows * block_number / w.blocks : 0;
        const int64_t end = w.ahead ? kRows * (block_number + 1) / w.blocks : 0;
        MOE_TILE_ZERO(0);
        MOE_TILE_ZERO(2);
        if constexpr (MV == 2) {
            MOE_TILE_ZERO(1);
            MOE_TILE_ZERO(3);
        }
        const BF16 *first = w.first, *second = w.second;
        for (int64_t k = 0; k < k_size; k += 32) {
            const bool last = k + 32 >= k_size;
            const BF16 *next = last ? w.first : first + w.step,
                       *next2 = last ? w.second : second + w.step;
            const BF16* const next_x = x + MV * 16 * 32;
            const auto fetch = [](const BF16* from, int64_t apart) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; ++i) __builtin_prefetch(from + i * apart, 0, 3);
            };
            MOE_TILE_LOAD(6, x, kStride);
            fetch(next, w.stride);
            MOE_TILE_LOAD(4, first, stride);
            fetch(next + 8 * w.stride, w.stride);
            MOE_TILE_DOT(0, 4, 6);
            fetch(next2, w.stride);
            MOE_TILE_LOAD(5, second, stride);
            fetch(next2 + 8 * w.stride, w.stride);
            MOE_TILE_DOT(2, 5, 6);
            fetch(next_x, 32);
            if constexpr (MV == 2) {
                MOE_TILE_LOAD(7, x + 32, kStride);
                fetch(next_x + 8 * 32, 32);
                MOE_TILE_DOT(1, 4, 7);
                fetch(next_x + 16 * 32, 32);
                MOE_TILE_DOT(3, 5, 7);
            }
            fetch(next_x + (MV * 16 - 8) * 32, 32);
            for (int64_t n = begin; n < end; ++n) __builtin_prefetch(w.from[n] + k + w.ahead, 0, 2);
            first = next;
            second = next2;
            x = next_x;
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
