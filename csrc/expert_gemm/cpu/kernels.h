// The seam between the order of work (ffn_run.cpp) and the instruction sets: a few functions per
// (instruction set, dtype), picked at run time.
//
// An expert with few rows is bound by the bytes of its weights, one with many by arithmetic; the
// two have different kernels and different layouts of x and h:
//
//   few rows (<= few_rows):  x and h row-major, few_stride(K) apart, zeros behind K (PairOp's in
//       steps of even and odd elements, ops.h). Weights and x are both contiguous along K, so lanes
//       run along K and are summed at the end.
//   many rows:  x and h transposed and packed in blocks of block_rows rows, so that one vector
//       holds one k of `lanes` rows; weights are broadcast from where they are, element by element
//       (bf16: pair by pair, for dot-product instructions). Nothing of a weight is ever copied
//       (but by AMX, 32 rows at a time, amx_tile.h), and the epilogue of gate/up writes h directly
//       in the layout that down reads.
//       Block b of pairs of bf16:  [K / 2][width][2], K padded with zeros, width its rows padded to
//       whole vectors, or (AVX-512-BF16) to half a vector beyond whole ones.
//
// A result element is always summed over k in the same order, whatever tile, chunk or thread it
// falls to: bits depend on the instruction set, the dtype and few-or-many only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "expert_gemm/params.h"

namespace moe_offload {

// Rows beyond these are taken in parts, and weights are read once for each, so that x and
// h of a part come from the caches for every tile of weights. Mixtral's shape with 2048 rows, Zen
// 4, one core: 204 to 213 GFLOP/s in parts of 240 or 480 rows, 151 to 170 in one.
constexpr int64_t kPartRows = 480;

// A matrix of weights. Plain: row n is at base + n * row_stride. For few rows of x also quantised:
// row n is stored row first + n * row_step, and those lie without gaps; and plain but transposed:
// element k of row n is at base + k * k_stride and n * row_step elements, gate and up that
// alternate (row_step 2) both being read from gate.
struct WeightRows {
    const std::byte* base = nullptr;
    const std::byte* scales = nullptr;  // of stored row 0
    int64_t first = 0;
};

struct ProductArgs {  // of both products
    int64_t rows;
    int64_t hidden, inner;  // H, F
    WeightFormat format;    // of the matrices
    int64_t row_stride;     // plain: bytes from weight row to weight row
    int64_t row_step;       // quantised: stored rows from one to the next; transposed: columns
    int64_t k_stride;       // bytes, of transposed matrices; else 0
    int64_t group;          // of int4_group
    int64_t bias_stride;    // bytes
    int64_t begin, end;     // weight rows to multiply by
    // Many rows: Kernels::scratch_bytes(max(H, F)). Few: few_scratch_bytes, gate and up each, or
    // Kernels::few_columns_bytes of transposed matrices.
    std::byte* scratch;
};

// Of quantised weights: the magnitudes of a row of fp8 blocks, or some rows unpacked to bf16
// (few_quantised.h), not a multiple of 4096 bytes apart.
constexpr int64_t kUnpackedRows = 3;
inline int64_t unpacked_stride(int64_t k_size) { return (k_size + 127) / 128 * 128 + 32; }
inline size_t few_scratch_bytes(WeightFormat format, int64_t k_size) {
    if (format == WeightFormat::kPlain) return 0;
    return static_cast<size_t>(kUnpackedRows * unpacked_stride(k_size)) * 2;
}

struct GateUpArgs : ProductArgs {  // begin is a multiple of Kernels::row_step
    const void* x;                 // [rows, H] in the layout above
    WeightRows gate, up;           // rows of H elements; no gate: its base is null
    const std::byte* gate_bias;    // null or one element per row
    const std::byte* up_bias;
    ActivationSpec activation;
    void* h;  // [rows, F] out, in the layout above
};

struct DownArgs : ProductArgs {  // weight rows are columns of y
    const void* h;               // [rows, F] in the layout above
    WeightRows down;             // rows of F elements
    const std::byte* bias;       // null or [H]
    const float* row_weights;    // [rows] routing weights
    const int64_t* row_ids;      // [rows] row of y
    std::byte* y;                // [R, H] in the weights' dtype
};

struct DequantiseArgs {
    WeightFormat format;
    const std::byte* codes;   // of row 0
    const std::byte* scales;  // of row 0
    int64_t k_size;
    int64_t begin, end;  // rows to unpack
    int64_t prefetch;    // so many bytes of codes further on are fetched into L2; 0: none
    std::byte* to;       // rows of bf16
    int64_t to_stride;   // bytes
    int64_t group = 0;   // of int4_group: columns that share a scale
};

struct NormArgs {
    const void* x;       // [rows, size], contiguous
    const void* weight;  // [size]
    void* y;             // [rows, size]
    int64_t size;
    int64_t begin, end;         // rows
    float epsilon;              // added to the mean of squares
    float weight_offset;        // added to the weight in fp32
    bool rounds_before_weight;  // to the dtype, before the product with the weight
};

struct LogitsArgs {
    int64_t rows;             // at most Kernels::few_rows
    int64_t hidden;           // H
    const void* x;            // [rows, H] in the few-row layout
    const std::byte* weight;  // rows of H elements
    int64_t row_stride;       // bytes
    const std::byte* bias;    // null or one element per weight row
    int64_t begin, end;       // weight rows
    float* logits;            // [rows, logits_stride] out
    int64_t logits_stride;    // elements
};

// What is added to the scores of one sequence's positions, before the softmax.
struct AttendMask {
    enum Kind : int32_t { kBool = 0, kFloat = 1, kSame = 2 };  // false: masked; fp32; keys' dtype
    Kind kind = kBool;
    const std::byte* base = nullptr;  // of the first head and position; null: nothing is masked
    int64_t head_stride = 0;          // bytes from query head to query head; 0: one for all
    int64_t stride = 0;               // bytes from position to position
};

constexpr int64_t kAttendChunk = 256;  // positions at most; attention.cpp has the evidence

// A softmax over some positions: the largest score (-infinity: all are masked), and the sum of
// e^(score - max).
struct AttendSoftmax {
    float max, sum;
};

// A chunk of positions for the query heads that share its keys; see attend.h.
struct AttendArgs {
    int64_t heads;            // query heads
    int64_t size;             // of a head of q and keys
    int64_t value_size;       // of a head of values
    const void* q;            // [heads, size], contiguous
    int64_t positions;        // up to kAttendChunk
    const std::byte* keys;    // [positions] rows of `size` elements
    int64_t key_stride;       // bytes
    const std::byte* values;  // [positions] rows of `value_size` elements
    int64_t value_stride;     // bytes
    float scale;              // of scores
    AttendMask mask;          // of these positions
    std::byte* scratch;       // Kernels::attend_scratch_bytes
    float* out;               // [heads, out_stride]: sums of e^(score - max) times values
    int64_t out_stride;       // value_size rounded up to whole vectors
    AttendSoftmax* softmax;   // [heads] out
};

// The chunks of one query head; each array has an element or a row per chunk.
struct MergeArgs {
    int64_t chunks;
    int64_t value_size;
    const float* parts;      // AttendArgs::out
    int64_t part_stride;     // elements from chunk to chunk
    AttendSoftmax* softmax;  // overwritten
    int64_t softmax_stride;  // elements from chunk to chunk
    void* out;               // [value_size] in the kernels' dtype
};

struct Kernels {
    const char* isa;
    int64_t few_rows;    // up to so many rows the few-row kernels are faster
    int64_t block_rows;  // rows of a full block
    int64_t lanes;       // rows of a vector; a block has at most block_rows / lanes vectors
    int64_t few_item;    // bytes of an element of x and h, few rows
    int64_t block_item;  // the same, many rows
    int64_t (*few_stride)(int64_t k);  // elements from row to row of few-row x and h
    int64_t (*block_k)(int64_t k);     // K of packed x and h, padded
    int64_t row_step;                  // chunks of weight rows begin at multiples of it
    size_t (*scratch_bytes)(int64_t max_k);
    // Transposed weights are read where they are for up to so many rows of x, which takes scratch.
    int64_t few_columns_rows;
    size_t (*few_columns_bytes)(int64_t rows);

