// Decode and sm_80 prefill on pages stored [k, rows], run on the CPU (csrc/simt). Decode against
// plain loops in double; prefill against itself on the same pages stored [rows, k], bit for bit:
// the operands of its matrix instructions are to be the same.
#include "check.h"
#include "expert_case.h"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/decode.h"
#include "expert_gemm/cuda/prefill_sm80.h"

namespace {

using namespace moe_offload;
using namespace moe_offload::cuda;
using expert_case::Case;
using expert_case::Shape;
using simt::bf16;
using simt::f16;

template <class T, int kTokenGroups>
void run_decode(const ExpertParams& p, int warps, uint64_t seed = 0) {
    using Format = TransposedWeights<T>;
    simt::Launch config{.grid_x = decode_feature_tiles<Format>(p, false),
                        .grid_y = std::max(1, p.max_groups),
                        .threads = 32 * warps,
                        .shared_bytes = decode_shared_bytes<Format>(warps, kTokenGroups),
                        .seed = seed};
    simt::launch(config, [&](auto* s) { decode_up<T, Format, kTokenGroups>(p, warps, s); });
    config.grid_x = decode_feature_tiles<Format>(p, true);
    simt::launch(config, [&](auto* s) { decode_down<T, Format, kTokenGroups>(p, warps, s); });
}

template <class T, class Format, int kBlockM>
void run_prefill(Case<T>& c, int blocks, uint64_t seed = 0) {
    constexpr int kStages = prefill_stages(kBlockM);
    c.poison();
    c.params.partial = c.partial16.data();
    const ExpertParams& p = c.params;
    const simt::Launch config{.grid_x = blocks,
                              .threads = kPrefillThreads,
                              .shared_bytes = kStages * prefill_stage_bytes(kBlockM),
                              .seed = seed};
    simt::launch(config, [&](auto* s) { prefill<T, Format, kBlockM, kStages, false>(p, s); });
    simt::launch(config, [&](auto* s) { prefill<T, Format, kBlockM, kStages, true>(p, s); });
    const int combines = ceil_div(p.num_tokens * (p.hidden / 8), 256);
    simt::launch({.grid_x = combines, .threads = 256}, [&](auto*) { combine_rows<T>(p, 256); });
}

int none_or_any(int, uint64_t random) { return int(random % 5) - 1; }
int nowhere(int, uint64_t) { return -1; }

const Shape kShapes[] = {
    {"gpt-oss: interleaved, biased, clamped", 4, 2, 4, 96, 32, true, true, true,
     Activation::clamped_swiglu},
    {"interleaved, K and N off every tile", 5, 2, 3, 72, 40, true, true},
    {"gate rows first, off every tile", 9, 1, 2, 136, 88, true, false, true},
    {"one token, long K", 1, 2, 3, 424, 64, true, true},
    {"routes that are not ours", 7, 3, 4, 64, 16, true, false, false, Activation::gelu,
     none_or_any},
    {"ungated, biased, relu squared", 4, 2, 3, 64, 72, false, false, true, Activation::relu2},
};

template <class T>
void decode_matches_double() {
    for (const Shape& shape : kShapes) {
        Case<T> plain(shape, 7);
        Case<T> c = plain.transposed();
        run_decode<T, 1>(c.params, 2);
        const auto first = c.out;  // before the reference exists
        plain.compute_reference();
        c.want = plain.want;
        c.magnitude = plain.magnitude;
        c.check("1 token group");
        for (int tickets : c.tickets) CHECK_EQ(tickets, 0);

        // More tokens at a time, another order of threads and blocks: the same bits.
        c.poison();
        run_decode<T, 2>(c.params, 2, 11);
        CHECK(c.same_bits(first));
        c.poison();
        run_decode<T, 4>(c.params, 2, 12);
        CHECK(c.same_bits(first));
        for (int warps : {1, 8}) {  // another split of K: other bits, as near
            c.poison();
            run_decode<T, 1>(c.params, warps, 13);
            c.check("other splits of K");
        }
    }
}

void decode_without_routes_gives_zeros() {
    Case<bf16> c =
        Case<bf16>({"nowhere", 3, 2, 4, 64, 16, true, true, false, Activation::silu, nowhere}, 1)
            .transposed();
    run_decode<bf16, 1>(c.params, 2);
    for (bf16 value : c.out) CHECK_EQ(value.bits, 0);
}

// Resident experts in one pair of launches and the late ones in another: any split, same bits.
void late_arrivals_change_nothing() {
    Case<bf16> c = Case<bf16>({"late", 6, 3, 6, 72, 40, true, true}, 3).transposed();
    run_decode<bf16, 1>(c.params, 2);
    const auto together = c.out;
    const int num_groups = int(c.groups.size()), total = num_groups;
    CHECK(num_groups >= 4);
    for (int split = 0; split < 1 << num_groups; split += 11) {
        std::vector<Group> resident, late;
        for (int g = 0; g < num_groups; ++g)
            (split >> g & 1 ? late : resident).push_back(c.groups[g]);
        c.poison();
        ExpertParams p = c.params;
        p.total_groups = &total;
        for (const auto& list : {resident, late}) {
            p.groups = list.data();
            p.max_groups = int(list.size());
            run_decode<bf16, 1>(p, 2, split);
        }
        CHECK(c.same_bits(together));
    }
}

template <class T, int kBlockM>
void prefill_has_the_bits_of_plain_pages() {
    const Shape shapes[] = {
        {"gpt-oss: interleaved, biased, clamped", 30, 2, 3, 64, 32, true, true, true,
         Activation::clamped_swiglu},
        {"interleaved, off every tile", 150, 1, 2, 72, 88, true, true},
        {"gate rows first, off every tile", 70, 1, 2, 104, 88, true, false, true,
         Activation::gelu_tanh},
        {"ungated, biased", 20, 1, 2, 136, 152, false, false, true, Activation::relu2},
    };
    for (const Shape& shape : shapes) {
        Case<T> plain(shape, 17);
        Case<T> c = plain.transposed();
        run_prefill<T, TransposedWeights<T>, kBlockM>(c, 3, 5);
        run_prefill<T, PlainWeights<T>, kBlockM>(plain, 2);
        CHECK(c.same_bits(plain.out));
        plain.compute_reference();
        plain.check("plain", 1);
    }
}

void random_shapes() {
    std::mt19937_64 random(2028);
    for (int i = 0; i < 10; ++i) {
        auto up_to = [&](int n) { return 1 + int(random() % n); };
        Shape s{"random", up_to(20), 1, up_to(6), 8 * up_to(20), 8 * up_to(12)};
        s.top_k = up_to(std::min(3, s.experts));
        s.gated = random() % 4;
        s.interleaved = random() % 2;
        s.bias = random() % 2;
        std::printf("(T %d A %d E %d H %d F %d%s%s%s) ", s.tokens, s.top_k, s.experts, s.hidden,
                    s.inner, s.gated ? " gated" : "", s.interleaved ? " interleaved" : "",
                    s.bias ? " bias" : "");
        Case<f16> plain(s, random());
        Case<f16> c = plain.transposed();
        run_decode<f16, 2>(c.params, up_to(8), random());
        plain.compute_reference();
        c.want = plain.want;
        c.magnitude = plain.magnitude;
        c.check("random");
    }
}

}  // namespace

int main() {
    RUN(decode_matches_double<bf16>);
    RUN(decode_matches_double<f16>);
    RUN(decode_without_routes_gives_zeros);
    RUN(late_arrivals_change_nothing);
    RUN((prefill_has_the_bits_of_plain_pages<bf16, 64>));
    RUN((prefill_has_the_bits_of_plain_pages<f16, 128>));
    RUN(random_shapes);
}
