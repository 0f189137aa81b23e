// Many rows per expert: bound by arithmetic.
//
// A tile is some rows of weights times one block of MV vectors of packed rows (row_blocks.h). It is
// computed NR weight rows at a time: per k, MV loads of x and NR broadcasts of weight elements for
// NR * MV multiply-adds, so with NR = 8 and MV = 3 the multiply unit is the limit (24 of them per 3
// loads and 8 broadcasts, which the load ports do in 6 cycles); so it is with 4 and 3 (12 in 6
// cycles, loads in 4), what 16 registers hold. Broadcasting from row-major weights needs no
// transposed copy of them.
//
// Sums run over 256 k, and those of such pieces are added up: errors are those of short sums, and
// with fewer weight rows at a time than a tile has, a piece of x (24 rows: 24 KiB) stays in the L1
// for all of the tile. AVX2 forced on one Zen 4 core, OLMoE's shape, 1024 tokens: 1 x 8 over all of
// K had 72 of 117 GFLOP/s, this has 99 in fp32 and 97 in bf16.
//
// Results appear transposed, [n][rows]: the activation does not mind, h is wanted that way, and y
// is transposed back eight by eight.
//
// `Tile` computes one tile; AMX brings its own (amx_tile.h).
#pragma once

#include "expert_gemm/cpu/activations.h"
#include "expert_gemm/cpu/attend.h"
#include "expert_gemm/cpu/dequantise.h"
#include "expert_gemm/cpu/few_ffn.h"
#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/norm_rows.h"
#include "expert_gemm/cpu/ops.h"
#include "expert_gemm/cpu/route_rows.h"
#include "expert_gemm/cpu/row_blocks.h"
#include "expert_gemm/cpu/transpose.h"

namespace moe_offload {
namespace {

// MaxMV vectors of rows in a full block, NRows weight rows.
template <class Op_, int MaxMV, int NRows>
struct VectorTile {
    using Op = Op_;
    static constexpr int kMaxVectors = MaxMV;
    static constexpr int kRows = NRows;
    static constexpr int64_t kBlockRows = MaxMV * Op::L::kWidth;
    static constexpr int kBlockPad = Op::kBlockPad;
    static constexpr int64_t kSumK = 256;

    // Weight rows at a time: AVX2's 16 registers hold their sums, a broadcast and a block's vectors
    // of x; eight sums at least hide the latency of an addition.
    static constexpr int rows_at_a_time(int vectors) {
        constexpr int kNarrow[] = {8, 6, 4};
        return Op::L::kWidth == 8 ? kNarrow[vectors - 1] : 8;
    }

    static void begin() {}
    static void end() {}

    // What rows that are widened need: a piece of K of all of them lies together,
    // [K / kSumK][kRows][kSumK]. Whole rows would be a multiple of 4096 bytes apart and fall into
    // the same sets of the L1.
    static size_t scratch_bytes(int64_t max_k) {
        if constexpr (!Op::kConvert) return 0;
        return static_cast<size_t>((max_k + kSumK - 1) / kSumK * kRows * kSumK) * sizeof(float);
    }

    struct Rows {
        const typename Op::B* row[kRows];
        int64_t ahead;  // elements to what the first block fetches into the L2; 0: nothing
    };

    // Weight rows as run() wants them: in place, or widened into `scratch`; then the rows `ahead`
    // elements further on are fetched here.
    static Rows take(const typename Op::T* const* from, int64_t k_size, int64_t ahead, int64_t,
                     std::byte* scratch) {
        Rows rows;
        rows.ahead = Op::kConvert ? 0 : ahead;
        if constexpr (Op::kConvert) {
            using L = typename Op::L;
            constexpr int64_t kLine = 64 / sizeof(typename Op::T);
            for (int n = 0; n < kRows; ++n) {
                float* to = reinterpret_cast<float*>(scratch) + n * kSumK;
                rows.row[n] = to;
                for (int64_t begin = 0; begin < k_size; begin += kSumK, to += kRows * kSumK) {
                    const typename Op::T* w = from[n] + begin;
                    const int64_t count = k_size - begin < kSumK ? k_size - begin : kSumK;
                    int64_t k = 0;
                    for (; k + kLine <= count; k += kLine) {
                        __builtin_prefetch(w + k + ahead, 0, 2);
                        for (int64_t i = k; i < k + kLine; i += L::kWidth)
                            L::store(to + i, L::load(w + i));
                    }
                    for (; k < count; ++k) to[k] = widen(w[k]);
                }
            }
        } else {
            for (int n = 0; n < kRows; ++n) rows.row[n] = from[n];
        }
        return rows;
    }

