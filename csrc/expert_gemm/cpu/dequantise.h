// Quantised weights brought into rows of bf16 (unpack.h), for the products of many rows: a thread
// unpacks the rows it is about to use into scratch that stays in its L2 (panel.h) and runs there
// what multiplies rows of bf16. So a quantised page gives the bits of a dequantised one, and memory
// and disk move a half (fp8) or a quarter (mxfp4, int4) of its bytes.
#pragma once

#include "expert_gemm/cpu/kernels.h"
#include "expert_gemm/cpu/unpack_fp8.h"

namespace moe_offload {
namespace {

inline void prefetch_row(const uint8_t* from, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i += 64) __builtin_prefetch(from + i, 0, 2);
}

template <class L>
void dequantise_mxfp4(const DequantiseArgs& a) {
    const int64_t groups = a.k_size / kGroup, row_bytes = a.k_size / 2;
    for (int64_t n = a.begin; n < a.end; ++n) {
        const auto* codes = reinterpret_cast<const uint8_t*>(a.codes) + n * row_bytes;
        const auto* scales = reinterpret_cast<const uint8_t*>(a.scales) + n * groups;
        auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
        if (a.prefetch) prefetch_row(codes + a.prefetch, row_bytes);
        for (int64_t g = 0; g < groups; ++g)
            mxfp4_words<L>(codes + g * 16, scales[g]).store(to + g * kGroup);
    }
}

// Scale: type of a scale, BF16 or F16.
template <class L, class Scale>
void dequantise_int4(const DequantiseArgs& a) {
    using Unpack = Int4<L, Scale>;
    const int64_t groups = a.k_size / a.group, row_bytes = a.k_size / 2;
    for (int64_t n = a.begin; n < a.end; ++n) {
        const auto* codes = reinterpret_cast<const uint8_t*>(a.codes) + n * row_bytes;
        const auto* scales = reinterpret_cast<const Scale*>(a.scales) + n * groups;
        auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
        if (a.prefetch) prefetch_row(codes + a.prefetch, row_bytes);
        for (int64_t g = 0; g < groups; ++g) {
            const auto table = Unpack::table(widen(scales[g]));
            for (int64_t k = g * a.group; k < (g + 1) * a.group; k += kWords)
                Unpack::words(codes + k / 2, table).store(to + k);
        }
    }
}

// Scale: type of a scale, float or BF16.
template <class L, class Scale>
void dequantise_fp8(const DequantiseArgs& a) {
    using Unpack = Fp8<L>;
    constexpr int64_t kTables = 32;  // of so many blocks at a time, 8 KiB
    alignas(64) BF16 magnitudes[Unpack::kMagnitudes ? kTables * kBlock : 1];
    const int64_t blocks = (a.k_size + kBlock - 1) / kBlock;
    const auto* codes = reinterpret_cast<const uint8_t*>(a.codes);
    for (int64_t top = a.begin; top < a.end;) {  // rows that lie in the same blocks
        const int64_t next = (top / kBlock + 1) * kBlock, bottom = next < a.end ? next : a.end;
        const auto* scales = reinterpret_cast<const Scale*>(a.scales) + top / kBlock * blocks;
        for (int64_t b0 = 0; b0 < blocks; b0 += kTables) {
            const int64_t b1 = b0 + kTables < blocks ? b0 + kTables : blocks;
            const auto of = [&](int64_t b) {
                return magnitudes + (Unpack::kMagnitudes ? (b - b0) * kBlock : 0);
            };
            if constexpr (Unpack::kMagnitudes)
                for (int64_t b = b0; b < b1; ++b) fp8_magnitudes<L>(widen(scales[b]), of(b));
            for (int64_t n = top; n < bottom; ++n) {
                const uint8_t* row = codes + n * a.k_size;
                auto* to = reinterpret_cast<BF16*>(a.to + (n - a.begin) * a.to_stride);
                const int64_t end = b1 * kBlock < a.k_size ? b1 * kBlock : a.k_size;
                if (a.prefetch) prefetch_row(row + b0 * kBlock + a.prefetch, end - b0 * kBlock);
                for (int64_t b = b0; b < b1; ++b) {
                    const auto table = Unpack::table(of(b), widen(scales[b]));
                    const int64_t stop = (b + 1) * kBlock < end ? (b + 1) * kBlock : end;
                    int64_t k = b * kBlock;
                    for (; k + kWords <= stop; k += kWords)
                        Unpack::words(row + k, table).store(to + k);
                    if (k == stop) continue;
                    BF16 tail[kWords];
                    fp8_words_tail<L>(row + k, stop - k, table).store(tail);
                    std::memcpy(to + k, tail, static_cast<size_t>(stop - k) * sizeof(BF16));
                }
            }
        }
        top = bottom;
    }
}

template <class L>
void dequantise(const DequantiseArgs& a) {
    if (a.format == WeightFormat::kMxfp4) return dequantise_mxfp4<L>(a);
    if (a.format == WeightFormat::kInt4Group) return dequantise_int4<L, BF16>(a);
    if (a.format == WeightFormat::kInt4GroupF16) return dequantise_int4<L, F16>(a);
    if (a.format == WeightFormat::kFp8Block) return dequantise_fp8<L, float>(a);
    dequantise_fp8<L, BF16>(a);
}

}  // namespace
}  // namespace moe_offload
