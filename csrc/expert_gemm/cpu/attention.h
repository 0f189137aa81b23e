// softmax(scale q K^T + mask) V for sequences with one token each: a decoded token's attention.
//
// Its cost is reading keys and values once. They are cut into chunks of positions, by the number of
// positions alone; threads take (sequence, key head, chunk), and who takes a head's last chunk puts
// its results together, in the order of positions (flash-decoding, Dao et al. 2023). So bits depend
// on the instruction set, the dtype and the number of positions: not on threads, timing, strides or
// the other sequences. A head that is masked everywhere gives zeros, as torch's does.
#pragma once

#include "expert_gemm/cpu/kernels.h"

namespace moe_offload {

// All in one dtype. Strides in bytes, any; elements of a head lie next to each other.
struct AttentionArgs {
    int64_t batch, query_heads, key_heads;  // query_heads a multiple of key_heads
    int64_t positions, size, value_size;    // of the head
    const std::byte* q;                     // [batch, query_heads, size], contiguous
    const std::byte* keys;                  // [batch, key_heads, positions, size]
    int64_t key_batch_stride, key_head_stride, key_stride;
    const std::byte* values;  // [batch, key_heads, positions, value_size]
    int64_t value_batch_stride, value_head_stride, value_stride;
    AttendMask mask;  // of the first sequence
    int64_t mask_batch_stride;
    float scale;
    std::byte* out;  // [batch, query_heads, value_size], contiguous
};

void attention(const AttentionArgs& args, Dtype dtype, const Kernels& kernels, int num_threads);

}  // namespace moe_offload