    // c[n][Block::kStride] = sum_k w[n][k] x[k][:], of block `number` of x
    template <class Block>
    static void run(const typename Op::X* x, const Rows& w, int64_t k_size, int64_t number,
                    float* c) {
        constexpr int NR = rows_at_a_time(Block::kVectors);
        static_assert(kRows % NR == 0 && kSumK % Op::kPair == 0);
        const int64_t prefetch = number == 0 ? w.ahead : 0;
        for (int64_t k = 0; k < k_size; k += kSumK) {
            const int64_t count = k_size - k < kSumK ? k_size - k : kSumK;
            for (int n = 0; n < kRows; n += NR)
                add_piece<Block, NR>(x + k * Block::kWidth, w.row + n, Op::kConvert ? k * kRows : k,
                                     count, prefetch, k == 0, c + n * Block::kStride);
        }
    }

    // c[n][Block::kStride] += sum_k rows[n][offset + k] x[k][:], over a piece of K; `first`: = it
    template <class Block, int NR>
    static void add_piece(const typename Op::X* x, const typename Op::B* const* rows,
                          int64_t offset, int64_t k_size, int64_t prefetch, bool first, float* c) {
        using L = typename Op::L;
        constexpr int kLanes = L::kWidth, kPair = Op::kPair, MV = Block::kVectors;
        const typename Op::B* w[NR];
        for (int n = 0; n < NR; ++n) w[n] = rows[n] + offset;
        typename L::V acc[NR][MV];
        [[maybe_unused]] typename HalfSum<Op>::V half[NR] = {};
        for (int n = 0; n < NR; ++n)
            for (int v = 0; v < MV; ++v) acc[n][v] = L::set(0.0f);
        const int64_t steps = k_size / kPair;
        // One cache line of each weight row at a time: its successor in the next tile is fetched.
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(typename Op::B)) / kPair;
        int64_t s = 0;
        const auto step = [&](int64_t at, const auto& weight) {
            const typename Op::X* xk = x + at * Block::kWidth * kPair;
            typename Op::Vec xs[MV];
            for (int v = 0; v < MV; ++v) xs[v] = Op::load_packed(xk + v * kLanes * kPair);
#pragma GCC unroll 16
            for (int n = 0; n < NR; ++n) {
                const typename Op::Vec b = weight(n);
                for (int v = 0; v < MV; ++v) acc[n][v] = Op::step(acc[n][v], xs[v], b);
                if constexpr (Block::kHalf)
                    half[n] =
                        Op::step(half[n], Op::load_half(xk + MV * kLanes * kPair), Op::half(b));
            }
        };
        const auto whole_step = [&](int64_t at) {
            step(at, [&](int n) { return Op::broadcast(w[n] + at * kPair); });
        };
        for (; s + kLine <= steps; s += kLine) {
            if (prefetch)
                for (int n = 0; n < NR; ++n) __builtin_prefetch(w[n] + s * kPair + prefetch, 0, 2);
            for (int64_t i = 0; i < kLine; ++i) whole_step(s + i);
        }
        for (; s < steps; ++s) whole_step(s);
        if (steps * kPair < k_size)
            step(steps, [&](int n) { return Op::broadcast_last(w[n] + steps * kPair); });
        const auto add = [&](float* to, typename L::V sum) {
            L::store(to, first ? sum : L::load(to) + sum);
        };
        for (int n = 0; n < NR; ++n) {
            float* row = c + n * Block::kStride;
            for (int v = 0; v < MV; ++v) add(row + v * kLanes, acc[n][v]);
            if constexpr (Block::kHalf) add(row + MV * kLanes, Op::whole(half[n]));
        }
    }