    // Gather rows `tokens[0 .. rows)` of hidden [T, K] into the few-row layout, or one block.
    void (*pack_few)(const void* hidden, const int64_t* tokens, int64_t rows, int64_t k, void* x);
    void (*pack_block)(const void* hidden, const int64_t* tokens, int64_t rows, int64_t k, void* x);
    void (*gate_up_few)(const GateUpArgs&);
    void (*gate_up_many)(const GateUpArgs&);
    void (*down_few)(const DownArgs&);
    void (*down_many)(const DownArgs&);
    // Columns of a transposed matrix to rows, see transpose.h.
    void (*transpose)(const std::byte* from, int64_t k_stride, int64_t columns, int64_t k_size,
                      int64_t prefetch, std::byte* to, int64_t to_stride);
    // Rows of a quantised matrix to bf16, see dequantise.h; null for other dtypes.
    void (*dequantise)(const DequantiseArgs&);
    // out[i] = sum over a of y[a * stride + i], in order, skipping a where use[a] is false.
    void (*combine)(const std::byte* y, int64_t stride, const bool* use, int64_t top_k, int64_t n,
                    void* out);
    // Rows over the root of their mean square, times a weight, see norm_rows.h.
    void (*norm)(const NormArgs&);
    // A router's parts, see route_rows.h. Values have room for whole vectors.
    void (*logits)(const LogitsArgs&);
    void (*round_values)(float* values, int64_t count, void* to);
    void (*softmax)(float* values, int64_t count);
    void (*sigmoid)(float* values, int64_t count);
    // A token's attention over one chunk of positions, and the chunks' results put together.
    void (*attend)(const AttendArgs&);
    size_t (*attend_scratch_bytes)(int64_t heads, int64_t size);
    void (*merge_chunks)(const MergeArgs&);
    // A tile's multiply-adds from registers, `rounds` times; how many operations (multiply_roof.h).
    int64_t (*multiply)(int64_t rounds);

    // Bytes of x (K = H) or h (K = F).
    int64_t packed_bytes(int64_t rows, bool few, int64_t k) const {
        return row_offset(few ? rows : (rows + lanes - 1) / lanes * lanes, few, k);
    }
    // Bytes before row `row` of them; for many rows the first of a block.
    int64_t row_offset(int64_t row, bool few, int64_t k) const {
        return row * (few ? few_stride(k) * few_item : block_k(k) * block_item);
    }
};

// Instruction sets, best last. The emulated one runs AMX's kernel on an emulation of its tile
// instructions, for tests; it is never chosen by itself.
enum class Isa : int32_t { kPlain, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };

// Null when this build or this machine has no such kernels.
const Kernels* kernels_for(Isa isa, Dtype dtype);

// The best for this machine.
const Kernels* best_kernels(Dtype dtype);

// By name: plain, avx2, avx512, avx512_bf16, amx, amx_emulated. "" and "auto" are what the
// environment variable MOE_OFFLOAD_CPU_ISA names, else the best. Throws std::invalid_argument.
const Kernels* kernels_named(const std::string& isa, Dtype dtype);

}  // namespace moe_offload
