#include "path_memory.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace moe_offload {
namespace {

#define MOE_INLINE inline __attribute__((always_inline))

// Bits set, in plain arithmetic: the loop over passes becomes vector code on every machine, which
// the compiler's popcount does only where there is an instruction for it.
MOE_INLINE uint32_t count_bits(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555U;
    x = (x & 0x3333333333333333U) + ((x >> 2) & 0x3333333333333333U);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fU;
    x += x >> 8;
    x += x >> 16;
    x += x >> 32;
    return static_cast<uint32_t>(x & 0x7fU);
}

// similarity[s] += kUnit * shared bits of row[s] and mask.
template <bool kHasInstruction>
MOE_INLINE void add_shared(uint32_t* similarity, const uint64_t* row, uint64_t mask, size_t count) {
    for (size_t s = 0; s < count; ++s) {
        const uint64_t shared = row[s] & mask;
        similarity[s] +=
            PathMemory::kUnit *
            (kHasInstruction ? static_cast<uint32_t>(std::popcount(shared)) : count_bits(shared));
    }
}

// Indices of the values >= bound (which is at least 1), rising; returns how many.
MOE_INLINE size_t at_least(const uint32_t* values, size_t count, uint32_t bound, uint32_t* found) {
    constexpr size_t kBlock = 16;
    size_t n = 0, s = 0;
    const auto least = static_cast<int32_t>(bound - 1);
    for (; s + kBlock <= count; s += kBlock) {
        int32_t any = 0;
        for (size_t i = 0; i < kBlock; ++i) any |= static_cast<int32_t>(values[s + i]) > least;
        if (any == 0) continue;
        for (size_t i = 0; i < kBlock; ++i)
            if (values[s + i] >= bound) found[n++] = static_cast<uint32_t>(s + i);
    }
    for (; s < count; ++s)
        if (values[s] >= bound) found[n++] = static_cast<uint32_t>(s);
    return n;
}

// The two loops over all passes, compiled for wider vectors where the machine has them: whole
// numbers, so every build decides alike.
struct Loops {
    void (*add_shared)(uint32_t*, const uint64_t*, uint64_t, size_t);
    size_t (*at_least)(const uint32_t*, size_t, uint32_t, uint32_t*);
};
#define MOE_LOOPS(name, has_popcount, target)                                               \
    target void add_shared_##name(uint32_t* similarity, const uint64_t* row, uint64_t mask, \
                                  size_t count) {                                           \
        add_shared<has_popcount>(similarity, row, mask, count);                             \
    }                                                                                       \
    target size_t at_least_##name(const uint32_t* values, size_t count, uint32_t bound,     \
                                  uint32_t* found) {                                        \
        return at_least(values, count, bound, found);                                       \
    }
MOE_LOOPS(plain, false, )
#if defined(__x86_64__)
MOE_LOOPS(avx2, false, __attribute__((target("avx2"))))
MOE_LOOPS(avx512, false, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
MOE_LOOPS(avx512_popcount, true,
          __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq"))))
#endif

const Loops& loops() {
    static const Loops found = [] {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            if (__builtin_cpu_supports("avx512vpopcntdq"))
                return Loops{add_shared_avx512_popcount, at_least_avx512_popcount};
            return Loops{add_shared_avx512, at_least_avx512};
        }
        if (__builtin_cpu_supports("avx2")) return Loops{add_shared_avx2, at_least_avx2};
#endif
        return Loops{add_shared_plain, at_least_plain};
    }();
    return found;
}

}  // namespace

PathMemory::PathMemory(size_t num_layers, size_t experts_per_layer, size_t capacity)
    : num_layers_(num_layers),
      words_((experts_per_layer + 63) / 64),
      capacity_(capacity),
      bits_(num_layers * words_ * capacity, 0),
      similarity_(capacity, 0),
      faded_(capacity, 0),
      candidates_(capacity, 0),
      mask_(words_) {}

void PathMemory::begin_pass() {
    // The similarity of pass s starts from that of pass s - 1 to the pass before
    // the present one.
    now_ = known_ == 0 ? 0 : (now_ + 1) % capacity_;
    known_ = std::min(known_ + 1, capacity_);
    for (size_t s = 1; s < capacity_; ++s) faded_[s] = (similarity_[s - 1] * kFade) >> 8;
    faded_[0] = (similarity_[capacity_ - 1] * kFade) >> 8;
    std::swap(similarity_, faded_);
    similarity_[now_] = 0;
    for (size_t row = 0; row < num_layers_ * words_; ++row) bits_[row * capacity_ + now_] = 0;
}

void PathMemory::observe(size_t layer, std::span<const PageIndex> experts) {
    std::fill(mask_.begin(), mask_.end(), uint64_t{0});
    for (const PageIndex expert : experts) mask_[expert / 64] |= uint64_t{1} << (expert % 64);
    for (size_t word = 0; word < words_; ++word) {
        uint64_t* row = &bits_[(layer * words_ + word) * capacity_];
        const uint64_t mask = mask_[word];
        loops().add_shared(similarity_.data(), row, mask, known_);
        row[now_] = mask;
    }
}

std::span<const PathMemory::Neighbour> PathMemory::nearest(size_t count) {
    // The nearest of the call before are `count` passes that are at least this similar, so none
    // below them can be among the nearest now: of thousands a few dozen are left to be ranked.
    uint32_t bound = nearest_.size() == count ? std::numeric_limits<uint32_t>::max() : 0;
    for (const Neighbour& before : nearest_) {
        const auto slot = static_cast<size_t>(before.slot);
        bound = std::min(bound, slot == now_ ? 0 : similarity_[slot]);
    }
    nearest_.clear();
    if (count == 0) return nearest_;
    const size_t candidates =
        loops().at_least(similarity_.data(), known_, std::max(bound, 1U), candidates_.data());
    uint32_t lowest = 0;  // a pass must exceed it
    for (size_t c = 0; c < candidates; ++c) {
        const size_t s = candidates_[c];
        if (similarity_[s] <= lowest || s == now_) continue;
        const auto age = static_cast<uint32_t>(now_ >= s ? now_ - s : now_ + capacity_ - s);
        const auto place = std::find_if(nearest_.begin(), nearest_.end(), [&](const Neighbour& n) {
            return n.similarity < similarity_[s];
        });
        nearest_.insert(place, {similarity_[s], age, static_cast<uint32_t>(s)});
        if (nearest_.size() > count) nearest_.pop_back();
        if (nearest_.size() == count) lowest = nearest_.back().similarity;
    }
    return nearest_;
}

float neighbour_weight(uint32_t behind, size_t num_experts) {
    constexpr double kSharpness = 0.4;  // 0.3 to 0.6 are alike
    const double layers =
        double(behind) / double(PathMemory::kUnit * std::max<size_t>(num_experts, 1));
    return static_cast<float>(std::exp(-kSharpness * layers));
}

bool is_informative(size_t num_requested, size_t num_experts) {
    return num_requested * 16 <= num_experts * 15;
}

}  // namespace moe_offload
