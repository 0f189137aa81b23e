// The decode kernels, run on the CPU (csrc/simt), against plain loops in double.
#include "check.h"
#include "emulated_layer.h"

namespace {

using namespace emulated_layer;

int to_expert_1(int, uint64_t) { return 1; }
int skip_middle(int, uint64_t random) { return random % 2 ? 0 : 3; }

const Shape kShapes[] = {
    {"one token", 1, 2, 4, 64, 32},
    {"K and N off every tile", 5, 2, 3, 72, 40},
    {"nine tokens: two passes of eight", 9, 1, 2, 136, 24},
    {"all tokens to one expert", 19, 1, 4, 64, 48, true, false, false, Activation::silu,
     to_expert_1},
    {"experts with none", 6, 1, 5, 64, 16, true, false, false, Activation::gelu, skip_middle},
    {"routes that are not ours", 7, 3, 4, 64, 16, true, false, false, Activation::silu,
     none_or_any},
    {"A = E", 3, 4, 4, 64, 16},
    {"gpt-oss: interleaved, biased, clamped", 4, 2, 4, 96, 32, true, true, true,
     Activation::clamped_swiglu},
    {"ungated, relu squared", 4, 2, 3, 64, 72, false, false, false, Activation::relu2},
    {"ungated, biased, tanh gelu", 4, 2, 3, 64, 32, false, false, true, Activation::gelu_tanh},
};

template <class T>
void matches_double_on_every_shape() {
    for (const Shape& shape : kShapes) {
        Case<T> c(shape, 7);
        check_decode<T, PlainWeights<T>>(c, c);
    }
}

void no_routes_give_zeros() {
    Case<bf16> c({"nowhere", 3, 2, 4, 64, 16, true, false, false, Activation::silu, nowhere}, 1);
    CHECK_EQ(c.groups.size(), 0u);
    run_decode<bf16, PlainWeights<bf16>, 1>(c.params);
    for (bf16 value : c.out) CHECK_EQ(value.bits, 0);
}

void late_arrivals_change_nothing() {
    Case<bf16> c({"late", 6, 3, 6, 72, 40}, 3);
    check_late_arrivals<PlainWeights<bf16>>(c, 5);
}

// The slot table says who is here: an absent expert's group is skipped, its ticket stays open, and
// the launch after its arrival finishes the layer.
void absent_experts_wait_for_their_launch() {
    Case<bf16> c({"absent", 5, 2, 4, 64, 32}, 9);
    run_decode<bf16, PlainWeights<bf16>, 1>(c.params);
    const auto together = c.out;
    c.poison();
    auto slot_of = c.slot_of;
    const int absent = c.groups[0].page, total = int(c.groups.size());
    slot_of[absent] = -1;
    ExpertParams p = c.params;
    p.total_groups = &total;
    p.pages.slot_of = slot_of.data();
    run_decode<bf16, PlainWeights<bf16>, 1>(p);
    for (bf16 value : c.out) CHECK_EQ(value.bits, 0xffff);  // not combined yet
    slot_of[absent] = c.slot_of[absent];
    p.groups = c.groups.data();
    p.max_groups = 1;
    run_decode<bf16, PlainWeights<bf16>, 1>(p);
    CHECK(c.same_bits(together));
}

// Pages anywhere: a table of addresses instead of the slab (user-owned tensors, pinned host rows).
void a_page_table_reads_the_same_pages() {
    Case<bf16> c({"table", 4, 2, 4, 64, 32}, 5);
    run_decode<bf16, PlainWeights<bf16>, 1>(c.params);
    const auto slab = c.out;
    c.poison();
    // Pages in allocations of their own, under page ids past a thousand and past 32-bit offsets.
    std::vector<std::vector<unsigned char>> own(4);
    std::vector<uint64_t> table(2000, 0);
    std::vector<int32_t> page_of(4);
    const auto& pages = c.params.pages;
    const size_t bytes = pages.down_offset + 64 * 32 * 2;
    for (int e = 0; e < 4; ++e) {
        const unsigned char* page = c.slab.data() + c.slot_of[e] * pages.slot_stride;
        own[e].assign(page, page + bytes);
        page_of[e] = 1500 + 100 * e;
        table[page_of[e]] = reinterpret_cast<uint64_t>(own[e].data());
    }
    ExpertParams p = c.params;
    p.pages.slab = nullptr;
    p.pages.page_table = table.data();
    p.pages.slot_of = page_of.data();
    run_decode<bf16, PlainWeights<bf16>, 1>(p);
    CHECK(c.same_bits(slab));

    Pages far{};
    far.slab = reinterpret_cast<const unsigned char*>(uintptr_t(1) << 40);
    far.slot_stride = 352'321'536;  // a Mixtral page
    CHECK_EQ(reinterpret_cast<uintptr_t>(far.address(1234)),
             (uintptr_t(1) << 40) + 1234ull * 352'321'536ull);
}

// The routing kernel's own maps (offsets and active experts) instead of a list of groups, on the
// device's counters.
void the_permutations_maps_do_as_well_as_groups() {
    Case<bf16> c({"maps", 6, 2, 5, 64, 32}, 4);
    run_decode<bf16, PlainWeights<bf16>, 1>(c.params);
    const auto listed = c.out;
    std::vector<int32_t> offsets(6, 0), active(5, -1);
    const int num_active = int(c.groups.size());
    for (int g = 0; g < num_active; ++g) active[g] = c.groups[g].page;
    for (int id : c.ids) ++offsets[id + 1];
    for (int e = 0; e < 5; ++e) offsets[e + 1] += offsets[e];
    c.poison();
    ExpertParams p = c.params;
    p.groups = nullptr;
    p.active_experts = active.data();
    p.expert_offsets = offsets.data();
    p.num_groups = &num_active;
    p.max_groups = 5;
    run_decode<bf16, PlainWeights<bf16>, 1>(p);
    CHECK(c.same_bits(listed));
}

void random_shapes() {
    std::mt19937_64 random(2026);
    for (int i = 0; i < 12; ++i) {
        Case<f16> c(random_shape(random, {20, 3, 6, 20, 12}), random());
        run_decode<f16, PlainWeights<f16>, 2>(c.params, 1 + int(random() % 8), random());
        c.compute_reference();
        c.check("random");
    }
}

}  // namespace

int main() {
    RUN(matches_double_on_every_shape<bf16>);
    RUN(matches_double_on_every_shape<f16>);
    RUN(no_routes_give_zeros);
    RUN(late_arrivals_change_nothing);
    RUN(absent_experts_wait_for_their_launch);
    RUN(a_page_table_reads_the_same_pages);
    RUN(the_permutations_maps_do_as_well_as_groups);
    RUN(random_shapes);
}
