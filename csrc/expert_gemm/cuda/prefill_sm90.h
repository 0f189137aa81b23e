// Index logic of the Hopper prefill kernel (prefill_sm90.cu), which no CPU can run: what each copy
// reads, where it lands, what the tensor cores then see, and which feature an accumulator is.
// csrc/tests/test_prefill_sm90.cpp builds a tile's shared memory with these functions, multiplies
// it as wgmma would, and compares with plain loops.
//
// Per stage: kBlockM token rows of 64 k, gathered by cp.async of a producer warpgroup, and 256
// weight rows of 64 k, fetched by one bulk tensor copy. Both are rows of 128 bytes with the
// 128-byte swizzle, eight rows to a 1024-byte atom. Weights of all slots are one five-dimensional
// tensor of the slab, the slot its last coordinate, so one descriptor serves every expert of every
// layer:
//
//     gated:  (k, row of 8, gate or up, group of 8 features, slot)
//     else:   (k, row of 8, 1,          group of 8 rows,     slot)
//
// A box of (64, 8, 2, 16, 1) lands as eight gate rows, their eight up rows, the next eight gate
// rows, ...: the order gated_feature() expects, for concatenated pages and for interleaved ones
// (gpt-oss), which differ in two strides only.
#pragma once

#include <cstdint>

#include "expert_gemm/cuda/params.h"

namespace moe_offload::cuda {

constexpr int kHopperBlockN = 256;  // weight rows
constexpr int kHopperBlockK = 64;
constexpr int kHopperRowBytes = kHopperBlockK * 2;
constexpr int kHopperStages = 4;
constexpr int kHopperProducers = 128;  // threads: one warpgroup
constexpr int kHopperThreads = 3 * 128;
// Copies are announced to the consumers this many stages after they were issued: the producer
// waits for its own older copies, fences them for the tensor cores, and arrives.
constexpr int kHopperLag = 2;

TILE_FUNCTION constexpr int hopper_token_bytes(int block_m) { return block_m * kHopperRowBytes; }
constexpr int kHopperWeightBytes = kHopperBlockN * kHopperRowBytes;
TILE_FUNCTION constexpr int hopper_stage_bytes(int block_m) {
    return hopper_token_bytes(block_m) + kHopperWeightBytes;
}
// Stages, barriers, and room to start at a multiple of 1024.
TILE_FUNCTION constexpr int hopper_shared_bytes(int block_m) {
    return kHopperStages * hopper_stage_bytes(block_m) + 2 * kHopperStages * 8 + 1024;
}

TILE_FUNCTION int hopper_feature_tiles(const ExpertParams& p, bool down) {
    if (down) return ceil_div(p.hidden, kHopperBlockN);
    return ceil_div(p.inner_size, p.gated ? kHopperBlockN / 2 : kHopperBlockN);
}

// Producer thread t copies chunk t % 8 of rows t / 8 + 16 i.
TILE_FUNCTION int hopper_copy_chunk(int thread) { return thread % 8; }
TILE_FUNCTION int hopper_copy_row(int thread, int i) { return thread / 8 + 16 * i; }
TILE_FUNCTION constexpr int hopper_copies(int block_m) { return block_m / 16; }

// Use number `iteration` of the stages: which stage, and the parity its barriers complete with.
TILE_FUNCTION int hopper_stage(int64_t iteration) { return int(iteration % kHopperStages); }
TILE_FUNCTION uint32_t hopper_parity(int64_t iteration) {
    return uint32_t(iteration / kHopperStages & 1);
}

// The fourth coordinate of a feature tile's box; the others are k, 0, 0 and the slot.
TILE_FUNCTION int hopper_feature_group(int feature_tile, bool gated) {
    return feature_tile * (gated ? kHopperBlockN / 16 : kHopperBlockN / 8);
}

// The weights as a tensor, for cuTensorMapEncodeTiled. Strides in bytes, of dimensions 1 to 4.
struct WeightTensor {
    const unsigned char* base;
    uint64_t sizes[5];
    uint64_t strides[4];
    uint32_t box[5];
};

inline WeightTensor weight_tensor(const ExpertParams& p, bool down, int64_t num_slots) {
    const bool gated = !down && p.gated;
    const uint64_t row = uint64_t(down ? p.inner_size : p.hidden) * 2;
    const uint64_t features = uint64_t(down ? p.hidden : p.inner_size);
    const uint64_t between = gated && p.interleaved ? 2 : 1;  // rows from a gate row to the next
    const uint64_t to_up = !gated ? 8 : p.interleaved ? 1 : features;
    return {p.pages.slab + (down ? p.pages.down_offset : p.pages.up_offset),
            {row / 2, 8, gated ? 2u : 1u, features / 8, uint64_t(num_slots)},
            {between * row, to_up * row, 8 * between * row, uint64_t(p.pages.slot_stride)},
            {kHopperBlockK, 8, gated ? 2u : 1u, uint32_t(hopper_feature_group(1, gated)), 1}};
}

// A consumer warpgroup's part of the tile. With 128 token rows each of the two takes 64 of them and
// all weights; with 64 each takes all rows and half of the weights.
TILE_FUNCTION constexpr int hopper_consumer_n(int block_m) {
    return block_m == 128 ? kHopperBlockN : kHopperBlockN / 2;
}
TILE_FUNCTION int hopper_first_row(int block_m, int consumer) {
    return block_m == 128 ? 64 * consumer : 0;
}
TILE_FUNCTION int hopper_first_weight(int block_m, int consumer) {
    return block_m == 128 ? 0 : kHopperBlockN / 2 * consumer;
}

// wgmma m64: accumulator register r of warpgroup thread t is row, column of the 64 x N product.
TILE_FUNCTION int accumulator_row(int thread, int r) {
    return thread / 32 * 16 + thread % 32 / 4 + r / 2 % 2 * 8;
}
TILE_FUNCTION int accumulator_column(int thread, int r) {
    return r / 4 * 8 + thread % 4 * 2 + r % 2;
}

// wgmma's description of an operand in shared memory: K-major rows of 128 bytes, 128-byte swizzle
// (layout 1 in bits 62-63), 1024 bytes from eight rows to the next (stride, bits 32-45); the
// leading offset is not used with this swizzle. Addresses and strides in units of 16 bytes. The
// next 16 k are 32 bytes on: the start address grows by 2, inside the swizzle atom.
TILE_FUNCTION constexpr uint64_t wgmma_descriptor(uint32_t shared_address) {
    return uint64_t((shared_address & 0x3ffff) >> 4) | uint64_t(1) << 16 | uint64_t(64) << 32 |
           uint64_t(1) << 62;
}
constexpr uint64_t kDescriptorNext16K = 2;

}  // namespace moe_offload::cuda
