// One token's attention over a chunk of positions, for the heads that share their keys.
//
// Bound by the bytes of keys and values where few heads share them, by arithmetic where many do: a
// block of positions is read once for all heads and widened to fp32 as it is used, and the next one
// is on its way meanwhile: a block's values are prefetched between its scores, the next block's
// keys between its values; in bursts instead, reading and computing would take turns. The softmax
// is online, block by block: maxima so far, and sums of e^(score - max), rescaled when a maximum
// grows.
//
// A score is summed over the head's size and a result over positions in one order, whatever the
// number of heads, so bits depend on the instruction set, the dtype and the chunk's limits alone.
#pragma once

#include "expert_gemm/cpu/activations.h"
#include "expert_gemm/cpu/few_rows.h"
#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/ops.h"

namespace moe_offload {
namespace {

constexpr int64_t kAttendBlock = 64;  // positions; 16 KiB of values of 128 bf16 stay in the L1
constexpr float kNegativeInfinity = -__builtin_inff();

// Elements from one head's scores to the next. Not a multiple of the L1's way.
constexpr int64_t kScoreStride = kAttendBlock + 16;

// Prefetches rows [from, to) of `nbytes` each into L2.
inline void prefetch_rows(const std::byte* rows, int64_t stride, int64_t nbytes, int64_t from,
                          int64_t to) {
    for (int64_t n = from; n < to; ++n)
        for (int64_t line = 0; line < nbytes; line += 64)
            __builtin_prefetch(rows + n * stride + line, 0, 2);
}

// scores[m][n] = q[m] . keys[n] for N keys and M heads. One head's are taken key by key, as they
// lie in memory; of several heads, each key is loaded once and each query once for N keys.
template <class Op, int M, int N>
inline void score_tile(const typename Op::X* q, int64_t q_stride, const std::byte* keys,
                       int64_t key_stride, int64_t size, float* scores) {
    using L = typename Op::L;
    using T = typename Op::T;
    constexpr int kBeside = M == 1 ? 1 : N;
    const int64_t whole = size / Op::kStep * Op::kStep;
    typename L::V all[M * N];
#pragma GCC unroll 16
    for (int first = 0; first < N; first += kBeside) {
        const T* key[kBeside];
        for (int n = 0; n < kBeside; ++n)
            key[n] = reinterpret_cast<const T*>(keys + (first + n) * key_stride);
        typename L::V sum[M * kBeside];
        for (int i = 0; i < M * kBeside; ++i) sum[i] = L::set(0.0f);
        const auto step = [&](const typename Op::Vec* k, int64_t at) {
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                const typename Op::Vec x = Op::load_x(q + m * q_stride + at);
#pragma GCC unroll 8
                for (int n = 0; n < kBeside; ++n)
                    sum[m * kBeside + n] = Op::step(sum[m * kBeside + n], x, k[n]);
            }
        };
        typename Op::Vec k[kBeside];
        for (int64_t at = 0; at < whole; at += Op::kStep) {
#pragma GCC unroll 8
            for (int n = 0; n < kBeside; ++n) k[n] = Op::load_w(key[n] + at);
            step(k, at);
        }
        if (whole < size) {
            for (int n = 0; n < kBeside; ++n) k[n] = Op::load_w_tail(key[n] + whole, size - whole);
            step(k, whole);
        }
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < kBeside; ++n) all[m * N + first + n] = sum[m * kBeside + n];
    }
    float sums[M * N + 16];
    L::template sums<M * N>(all, sums);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) scores[m * kScoreStride + n] = sums[m * N + n];
}

// Heads taken at once, and keys or vectors of values beside them: 16 sums where there are 32
// registers, 8 where there are 16.
template <class L>
constexpr int kTileSums = L::kWidth == 16 ? 16 : 8;
template <class L>
constexpr int64_t kTileHeads = kTileSums<L> / 2;
template <class L, int M>
constexpr int kTileBeside = kTileSums<L> / M >= 8   ? 8
                            : kTileSums<L> / M >= 4 ? 4
                                                    : 2;

