// What one layer's routed FFN computes and where its weights lie. Plain data, shared by every
// implementation of the FFN; no torch, no ownership.
//
//     gate = x W_gate^T + b_gate      up = x W_up^T + b_up        x: one row of hidden, [H]
//     h    = act(gate, up)            rounded to the weights' dtype, [F]
//     y    = (h W_down^T + b_down) * topk_weight                  rounded likewise, [H]
//     out  = sum of a token's y in the order of the router's choices, summed in fp32
//
// Accumulation is fp32. Weights are read where they are: one row per output, any distance between
// rows, so a page of a checkpoint, a fused [E, 2F, H] tensor, gate and up rows that alternate
// (row_stride = 2 rows), and transposed matrices are all only other numbers here.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_offload {

enum class Dtype : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

inline size_t item_size(Dtype dtype) { return dtype == Dtype::kF32 ? 4 : 2; }

// With a gate: act(gate) * up. Without: act(up).
enum class Activation : int32_t {
    kSilu = 0,
    kGelu = 1,      // exact, with erf
    kGeluTanh = 2,  // the tanh approximation
    kRelu = 3,
    kRelu2 = 4,  // relu(x)^2
    // g = min(gate, limit); u = clamp(up, -limit, limit); (u + offset) * g * sigmoid(alpha * g).
    // gpt-oss has alpha 1.702, offset 1, limit 7; DeepSeek-V4 and GLM-5 alpha 1, offset 0.
    kClampedSwiglu = 5,
};

struct ActivationSpec {
    Activation kind = Activation::kSilu;
    bool gated = true;
    float alpha = 1.0f, limit = 0.0f, offset = 0.0f;  // kClampedSwiglu only
};

// How a matrix holds its numbers. Quantised ones mean bf16 (code times scale, rounded), and
// lie row after row without gaps; moe_offload/quantization.py has the layouts.
enum class WeightFormat : int32_t {
    kPlain = 0,  // in FfnShape::dtype
    kMxfp4 = 1,
    kFp8Block = 2,      // scales in fp32
    kFp8BlockBF16 = 3,  // scales in bf16
    kInt4Group = 4,     // scales in bf16, of WeightView::group columns each
    kInt4GroupF16 = 5,  // scales in fp16: the product is rounded to fp16, then to bf16
};

// Element k of row n of the matrix in slot s is at base + s * slot_stride + n * row_stride +
// k * k_stride (bytes). Either k_stride is an element, or the matrix is stored transposed: rows are
// one element apart, or two where gate and up alternate (gate begins with the base, up one element
// behind). A bias is a matrix of one-element rows. base == nullptr: there is none. Bases need the
// alignment of an element (scales in fp32: four bytes) and no more.
struct WeightView {
    const std::byte* base = nullptr;
    int64_t slot_stride = 0;
    int64_t row_stride = 0;
    int64_t k_stride = 0;               // of no meaning for a bias and for quantised matrices
    const std::byte* scales = nullptr;  // of a quantised matrix, of its row 0
    int64_t scales_stride = 0;          // from slot to slot
    int64_t group = 0;                  // of int4_group, a multiple of 32 that divides K
    const uint32_t* shifts = nullptr;   // [S] bytes that slot s lies further on, or null: none does

    int64_t shift(int64_t s) const { return shifts ? shifts[s] : 0; }
    const std::byte* slot(int64_t s) const {
        return base ? base + s * slot_stride + shift(s) : nullptr;
    }
    const std::byte* slot_scales(int64_t s) const {
        return scales ? scales + s * scales_stride + shift(s) : nullptr;
    }
};

struct FfnWeights {
    WeightView gate, up;                         // [S, F, H]; gate only when gated
    WeightView down;                             // [S, H, F]
    WeightView gate_bias, up_bias;               // [S, F] or null
    WeightView down_bias;                        // [S, H] or null
    WeightFormat format = WeightFormat::kPlain;  // of gate, up and down; biases are plain
};

struct FfnShape {
    int64_t hidden = 0;         // H
    int64_t inner = 0;          // F
    int64_t num_experts = 0;    // E
    Dtype dtype = Dtype::kF32;  // of weights, biases, hidden and out
    ActivationSpec activation;
};

// One call's inputs, all contiguous.
struct FfnInputs {
    const void* hidden = nullptr;        // [T, H], shape.dtype
    const void* topk_ids = nullptr;      // [T, A], int64 or int32
    const void* topk_weights = nullptr;  // [T, A], weights_dtype
    bool ids_are_int64 = true;
    Dtype weights_dtype = Dtype::kF32;
    int64_t num_tokens = 0;  // T
    int64_t top_k = 0;       // A
};

}  // namespace moe_offload
