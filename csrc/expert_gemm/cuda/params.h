// What an expert launch is told. Plain numbers and addresses: the same struct goes from Python
// through the launcher into the kernel, and into the emulation in tests.
//
// Words: T tokens, A experts per token, R = T x A routes (route = token * A + rank), rows are
// routes sorted by expert, H hidden size, F expert inner size, G groups.
#pragma once

#include <cstdint>

#include "expert_gemm/tile_scheduler.h"

namespace moe_offload::cuda {

enum class DType : int32_t { bf16 = 0, f16 = 1 };

// clamped_swiglu is gpt-oss': gate clamped from above, up from both sides, at `limit`;
// gate * sigmoid(alpha * gate) * (up + offset), offset 1.
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, clamped_swiglu };

// What the numbers of gate_up and down are; weight_formats.h has the layouts. Biases are of dtype.
enum class WeightFormat : int32_t { plain, fp8_block, mxfp4, int4_group };

TILE_FUNCTION int bits_of(WeightFormat format) {
    return format == WeightFormat::plain ? 16 : format == WeightFormat::fp8_block ? 8 : 4;
}

// Where weights are. A page holds gate_up [2F, H] (ungated: up [F, H]) and down [H, F] row by row,
// and their scales if quantised; sections at byte offsets that are multiples of 16.
struct Pages {
    const unsigned char* slab;   // slot 0; may be null when page_table is given
    int64_t slot_stride;         // bytes from slot to slot
    const uint64_t* page_table;  // [pages] an address per page id (device memory, or pinned host
                                 // memory the device can read); null: slab + page * slot_stride
    const int32_t* slot_of;      // [E] expert to page id, -1 absent; null: Group::page is the id
    int64_t up_offset;           // bytes from a page's start
    int64_t down_offset;
    int64_t up_bias_offset;  // -1: no biases
    int64_t down_bias_offset;
    int64_t up_scale_offset;  // unused when plain
    int64_t down_scale_offset;
    WeightFormat format;
    int32_t log2_group;  // int4_group: columns that share a scale, a power of two from 32
    bool transposed;     // plain only: gate_up is [H, 2F] and down [F, H]

    // -1 when absent.
    TILE_FUNCTION int32_t page_of(const Group& group) const {
        if (group.page < 0 || slot_of == nullptr) return group.page;
        return slot_of[group.page];
    }
    TILE_FUNCTION const unsigned char* address(int32_t page) const {
        if (page_table) return reinterpret_cast<const unsigned char*>(page_table[page]);
        return slab + int64_t(page) * slot_stride;  // 64 bits: slots are megabytes, ids thousands
    }
};

struct ExpertParams {
    const void* x;                  // [T, H] of dtype
    const int32_t* route_of_row;    // [R] sorted row -> route
    const int32_t* row_of_route;    // [R] route -> sorted row, -1: the route has no expert here
    const float* topk_weights;      // [R] by route
    const Group* groups;            // [max_groups]; or null, and instead, as the Triton permutation
                                    // writes them:
    const int32_t* active_experts;  // [max_groups] experts with rows
    const int32_t* expert_offsets;  // [E + 1] first row of each expert
    const int32_t* num_groups;      // device counter; null: max_groups
    const int32_t* total_groups;    // device counter, groups of all launches of this layer; null:
                                    // the groups of this launch
    void* inner;                    // [R, F] of dtype, by sorted row; scratch
    void* partial;     // [R, H] by sorted row; scratch: float in decode, dtype in prefill
    int32_t* tickets;  // [ceil(H / 32)], zero; left at zero. Decode only
    void* out;         // [T, H] of dtype
    Pages pages;
    int32_t num_tokens;  // T
    int32_t top_k;       // A
    int32_t hidden;      // H, a multiple of 8
    int32_t inner_size;  // F, a multiple of 8
    int32_t max_groups;  // bounds the grid
    DType dtype;
    Activation activation;
    bool gated;                  // gate_up pages; false: up pages
    bool interleaved;            // gate and up rows alternate
    float alpha, limit, offset;  // clamped_swiglu

    TILE_FUNCTION Group group(int index) const {
        if (groups) return groups[index];
        const int32_t expert = active_experts[index];
        return {expert_offsets[expert], expert_offsets[expert + 1], expert};
    }
    TILE_FUNCTION int group_count() const { return num_groups ? *num_groups : max_groups; }
    TILE_FUNCTION int total_count() const { return total_groups ? *total_groups : group_count(); }
    TILE_FUNCTION int up_rows() const { return gated ? 2 * inner_size : inner_size; }
};

}  // namespace moe_offload::cuda
