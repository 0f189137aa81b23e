// One MoE layer by the emulated kernels, and the checks that every format of pages has to pass.
#pragma once

#include "expert_case.h"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/decode.h"
#include "expert_gemm/cuda/prefill_sm80.h"

namespace emulated_layer {

using namespace moe_offload;
using namespace moe_offload::cuda;
using expert_case::Case;
using expert_case::Shape;
using simt::bf16;
using simt::f16;

// For Shape::choose.
inline int none_or_any(int, uint64_t random) { return int(random % 5) - 1; }
inline int nowhere(int, uint64_t) { return -1; }

template <class T, class Format, int kTokenGroups>
void run_decode(const ExpertParams& p, int warps = 2, uint64_t seed = 0) {
    simt::Launch config{.grid_x = decode_feature_tiles<Format>(p, false),
                        .grid_y = std::max(1, p.max_groups),
                        .threads = 32 * warps,
                        .shared_bytes = decode_shared_bytes<Format>(warps, kTokenGroups),
                        .seed = seed};
    simt::launch(config, [&](auto* s) { decode_up<T, Format, kTokenGroups>(p, warps, s); });
    config.grid_x = decode_feature_tiles<Format>(p, true);
    simt::launch(config, [&](auto* s) { decode_down<T, Format, kTokenGroups>(p, warps, s); });
}

template <class T, class Format, int kBlockM, int kStages>
void run_prefill_gemms(const ExpertParams& p, int blocks, uint64_t seed = 0) {
    const simt::Launch config{.grid_x = blocks,
                              .threads = kPrefillThreads,
                              .shared_bytes = kStages * prefill_stage_bytes(kBlockM),
                              .seed = seed};
    simt::launch(config, [&](auto* s) { prefill<T, Format, kBlockM, kStages, false>(p, s); });
    simt::launch(config, [&](auto* s) { prefill<T, Format, kBlockM, kStages, true>(p, s); });
}

template <class T>
void run_combine(const ExpertParams& p) {
    const int blocks = ceil_div(p.num_tokens * (p.hidden / 8), 256);
    simt::launch({.grid_x = blocks, .threads = 256}, [&](auto*) { combine_rows<T>(p, 256); });
}

template <class T, class Format, int kBlockM, int kStages>
void run_prefill(Case<T>& c, int blocks, uint64_t seed = 0) {
    c.poison();
    c.params.partial = c.partial16.data();
    run_prefill_gemms<T, Format, kBlockM, kStages>(c.params, blocks, seed);
    run_combine<T>(c.params);
}

// `c` has pages of the format; `reference`, whose loops give the answer, may be `c` itself.
template <class T, class Format>
void check_decode(Case<T>& c, Case<T>& reference) {
    run_decode<T, Format, 1>(c.params);
    const auto first = c.out;  // before the reference exists
    reference.compute_reference();
    c.want = reference.want;
    c.magnitude = reference.magnitude;
    c.check("1 token group");
    for (int tickets : c.tickets) CHECK_EQ(tickets, 0);

    // More tokens at a time, another order of threads and blocks: the same bits.
    c.poison();
    run_decode<T, Format, 2>(c.params, 2, 11);
    CHECK(c.same_bits(first));
    c.poison();
    run_decode<T, Format, 4>(c.params, 2, 12);
    CHECK(c.same_bits(first));
    for (int warps : {1, 8}) {  // another split of K: other bits, as near
        c.poison();
        run_decode<T, Format, 1>(c.params, warps, 13);
        c.check("other splits of K");
    }
}

// Resident experts in one pair of launches and the late ones in another: any split, same bits.
template <class Format>
void check_late_arrivals(Case<bf16>& c, int split_step) {
    run_decode<bf16, Format, 1>(c.params);
    const auto together = c.out;
    const int num_groups = int(c.groups.size()), total = num_groups;
    CHECK(num_groups >= 4);
    for (int split = 0; split < 1 << num_groups; split += split_step) {
        std::vector<Group> resident, late;
        for (int g = 0; g < num_groups; ++g)
            (split >> g & 1 ? late : resident).push_back(c.groups[g]);
        c.poison();
        ExpertParams p = c.params;
        p.total_groups = &total;
        for (const auto& list : {resident, late}) {
            const int count = int(list.size());
            p.groups = list.data();
            p.num_groups = &count;
            p.max_groups = num_groups;  // a captured grid is as large as it could ever be
            run_decode<bf16, Format, 1>(p, 2, split);
        }
        CHECK(c.same_bits(together));
    }
}

// Up to so many tokens and experts; H and F in eighths, which end inside every tile.
struct ShapeLimits {
    int tokens, top_k, experts, hidden_eighths, inner_eighths;
};
inline Shape random_shape(std::mt19937_64& random, const ShapeLimits& limits) {
    auto up_to = [&](int n) { return 1 + int(random() % n); };
    Shape s{"random",
            up_to(limits.tokens),
            1,
            up_to(limits.experts),
            8 * up_to(limits.hidden_eighths),
            8 * up_to(limits.inner_eighths)};
    s.top_k = up_to(std::min(limits.top_k, s.experts));
    s.gated = random() % 4;
    s.interleaved = random() % 2;
    s.bias = random() % 2;
    std::printf("(T %d A %d E %d H %d F %d%s%s%s) ", s.tokens, s.top_k, s.experts, s.hidden,
                s.inner, s.gated ? " gated" : "", s.interleaved ? " interleaved" : "",
                s.bias ? " bias" : "");
    return s;
}

}  // namespace emulated_layer
