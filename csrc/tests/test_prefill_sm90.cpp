// The Hopper prefill kernel's index logic, without its instructions: shared memory is filled by the
// kernel's own copy functions, read back the way wgmma reads it, and stored by its own epilogue.
#include "check.h"
#include "expert_case.h"
#include "expert_gemm/cuda/combine.h"
#include "expert_gemm/cuda/epilogue.h"
#include "expert_gemm/cuda/prefill_sm90.h"
#include "expert_gemm/cuda/present_groups.h"

namespace {

using namespace moe_offload;
using namespace moe_offload::cuda;
using expert_case::Case;
using expert_case::Shape;
using simt::bf16;

// What the copy engine does with a box and the 128-byte swizzle; zeros outside the tensor.
void copy_box(const WeightTensor& tensor, const int (&at)[5], unsigned char* to) {
    int row = 0;
    for (uint32_t i3 = 0; i3 < tensor.box[3]; ++i3)
        for (uint32_t i2 = 0; i2 < tensor.box[2]; ++i2)
            for (uint32_t i1 = 0; i1 < tensor.box[1]; ++i1, ++row)
                for (uint32_t i0 = 0; i0 < tensor.box[0]; ++i0) {
                    const uint64_t c[5] = {at[0] + i0, at[1] + i1, at[2] + i2, at[3] + i3,
                                           uint64_t(at[4])};
                    bool inside = true;
                    uint64_t offset = c[0] * 2;
                    for (int d = 0; d < 5; ++d) {
                        inside &= c[d] < tensor.sizes[d];
                        if (d > 0) offset += c[d] * tensor.strides[d - 1];
                    }
                    unsigned char* element = to + swizzle128(row, i0 / 8) + i0 % 8 * 2;
                    std::memset(element, 0, 2);
                    if (inside) std::memcpy(element, tensor.base + offset, 2);
                }
    CHECK_EQ(row, kHopperBlockN);
}

// wgmma's view: the descriptor's start, eight rows of 128 bytes per 1024, and the swizzle as a
// function of the address's bits (4 to 6 flipped by 7 to 9), which is why stages are aligned.
float operand(const unsigned char* shared, uint64_t descriptor, int row, int k) {
    CHECK_EQ(descriptor >> 62, 1u);
    const uint32_t start = uint32_t(descriptor & 0x3fff) * 16;
    const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) * 16;
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    bf16 value;
    std::memcpy(&value, shared + address, 2);
    return simt::to_float(value);
}

// One tile as the kernel computes it, one k block at a time in its stage.
template <int kBlockM, bool kDown>
void run_tile(const ExpertParams& p, const WeightTensor& tensor, const Group& group,
              const Tile& tile, std::vector<unsigned char>& shared, int64_t& used) {
    constexpr int kN = hopper_consumer_n(kBlockM);
    const bool gated = !kDown && p.gated;
    const int k_size = kDown ? p.inner_size : p.hidden;
    const int num_features = kDown ? p.hidden : p.inner_size;
    const auto* tokens = static_cast<const unsigned char*>(kDown ? p.inner : p.x);
    std::vector<std::vector<float>> acc(2 * 128, std::vector<float>(kN / 2, 0.0f));
    for (int k = 0; k < k_size; k += kHopperBlockK, ++used) {
        const int stage_at = hopper_stage(used) * hopper_stage_bytes(kBlockM);
        unsigned char* stage = shared.data() + stage_at;
        std::memset(stage, 0xff, hopper_stage_bytes(kBlockM));
        for (int thread = 0; thread < kHopperProducers; ++thread)
            for (int i = 0; i < hopper_copies(kBlockM); ++i) {
                const int local = hopper_copy_row(thread, i), chunk = hopper_copy_chunk(thread);
                const int row = group.first_row + tile.row_tile * kBlockM + local;
                unsigned char* to = stage + swizzle128(local, chunk);
                std::memset(to, 0, 16);
                if (row >= group.end_row || k + chunk * 8 >= k_size) continue;
                const int64_t source = kDown ? row : p.route_of_row[row] / p.top_k;
                std::memcpy(to, tokens + source * k_size * 2 + k * 2 + chunk * 16, 16);
            }
        copy_box(tensor, {k, 0, 0, hopper_feature_group(tile.feature_tile, gated), group.page},
                 stage + hopper_token_bytes(kBlockM));
        for (int consumer = 0; consumer < 2; ++consumer) {
            const uint32_t a_at = stage_at + hopper_first_row(kBlockM, consumer) * kHopperRowBytes;
            const uint32_t b_at = stage_at + hopper_token_bytes(kBlockM) +
                                  hopper_first_weight(kBlockM, consumer) * kHopperRowBytes;
            CHECK_EQ(a_at % 1024, 0u);
            CHECK_EQ(b_at % 1024, 0u);
            std::vector<float> a(64 * 64), b(kN * 64);
            for (int i = 0; i < kHopperBlockK / 16; ++i)
                for (int kk = 0; kk < 16; ++kk) {
                    const uint64_t next = i * kDescriptorNext16K;
                    for (int row = 0; row < 64; ++row)
                        a[row * 64 + i * 16 + kk] =
                            operand(shared.data(), wgmma_descriptor(a_at) + next, row, kk);
                    for (int n = 0; n < kN; ++n)
                        b[n * 64 + i * 16 + kk] =
                            operand(shared.data(), wgmma_descriptor(b_at) + next, n, kk);
                }
            for (int thread = 0; thread < 128; ++thread)
                for (int r = 0; r < kN / 2; ++r) {
                    const float* row = &a[accumulator_row(thread, r) * 64];
                    const float* column = &b[accumulator_column(thread, r) * 64];
                    for (int i = 0; i < 64; ++i)
                        acc[consumer * 128 + thread][r] += row[i] * column[i];
                }
        }
    }
    const ActivationForm form = activation_form(p);
    auto* out = static_cast<bf16*>(kDown ? p.partial : p.inner);
    for (int consumer = 0; consumer < 2; ++consumer)
        for (int thread = 0; thread < 128; ++thread)
            for (int half = 0; half < 2; ++half) {
                const int row = group.first_row + tile.row_tile * kBlockM +
                                hopper_first_row(kBlockM, consumer) +
                                accumulator_row(thread, 2 * half);
                if (row >= group.end_row) continue;
                with_smooth<kDown>(form, [&](auto smooth) {
                    store_row<bf16, kN / 8, kDown, decltype(smooth)::value>(
                        p, form, p.pages.address(group.page), out + int64_t(row) * num_features,
                        tile.feature_tile * (gated ? kHopperBlockN / 2 : kHopperBlockN),
                        hopper_first_weight(kBlockM, consumer), accumulator_column(thread, 0),
                        false, [&](int j, int c) -> float& {
                            return acc[consumer * 128 + thread][j * 4 + 2 * half + c];
                        });
                });
            }
}

