// A token's answer from its experts' rows: the weighted sum in rank order, in float, rounded once.
// The order is that of the router's choices, never that of arrival: reproducible bit for bit.
#pragma once

#include "expert_gemm/cuda/params.h"
#include "simt/simt.h"

namespace moe_offload::cuda {

// Four neighbouring features of one token from float rows; `partial` may have been written by
// other blocks of this launch.
template <class T>
SIMT_FUNCTION void combine4(const ExpertParams& p, int token, int feature) {
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const float* partial = static_cast<const float*>(p.partial);
    for (int rank = 0; rank < p.top_k; ++rank) {
        const int route = token * p.top_k + rank;
        const int row = p.row_of_route[route];
        if (row < 0) continue;
        const float weight = p.topk_weights[route];
        const simt::U4 v =
            simt::load16<simt::Keep::coherent>(partial + int64_t(row) * p.hidden + feature);
        float value[4];
        memcpy(value, &v, 16);
        SIMT_UNROLL for (int i = 0; i < 4; ++i) sum[i] += weight * value[i];
    }
    T* out = static_cast<T*>(p.out) + int64_t(token) * p.hidden + feature;
    simt::store8(out, simt::pack<T>(sum[0], sum[1]), simt::pack<T>(sum[2], sum[3]));
}

// Prefill's last launch: blocks of 256 threads, each eight features of one token, from rows of T.
template <class T>
SIMT_FUNCTION void combine_rows(const ExpertParams& p, int threads_per_block) {
    const int chunks = p.hidden / 8;
    const int64_t index = int64_t(simt::block_x()) * threads_per_block + simt::thread_id();
    if (index >= int64_t(p.num_tokens) * chunks) return;
    const int token = int(index / chunks), feature = int(index % chunks) * 8;
    float sum[8] = {};
    const T* rows = static_cast<const T*>(p.partial);
    for (int rank = 0; rank < p.top_k; ++rank) {
        const int route = token * p.top_k + rank;
        const int row = p.row_of_route[route];
        if (row < 0) continue;
        const float weight = p.topk_weights[route];
        const simt::U4 v =
            simt::load16<simt::Keep::streamed>(rows + int64_t(row) * p.hidden + feature);
        SIMT_UNROLL for (int i = 0; i < 4; ++i) {
            sum[2 * i] += weight * simt::unpack_low<T>(v.word[i]);
            sum[2 * i + 1] += weight * simt::unpack_high<T>(v.word[i]);
        }
    }
    simt::U4 packed;
    SIMT_UNROLL for (int i = 0; i < 4; ++i) packed.word[i] =
        simt::pack<T>(sum[2 * i], sum[2 * i + 1]);
    simt::store16(static_cast<T*>(p.out) + int64_t(token) * p.hidden + feature, packed);
}

}  // namespace moe_offload::cuda