    // The same steps on operands that stay in registers.
    static int64_t multiply(int64_t rounds) {
        using L = typename Op::L;
        constexpr int kSums = rows_at_a_time(kMaxVectors) * kMaxVectors;
        alignas(64) typename Op::X x[L::kWidth * Op::kPair];
        alignas(64) typename Op::B w[Op::kPair];
        std::memset(x, 0x3f, sizeof(x));  // 0.7 in bf16 and fp32
        std::memset(w, 0x3f, sizeof(w));
        asm volatile("" ::"r"(x), "r"(w) : "memory");  // the compiler must not know what they are
        const typename Op::Vec xs = Op::load_packed(x), b = Op::broadcast(w);
        typename L::V acc[kSums];
        for (int i = 0; i < kSums; ++i) acc[i] = L::set(0.0f);
        for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 32
            for (int i = 0; i < kSums; ++i) acc[i] = Op::step(acc[i], xs, b);
        alignas(64) float sums[kSums * L::kWidth];
        for (int i = 0; i < kSums; ++i) L::store(sums + i * L::kWidth, acc[i]);
        asm volatile("" ::"r"(sums) : "memory");  // and must not leave them out
        return rounds * kSums * L::kWidth * Op::kPair * 2;
    }
};

template <class Op>
inline typename Op::L::V bias_at(const std::byte* bias, int64_t stride, int64_t n) {
    if (!bias) return Op::L::set(0.0f);
    return Op::L::set(widen(*reinterpret_cast<const typename Op::T*>(bias + n * stride)));
}

template <class Tile>
void gate_up_many(const GateUpArgs& a) {
    using Op = typename Tile::Op;
    using L = typename Op::L;
    using T = typename Op::T;
    constexpr int64_t kLanes = L::kWidth, kItem = sizeof(T);
    const bool gated = a.gate.base != nullptr;
    const int64_t features = gated ? Tile::kRows / 2 : Tile::kRows;  // f per tile
    const int64_t x_k = padded_k<Tile>(a.hidden), h_k = padded_k<Tile>(a.inner);
    const int64_t ahead = rows_ahead(kPrefetchBytes, a.row_stride, features);
    alignas(64) float c[Tile::kRows * Tile::kMaxVectors * kLanes];
    Tile::begin();
    for (int64_t f = a.begin; f < a.end; f += features) {
        const T* from[Tile::kRows];
        const auto row = [&](const std::byte* matrix, int64_t n) {
            return reinterpret_cast<const T*>(matrix +
                                              (n < a.inner ? n : a.inner - 1) * a.row_stride);
        };
        for (int64_t i = 0; i < features; ++i) {
            if (gated) {
                from[i] = row(a.gate.base, f + i);
                from[features + i] = row(a.up.base, f + i);
            } else {
                from[i] = row(a.up.base, f + i);
            }
        }
        // The last tile writes the padding of K too: zero weights meet it, and 0 * NaN is not 0.
        const int64_t covered = f + features < a.inner ? features : h_k - f;
        const int64_t prefetch = f + ahead < a.end ? ahead * a.row_stride / kItem : 0;
        const auto w = Tile::take(from, a.hidden, prefetch, a.rows, a.scratch);
        for_blocks<Tile>(a.rows, [&](int64_t first, int64_t, auto block) {
            using B = decltype(block);
            const auto* x = static_cast<const typename Op::X*>(a.x) + first * x_k;
            auto* h = static_cast<typename Op::X*>(a.h) + first * h_k;
            Tile::template run<B>(x, w, a.hidden, first / Tile::kBlockRows, c);
            for (int64_t i = 0; i < covered; i += 2) {
                typename L::V pair[2];
                for (int v = 0; v < B::kVectors + B::kHalf; ++v) {
                    for (int j = 0; j < 2; ++j) {
                        const int64_t n = i + j;
                        if (f + n >= a.inner) {  // padding of K in the second product
                            pair[j] = L::set(0.0f);
                            continue;
                        }
                        const auto up_n = gated ? features + n : n;
                        const auto up = L::load(c + up_n * B::kStride + v * kLanes) +
                                        bias_at<Op>(a.up_bias, a.bias_stride, f + n);
                        const auto gate = gated ? L::load(c + n * B::kStride + v * kLanes) +
                                                      bias_at<Op>(a.gate_bias, a.bias_stride, f + n)
                                                : up;
                        pair[j] = activate<L>(a.activation, gate, up);
                    }
                    // [K / pair][width][pair]
                    auto* to = h + (f + i) * B::kWidth + v * kLanes * Op::kPair;
                    if constexpr (B::kHalf) {
                        if (v == B::kVectors) {
                            Op::store_half_pair(to, pair[0], pair[1]);
                            continue;
                        }
                    }
                    if (Op::kPair == 2 || f + i + 1 < h_k)
                        Op::store_pair(to, B::kWidth, pair[0], pair[1]);
                    else
                        Op::store_h(to, pair[0]);
                }
            }
        });
    }
    Tile::end();
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
// y of 32 columns, a cache line of bf16, for one block, from c[32][ldc]: its rows are kilobytes
// apart, in one set of the L1, so each line is written in one go.
template <class T>
inline void store_32_columns(const float* c, int64_t ldc, int64_t rows, const float* bias,
                             const float* weights, const int64_t* row_ids, int64_t hidden,
                             int64_t n, std::byte* y) {
    const __m512 b[2] = {_mm512_loadu_ps(bias), _mm512_loadu_ps(bias + 16)};
    for (int64_t m = 0; m < rows; m += 16) {  // c has room for whole vectors of rows
        __m512 row[2][16];
        for (int half = 0; half < 2; ++half)
            transpose16([&](int i) { return _mm512_loadu_si512(c + (16 * half + i) * ldc + m); },
                        [&](int i, __m512i v) { row[half][i] = _mm512_castsi512_ps(v); });
        for (int64_t i = 0; i < 16 && m + i < rows; ++i) {
            T* const to = reinterpret_cast<T*>(y) + row_ids[m + i] * hidden + n;
            const __m512 weight = _mm512_set1_ps(weights[m + i]);
            for (int half = 0; half < 2; ++half)
                Avx512Lanes::store(to + 16 * half, (row[half][i] + b[half]) * weight);
        }
    }
}
#endif

// y of eight columns n .. n + 8 for one block, from c[8][ldc].
template <class Op>
inline void store_columns(const float* c, int64_t ldc, int64_t rows, int64_t count,
                          const float* bias, const float* weights, const int64_t* row_ids,
                          int64_t hidden, int64_t n, std::byte* y) {
    using T = typename Op::T;
    const auto at = [&](int64_t m) { return reinterpret_cast<T*>(y) + row_ids[m] * hidden + n; };
    int64_t m = 0;
#if defined(__AVX2__)
    if (count == 8) {
        const __m256 b = _mm256_loadu_ps(bias);
        for (; m < rows; m += 8) {
            __m256 row[8];
            transpose8(c + m, ldc, row);  // c has room for whole vectors of rows
            for (int64_t i = 0; i < 8 && m + i < rows; ++i)
                Avx2Lanes::store(at(m + i), (row[i] + b) * _mm256_set1_ps(weights[m + i]));
        }
        return;
    }
#endif
    for (; m < rows; ++m) {
        float values[8];
        for (int64_t i = 0; i < 8; ++i) values[i] = (c[i * ldc + m] + bias[i]) * weights[m];
        T rounded[8];
        PortableLanes<8>::store(rounded, PortableLanes<8>::load(values));
        std::memcpy(at(m), rounded, static_cast<size_t>(count) * sizeof(T));
    }
}

template <class Tile>
void down_many(const DownArgs& a) {
    using Op = typename Tile::Op;
    using T = typename Op::T;
    constexpr int64_t kLanes = Op::L::kWidth, kItem = sizeof(T);
    const int64_t h_k = padded_k<Tile>(a.inner);
    const int64_t ahead = rows_ahead(kPrefetchBytes, a.row_stride, Tile::kRows);
    alignas(64) float c[Tile::kRows * Tile::kMaxVectors * kLanes];
    Tile::begin();
    for (int64_t n = a.begin; n < a.end; n += Tile::kRows) {
        const T* from[Tile::kRows];
        float bias[Tile::kRows];
        for (int64_t i = 0; i < Tile::kRows; ++i) {
            const int64_t row = n + i < a.hidden ? n + i : a.hidden - 1;
            from[i] = reinterpret_cast<const T*>(a.down.base + row * a.row_stride);
            bias[i] =
                a.bias ? widen(*reinterpret_cast<const T*>(a.bias + row * a.bias_stride)) : 0.0f;
        }
        const int64_t prefetch = n + ahead < a.end ? ahead * a.row_stride / kItem : 0;
        const auto w = Tile::take(from, a.inner, prefetch, a.rows, a.scratch);
        for_blocks<Tile>(a.rows, [&](int64_t first, int64_t rows, auto block) {
            using B = decltype(block);
            const auto* h = static_cast<const typename Op::X*>(a.h) + first * h_k;
            Tile::template run<B>(h, w, a.inner, first / Tile::kBlockRows, c);
#if defined(__AVX512F__) && defined(__AVX512BW__)
            if constexpr (Tile::kRows == 32) {
                if (n + 32 <= a.end) {
                    store_32_columns<T>(c, B::kStride, rows, bias, a.row_weights + first,
                                        a.row_ids + first, a.hidden, n, a.y);
                    return;
                }
            }
#endif
            for (int64_t i = 0; i < Tile::kRows && n + i < a.end; i += 8) {
                const int64_t left = a.end - n - i;
                store_columns<Op>(c + i * B::kStride, B::kStride, rows, left < 8 ? left : 8,
                                  bias + i, a.row_weights + first, a.row_ids + first, a.hidden,
                                  n + i, a.y);
            }
        });
    }
    Tile::end();
}

template <class Op>
void combine_rows(const std::byte* y, int64_t stride, const bool* use, int64_t top_k, int64_t n,
                  void* out) {
    using L = typename Op::L;
    using T = typename Op::T;
    const T* rows = reinterpret_cast<const T*>(y);
    T* to = static_cast<T*>(out);
    int64_t i = 0;
    for (; i + L::kWidth <= n; i += L::kWidth) {
        typename L::V sum = L::set(0.0f);
        for (int64_t a = 0; a < top_k; ++a)
            if (use[a]) sum = sum + L::load(rows + a * stride + i);
        L::store(to + i, sum);
    }
    if (i < n) {
        T tail[L::kWidth] = {};
        typename L::V sum = L::set(0.0f);
        for (int64_t a = 0; a < top_k; ++a) {
            if (!use[a]) continue;
            std::memcpy(tail, rows + a * stride + i, static_cast<size_t>(n - i) * sizeof(T));
            sum = sum + L::load(tail);
        }
        L::store(tail, sum);
        std::memcpy(to + i, tail, static_cast<size_t>(n - i) * sizeof(T));
    }
}

// The table for one tile type; FewOp computes few rows (AMX borrows another instruction set's).
template <class Tile, class FewOp = typename Tile::Op>
Kernels make_kernels(const char* isa) {
    using Op = typename Tile::Op;
    Kernels k{};
    k.isa = isa;
    if constexpr (requires { Tile::kFewRows; })
        k.few_rows = Tile::kFewRows;
    else
        k.few_rows = kMostFewRows<FewOp>;
    k.lanes = Op::L::kWidth;
    k.block_rows = Tile::kBlockRows;
    k.few_item = sizeof(typename FewOp::X);
    k.block_item = sizeof(typename Op::X);
    k.few_stride = &few_stride<FewOp>;
    k.block_k = &padded_k<Tile>;
    k.row_step = Tile::kRows;
    k.scratch_bytes = &Tile::scratch_bytes;
    k.few_columns_rows = FewColumns<FewOp>::kWorthRows;
    k.few_columns_bytes = &few_columns_bytes<FewOp>;
    k.pack_few = &pack_few<FewOp>;
    k.pack_block = &pack_block<Tile>;
    k.gate_up_few = &gate_up_few<FewOp>;
    k.gate_up_many = &gate_up_many<Tile>;
    k.down_few = &down_few<FewOp>;
    k.down_many = &down_many<Tile>;
    k.transpose = &transpose_panel<typename Op::T>;
    if constexpr (__is_same(typename Op::T, BF16)) k.dequantise = &dequantise<typename Op::L>;
    k.combine = &combine_rows<Op>;
    k.norm = &norm_rows<Op>;
    k.logits = &logits_few<FewOp>;
    k.round_values = &round_values<Op>;
    k.softmax = &softmax_values<typename Op::L>;
    k.sigmoid = &sigmoid_values<typename Op::L>;
    k.attend = &attend<FewOp>;
    k.attend_scratch_bytes = &attend_scratch_bytes<FewOp>;
    k.merge_chunks = &merge_chunks<FewOp>;
    k.multiply = &Tile::multiply;
    return k;
}

}  // namespace
}  // namespace moe_offload