// One pass over a block. `values`, where not null, are prefetched, a row for each key.
template <class Op, int M>
void score_block(const typename Op::X* q, int64_t q_stride, const std::byte* keys,
                 int64_t key_stride, int64_t size, int64_t count, const std::byte* values,
                 int64_t value_stride, int64_t value_bytes, float* scores) {
    constexpr int N = M == 1 ? kTileSums<typename Op::L> : kTileBeside<typename Op::L, M>;
    int64_t n = 0;
    for (; n + N <= count; n += N) {
        if (values) prefetch_rows(values, value_stride, value_bytes, n, n + N);
        score_tile<Op, M, N>(q, q_stride, keys + n * key_stride, key_stride, size, scores + n);
    }
    if (values) prefetch_rows(values, value_stride, value_bytes, n, count);
    for (; n < count; ++n)
        score_tile<Op, M, 1>(q, q_stride, keys + n * key_stride, key_stride, size, scores + n);
}

// A block's scores to weights e^(scale s + bias - max); returns what earlier results are multiplied
// by now that the maximum may have grown.
template <class L>
inline float weigh_scores(float* scores, const float* bias, float scale, int64_t count,
                          AttendSoftmax* state) {
    using V = typename L::V;
    using I = typename L::I;
    float lanes[L::kWidth];
    const int64_t padded = (count + L::kWidth - 1) / L::kWidth * L::kWidth;
    for (int64_t i = count; i < padded; ++i) scores[i] = kNegativeInfinity;
    V high = L::set(state->max);
    for (int64_t i = 0; i < padded; i += L::kWidth) {
        V s = L::load(scores + i) * L::set(scale);
        if (bias) s = s + L::load(bias + i);
        L::store(scores + i, s);
        high = L::select((I)(s > high), s, high);
    }
    L::store(lanes, high);
    float max = lanes[0];
    for (const float v : lanes) max = v > max ? v : max;
    const V origin = L::set(max == kNegativeInfinity ? 0.0f : max), least = L::set(-87.0f);
    const auto weights = [&](V s) {
        const V x = s - origin;
        return L::select((I)(x < least), L::set(0.0f), exp_lanes<L>(x));
    };
    V total = L::set(0.0f);
    for (int64_t i = 0; i < padded; i += L::kWidth) {
        const V p = weights(L::load(scores + i));
        L::store(scores + i, p);
        total = total + p;
    }
    L::store(lanes, weights(L::set(state->max)));
    const float earlier = state->max == max ? 1.0f : lanes[0];
    L::store(lanes, total);
    float sum = state->sum * earlier;
    for (const float v : lanes) sum += v;
    *state = {max, sum};
    return earlier;
}

// out[m] = earlier[m] * out[m] + sum of weights[m][n] * values[n], for M heads and N vectors, or,
// with N = 0, the last `tail` elements of rows that do not fill a vector. `next`, where not null,
// is prefetched, the same columns of as many rows.
template <class Op, int M, int N>
inline void value_tile(const float* weights, const std::byte* values, int64_t value_stride,
                       int64_t count, int64_t tail, const std::byte* next, int64_t next_stride,
                       const float* earlier, float* out, int64_t out_stride) {
    using L = typename Op::L;
    using V = typename L::V;
    using T = typename Op::T;
    constexpr int kVectors = N == 0 ? 1 : N;
    constexpr int64_t kBytes = kVectors * L::kWidth * static_cast<int64_t>(sizeof(T));
    V sum[M * kVectors];
    for (int m = 0; m < M; ++m)
        for (int i = 0; i < kVectors; ++i)
            sum[m * kVectors + i] =
                L::load(out + m * out_stride + i * L::kWidth) * L::set(earlier[m]);
    for (int64_t n = 0; n < count; ++n) {
        const T* value = reinterpret_cast<const T*>(values + n * value_stride);
        if (next)
            for (int64_t line = 0; line < kBytes; line += 64)
                __builtin_prefetch(next + n * next_stride + line, 0, 2);
        V v[kVectors];
        if constexpr (N == 0) {
            T buffer[L::kWidth] = {};
            std::memcpy(buffer, value, static_cast<size_t>(tail) * sizeof(T));
            v[0] = L::load(buffer);
        } else {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) v[i] = L::load(value + i * L::kWidth);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const V weight = L::set(weights[m * kScoreStride + n]);
#pragma GCC unroll 8
            for (int i = 0; i < kVectors; ++i)
                sum[m * kVectors + i] = L::fma(weight, v[i], sum[m * kVectors + i]);
        }
    }
    for (int m = 0; m < M; ++m)
        for (int i = 0; i < kVectors; ++i)
            L::store(out + m * out_stride + i * L::kWidth, sum[m * kVectors + i]);
}