template <int kBlockM>
void matches_double(const Shape& shape) {
    Case<bf16> c(shape, 23);
    c.params.partial = c.partial16.data();
    const ExpertParams& p = c.params;
    const int64_t num_slots = shape.experts + shape.experts / 2 + 1;
    const PresentGroups groups{p};
    std::vector<unsigned char> shared(kHopperStages * hopper_stage_bytes(kBlockM));
    int64_t used = 0;
    auto project = [&](auto down) {
        constexpr bool kDown = decltype(down)::value;
        const WeightTensor tensor = weight_tensor(p, kDown, num_slots);
        TileWalker<PresentGroups> walker(groups, p.group_count(), kBlockM,
                                         hopper_feature_tiles(p, kDown));
        for (int64_t index = 0;; ++index) {
            const Tile tile = walker.at(index);
            if (tile.group < 0) break;
            run_tile<kBlockM, kDown>(p, tensor, groups.group(tile.group), tile, shared, used);
        }
    };
    project(std::false_type{});
    project(std::true_type{});
    const int blocks = ceil_div(p.num_tokens * (p.hidden / 8), 256);
    simt::launch({.grid_x = blocks, .threads = 256}, [&](auto*) { combine_rows<bf16>(p, 256); });
    c.compute_reference();
    c.check("sm_90a model", 1);
}

void a_tile_is_the_product() {
    const Shape shapes[] = {
        {"gated, off every tile", 70, 1, 2, 72, 136},
        {"gpt-oss: interleaved, biased, clamped", 20, 2, 3, 64, 40, true, true, true,
         Activation::clamped_swiglu},
        {"ungated, exact gelu", 20, 1, 2, 264, 24, false, false, false, Activation::gelu},
    };
    for (const Shape& shape : shapes) {
        matches_double<64>(shape);
        matches_double<128>(shape);
    }
}

// A stage's barrier completes phases in turn: use i waits for parity 0, then the same stage's next
// use for 1.
void parities_alternate_per_stage() {
    for (int64_t i = 0; i < 100; ++i) {
        CHECK_EQ(hopper_stage(i), hopper_stage(i + kHopperStages));
        CHECK(hopper_parity(i) != hopper_parity(i + kHopperStages));
        CHECK(i >= kHopperStages || hopper_parity(i) == 0);
    }
    static_assert(kHopperLag < kHopperStages, "else the producer waits for itself");
}

void shared_memory_fits_hopper() {
    CHECK(hopper_shared_bytes(128) <= 227 * 1024);
    CHECK_EQ(hopper_token_bytes(64) % 1024, 0);
    CHECK_EQ(hopper_stage_bytes(64) % 1024, 0);
    CHECK_EQ(hopper_stage_bytes(128) % 1024, 0);
    std::vector<int> seen(128 * 8, 0);
    for (int thread = 0; thread < kHopperProducers; ++thread)
        for (int i = 0; i < hopper_copies(128); ++i)
            ++seen[swizzle128(hopper_copy_row(thread, i), hopper_copy_chunk(thread)) / 16];
    for (int count : seen) CHECK_EQ(count, 1);
}

}  // namespace

int main() {
    RUN(a_tile_is_the_product);
    RUN(parities_alternate_per_stage);
    RUN(shared_memory_fits_hopper);
}
