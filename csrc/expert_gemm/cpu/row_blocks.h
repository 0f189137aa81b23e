// How many rows lie in memory for the kernels: x and h packed in blocks, so that one vector holds
// one k (of bf16 a pair of k) of 16 rows. A block has the vectors of a tile, the last one fewer: as
// many whole vectors as its rows need or, with VDPBF16PS, half a vector beyond whole ones, which
// costs half as much: 4.8 rows of padding on average instead of 7.5.
#pragma once

#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

// Whole vectors of rows, and half of one.
template <class Op, int Vectors, bool Half = false>
struct Block {
    static constexpr int kVectors = Vectors;
    static constexpr bool kHalf = Half;
    static constexpr int kWidth = Vectors * Op::L::kWidth + (Half ? Op::L::kWidth / 2 : 0);
    static constexpr int kStride = (Vectors + Half) * Op::L::kWidth;  // of sums
};

// Rows of a block, padded to whole vectors, or to half a vector beyond whole ones.
template <class Op>
inline int64_t block_width(int64_t rows) {
    constexpr int64_t kLanes = Op::L::kWidth;
    const int64_t rest = rows % kLanes;
    const bool half = has_half<Op> && rows > kLanes && rest > 0 && rest <= kLanes / 2;
    return rest == 0 ? rows : rows - rest + (half ? kLanes / 2 : kLanes);
}

// Call f(block's first row, number of its rows, its Block).
template <class Tile, class F>
inline void for_blocks(int64_t rows, const F& f) {
    using Op = typename Tile::Op;
    constexpr int64_t kLanes = Op::L::kWidth;
    constexpr int64_t kBlock = kLanes * Tile::kMaxVectors;
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t count = rows - first < kBlock ? rows - first : kBlock;
        const int64_t width = block_width<Op>(count), vectors = width / kLanes;
        if constexpr (has_half<Op> && Tile::kMaxVectors >= 3) {
            if (width % kLanes != 0) {
                if (vectors == 2)
                    f(first, count, Block<Op, 2, true>{});
                else
                    f(first, count, Block<Op, 1, true>{});
                continue;
            }
        }
        if constexpr (Tile::kMaxVectors >= 3) {
            if (vectors == 3) {
                f(first, count, Block<Op, 3>{});
                continue;
            }
        }
        if constexpr (Tile::kMaxVectors >= 2) {
            if (vectors == 2) {
                f(first, count, Block<Op, 2>{});
                continue;
            }
        }
        f(first, count, Block<Op, 1>{});
    }
}

template <class Tile>
inline int64_t padded_k(int64_t k) {
    return (k + Tile::kBlockPad - 1) / Tile::kBlockPad * Tile::kBlockPad;
}

// One block: [K / pair][width][pair], rows and k beyond the end are zero.
template <class Tile>
void pack_block(const void* hidden, const int64_t* tokens, int64_t rows, int64_t k_size,
                void* out) {
    using Op = typename Tile::Op;
    using T = typename Op::T;
    using X = typename Op::X;
    constexpr int64_t kLanes = Op::L::kWidth, kPair = Op::kPair;
    const int64_t width = block_width<Op>(rows), k_pad = padded_k<Tile>(k_size);
    const auto row = [&](int64_t m) { return static_cast<const T*>(hidden) + tokens[m] * k_size; };
    X* x = static_cast<X*>(out);
    int64_t k0 = 0;
    if constexpr (kLanes == 16 && has_transpose<Op>) {  // 16 rows of 16 words at a time
        constexpr int64_t kWords = 16 * kPair;
        for (; k0 + kWords <= k_size; k0 += kWords)
            for (int64_t m = 0; m < width; m += 16) {
                const T* from[16];
                for (int64_t i = 0; i < 16; ++i) from[i] = m + i < rows ? row(m + i) + k0 : nullptr;
                X* to = x + (k0 / kPair * width + m) * kPair;
                if constexpr (has_half<Op>) {
                    if (m + 16 > width) {
                        Op::transpose_half(from, to, width * kPair);
                        continue;
                    }
                }
                Op::transpose(from, to, width * kPair);
            }
    }
    constexpr int64_t kPanel = 64;  // of k: all rows' cache lines are read once, in order
    for (; k0 < k_pad; k0 += kPanel) {
        const int64_t k1 = k0 + kPanel < k_pad ? k0 + kPanel : k_pad;
        for (int64_t m = 0; m < width; ++m)
            for (int64_t k = k0; k < k1; ++k)
                x[(k / kPair * width + m) * kPair + k % kPair] =
                    m < rows && k < k_size ? Op::to_x(row(m)[k]) : X{};
    }
}

}  // namespace
}  // namespace moe_offload