template <int N>
struct Width {
    static constexpr int value = N;
};

// One pass over a block; `next` are the keys of the following one, `next_size` elements each.
template <class Op, int M>
void value_block(const float* weights, const std::byte* values, int64_t value_stride, int64_t size,
                 int64_t count, const std::byte* next, int64_t next_stride, int64_t next_size,
                 const float* earlier, float* out, int64_t out_stride) {
    using L = typename Op::L;
    constexpr int N = kTileBeside<L, M>;
    constexpr auto kItem = static_cast<int64_t>(sizeof(typename Op::T));
    const auto tile = [&](auto width, int64_t d) {
        value_tile<Op, M, decltype(width)::value>(
            weights, values + d * kItem, value_stride, count, size - d,
            next && d < next_size ? next + d * kItem : nullptr, next_stride, earlier, out + d,
            out_stride);
    };
    int64_t d = 0;
    for (; d + N * L::kWidth <= size; d += N * L::kWidth) tile(Width<N>{}, d);
    for (; d + L::kWidth <= size; d += L::kWidth) tile(Width<1>{}, d);
    if (d < size) tile(Width<0>{}, d);
}

// What a head's mask adds to the scores of `count` positions from `first` on; false when all of
// them are masked.
template <class T>
inline bool spread_mask(const AttendMask& mask, int64_t head, int64_t first, int64_t count,
                        float* bias) {
    const std::byte* at = mask.base + head * mask.head_stride + first * mask.stride;
    bool any = false;
    for (int64_t n = 0; n < count; ++n, at += mask.stride) {
        if (mask.kind == AttendMask::kBool)
            bias[n] = *at != std::byte{0} ? 0.0f : kNegativeInfinity;
        else if (mask.kind == AttendMask::kFloat)
            bias[n] = *reinterpret_cast<const float*>(at);
        else
            bias[n] = widen(*reinterpret_cast<const T*>(at));
        any |= bias[n] != kNegativeInfinity;
    }
    for (int64_t n = count; n < kScoreStride; ++n) bias[n] = 0.0f;
    return any;
}

// Scratch: packed q, scores of a block, running softmaxes, factors of earlier results.
template <class Op>
size_t attend_scratch_bytes(int64_t heads, int64_t size) {
    const int64_t q = (heads * few_stride<Op>(size) + 31) / 32 * 32;
    return static_cast<size_t>(q) * sizeof(typename Op::X) +
           static_cast<size_t>(heads) * (kScoreStride * sizeof(float) + sizeof(float));
}

