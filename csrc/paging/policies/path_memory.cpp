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
      experts_per_layer_(experts_per_layer),
      words_((experts_per_layer + 63) / 64),
      capacity_(capacity),
      bits_(num_layers * words_ * capacity, 0),
      next_(capacity, none()),
      previous_(capacity, none()),
      faded_(capacity + 1, 0),
      candidates_(capacity, 0),
      mask_(words_) {}

void PathMemory::begin_pass(size_t num_rows) {
    // The similarity of an entry starts from that of its predecessor to the row's own.
    if (rows_.size() < num_rows) rows_.resize(num_rows, {std::vector<uint32_t>(capacity_ + 1), {}});
    for (size_t row = 0; row < num_rows; ++row) {
        auto& similarity = rows_[row].similarity;
        if (row < num_rows_)
            for (size_t entry = 0; entry < capacity_; ++entry)
                faded_[entry] = (similarity[previous_[entry]] * kFade) >> 8;
        else
            std::fill(faded_.begin(), faded_.end(), 0U);
        std::swap(similarity, faded_);
        similarity[none()] = 0;
    }
    const size_t first_before = first_, rows_before = num_rows_;
    first_ = known_ == 0 ? 0 : (first_ + num_rows_) % capacity_;
    num_rows_ = num_rows;
    known_ = std::min(known_ + num_rows, capacity_);
    for (size_t row = 0; row < num_rows; ++row) {
        const Entry entry = entry_of(row);
        for (size_t r = 0; r < num_rows; ++r) rows_[r].similarity[entry] = 0;
        for (size_t w = 0; w < num_layers_ * words_; ++w) bits_[w * capacity_ + entry] = 0;
        if (next_[entry] != none()) previous_[next_[entry]] = none();  // what was here is forgotten
        next_[entry] = previous_[entry] = none();
        if (row >= rows_before) continue;
        previous_[entry] = static_cast<Entry>((first_before + row) % capacity_);
        next_[previous_[entry]] = entry;
    }
}

void PathMemory::observe(size_t layer, std::span<const PageIndex> experts,
                         std::span<const int32_t> routes) {
    const auto add = [&](size_t expert) { mask_[expert / 64] |= uint64_t{1} << (expert % 64); };
    if (num_rows_ == 1) {
        std::fill(mask_.begin(), mask_.end(), uint64_t{0});
        for (const PageIndex expert : experts) add(expert);
        return observe_row(0, layer);
    }
    const size_t each = routes.size() / num_rows_;
    for (size_t row = 0; each > 0 && row < num_rows_; ++row) {
        std::fill(mask_.begin(), mask_.end(), uint64_t{0});
        for (const int32_t expert : routes.subspan(row * each, each))
            if (expert >= 0 && static_cast<size_t>(expert) < experts_per_layer_)
                add(static_cast<size_t>(expert));
        observe_row(row, layer);
    }
}

void PathMemory::observe_row(size_t row, size_t layer) {
    for (size_t word = 0; word < words_; ++word) {
        uint64_t* bits = &bits_[(layer * words_ + word) * capacity_];
        loops().add_shared(rows_[row].similarity.data(), bits, mask_[word], known_);
        bits[entry_of(row)] = mask_[word];
    }
}

std::span<const PathMemory::Neighbour> PathMemory::nearest(size_t row, size_t count) {
    if (row >= num_rows_) return {};
    auto& [similarity, nearest] = rows_[row];
    // The nearest of the call before are `count` entries that are at least this similar, so none
    // below them can be among the nearest now: of thousands a few dozen are left to be ranked.
    uint32_t bound = nearest.size() == count ? std::numeric_limits<uint32_t>::max() : 0;
    for (const Neighbour& before : nearest)
        bound = std::min(bound, is_present(before.entry) ? 0 : similarity[before.entry]);
    nearest.clear();
    if (count == 0) return nearest;
    const size_t candidates =
        loops().at_least(similarity.data(), known_, std::max(bound, 1U), candidates_.data());
    uint32_t lowest = 0;  // an entry must exceed it
    for (size_t c = 0; c < candidates; ++c) {
        const Entry entry = candidates_[c];
        if (similarity[entry] <= lowest || is_present(entry)) continue;
        const auto place = std::find_if(nearest.begin(), nearest.end(), [&](const Neighbour& n) {
            return n.similarity < similarity[entry];
        });
        nearest.insert(place, {similarity[entry], entry});
        if (nearest.size() > count) nearest.pop_back();
        if (nearest.size() == count) lowest = nearest.back().similarity;
    }
    return nearest;
}

size_t rows_of(const LayerRequest& request) {
    const int32_t tokens = request.num_tokens;
    return request.routes.empty() || tokens < 1 || tokens > kMaxRoutedTokens
               ? 1
               : static_cast<size_t>(tokens);
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