template <class Op>
void attend(const AttendArgs& a) {
    using L = typename Op::L;
    using T = typename Op::T;
    using X = typename Op::X;
    // of 1 .. kTileHeads heads
    static constexpr decltype(&score_block<Op, 1>) kScore[] = {
        score_block<Op, 1>, score_block<Op, 2>, score_block<Op, 3>, score_block<Op, 4>,
        score_block<Op, 5>, score_block<Op, 6>, score_block<Op, 7>, score_block<Op, 8>};
    static constexpr decltype(&value_block<Op, 1>) kValue[] = {
        value_block<Op, 1>, value_block<Op, 2>, value_block<Op, 3>, value_block<Op, 4>,
        value_block<Op, 5>, value_block<Op, 6>, value_block<Op, 7>, value_block<Op, 8>};
    constexpr auto kItem = static_cast<int64_t>(sizeof(T));
    const int64_t q_stride = few_stride<Op>(a.size);
    X* q = reinterpret_cast<X*>(a.scratch);
    auto* scores = reinterpret_cast<float*>(q + (a.heads * q_stride + 31) / 32 * 32);
    float* earlier = scores + a.heads * kScoreStride;
    for (int64_t m = 0; m < a.heads; ++m) {
        pack_few<Op>(a.q, &m, 1, a.size, q + m * q_stride);
        for (int64_t d = 0; d < a.out_stride; ++d) a.out[m * a.out_stride + d] = 0.0f;
        a.softmax[m] = {kNegativeInfinity, 0.0f};
    }
    const int64_t passes = (a.heads + kTileHeads<L> - 1) / kTileHeads<L>;
    const int64_t beside = (a.heads + passes - 1) / passes;
    const auto pass = [&](const auto& body) {  // body(first head, heads)
        for (int64_t m = 0; m < a.heads; m += beside)
            body(m, a.heads - m < beside ? a.heads - m : beside);
    };
    const bool one_mask = a.mask.head_stride == 0 || a.heads == 1;
    float bias[kScoreStride];
    for (int64_t n = 0; n < a.positions; n += kAttendBlock) {
        const int64_t count = a.positions - n < kAttendBlock ? a.positions - n : kAttendBlock;
        if (a.mask.base && one_mask && !spread_mask<T>(a.mask, 0, n, count, bias)) continue;
        const std::byte* keys = a.keys + n * a.key_stride;
        const std::byte* values = a.values + n * a.value_stride;
        const std::byte* next =  // a whole block of keys, or none are prefetched
            n + count + kAttendBlock <= a.positions ? keys + count * a.key_stride : nullptr;
        pass([&](int64_t m, int64_t heads) {
            kScore[heads - 1](q + m * q_stride, q_stride, keys, a.key_stride, a.size, count,
                              m == 0 ? values : nullptr, a.value_stride, a.value_size * kItem,
                              scores + m * kScoreStride);
        });
        for (int64_t m = 0; m < a.heads; ++m) {
            if (a.mask.base && !one_mask) spread_mask<T>(a.mask, m, n, count, bias);
            earlier[m] = weigh_scores<L>(scores + m * kScoreStride, a.mask.base ? bias : nullptr,
                                         a.scale, count, a.softmax + m);
        }
        pass([&](int64_t m, int64_t heads) {
            kValue[heads - 1](scores + m * kScoreStride, values, a.value_stride, a.value_size,
                              count, m == 0 ? next : nullptr, a.key_stride, a.size, earlier + m,
                              a.out + m * a.out_stride, a.out_stride);
        });
    }
}

// One head's chunks, in order, to its result. A head that is masked everywhere has no weights, and
// zeros for a result, as in torch.
template <class Op>
void merge_chunks(const MergeArgs& a) {
    using L = typename Op::L;
    using T = typename Op::T;
    using V = typename L::V;
    float max = kNegativeInfinity, sum = 0.0f;
    for (int64_t c = 0; c < a.chunks; ++c) {
        const float m = a.softmax[c * a.softmax_stride].max;
        max = m > max ? m : max;
    }
    const bool none = max == kNegativeInfinity;
    for (int64_t c = 0; c < a.chunks; ++c) {
        AttendSoftmax& chunk = a.softmax[c * a.softmax_stride];
        float weight[L::kWidth] = {};
        if (!none && chunk.max - max >= -87.0f)
            L::store(weight, exp_lanes<L>(L::set(chunk.max - max)));
        chunk.max = weight[0];  // from now on the chunk's weight
        sum += weight[0] * chunk.sum;
    }
    T* out = static_cast<T*>(a.out);
    for (int64_t d = 0; d < a.value_size; d += L::kWidth) {
        V total = L::set(0.0f);
        for (int64_t c = 0; c < a.chunks; ++c)
            total = L::fma(L::set(a.softmax[c * a.softmax_stride].max),
                           L::load(a.parts + c * a.part_stride + d), total);
        if (!none) total = total / L::set(sum);
        if (d + L::kWidth <= a.value_size) {
            L::store(out + d, total);
        } else {
            T tail[L::kWidth];
            L::store(tail, total);
            std::memcpy(out + d, tail, static_cast<size_t>(a.value_size - d) * sizeof(T));
        }
    }
}

}  // namespace
}  // namespace moe_offload
