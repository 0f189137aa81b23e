#include "path_memory.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// ranks[i]: how many values are larger than values[i], or as large and before it. `count` is a
// multiple of 16.
MOE_INLINE void rank(const uint32_t* values, size_t count, uint32_t* ranks) {
    for (size_t i = 0; i < count; ++i) {
        const auto value = static_cast<int32_t>(values[i]), before = static_cast<int32_t>(i);
        int32_t larger = 0;
        for (int32_t j = 0; j < static_cast<int32_t>(count); ++j)
            larger += static_cast<int32_t>(values[j]) > value - static_cast<int32_t>(j < before);
        ranks[i] = static_cast<uint32_t>(larger);
    }
}

// The loops over all passes and the ranking, compiled for wider vectors where the machine has them:
// whole numbers, so every build decides alike.
struct Loops {
    void (*add_shared)(uint32_t*, const uint64_t*, uint64_t, size_t);
    size_t (*at_least)(const uint32_t*, size_t, uint32_t, uint32_t*);
    void (*rank)(const uint32_t*, size_t, uint32_t*);
};
#define MOE_RANK(name, target)                                                       \
    target void rank_##name(const uint32_t* values, size_t count, uint32_t* ranks) { \
        rank(values, count, ranks);                                                  \
    }
#define MOE_ADD_SHARED(name, has_popcount, target)                                          \
    target void add_shared_##name(uint32_t* similarity, const uint64_t* row, uint64_t mask, \
                                  size_t count) {                                           \
        add_shared<has_popcount>(similarity, row, mask, count);                             \
    }
#define MOE_AT_LEAST(name, target)                                                      \
    target size_t at_least_##name(const uint32_t* values, size_t count, uint32_t bound, \
                                  uint32_t* found) {                                    \
        return at_least(values, count, bound, found);                                   \
    }
MOE_ADD_SHARED(plain, false, )
MOE_AT_LEAST(plain, )
MOE_RANK(plain, )
#if defined(__x86_64__)
#define MOE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
MOE_ADD_SHARED(avx2, false, __attribute__((target("avx2"))))
MOE_AT_LEAST(avx2, __attribute__((target("avx2"))))
MOE_RANK(avx2, __attribute__((target("avx2"))))
MOE_RANK(avx512, __attribute__((target(MOE_AVX512))))
MOE_ADD_SHARED(avx512, false, __attribute__((target(MOE_AVX512))))
MOE_ADD_SHARED(avx512_popcount, true, __attribute__((target(MOE_AVX512 ",avx512vpopcntdq"))))

// By a comparison and a compression each: the jumps of the loop above, one for each value of a
// block with something in it, took a quarter of all of `learned`'s time.
__attribute__((target(MOE_AVX512))) size_t at_least_avx512(const uint32_t* values, size_t count,
                                                           uint32_t bound, uint32_t* found) {
    constexpr size_t kBlock = 16;
    const __m512i least = _mm512_set1_epi32(static_cast<int32_t>(bound));
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    size_t n = 0, s = 0;
    for (; s + kBlock <= count; s += kBlock) {
        const __mmask16 mine = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(values + s), least);
        if (mine == 0) continue;
        const __m512i index = _mm512_add_epi32(first, _mm512_set1_epi32(static_cast<int32_t>(s)));
        // A whole vector: n <= s, so it ends within `count`.
        _mm512_storeu_si512(found + n, _mm512_maskz_compress_epi32(mine, index));
        n += static_cast<size_t>(std::popcount(static_cast<uint32_t>(mine)));
    }
    for (; s < count; ++s)
        if (values[s] >= bound) found[n++] = static_cast<uint32_t>(s);
    return n;
}
#endif

const Loops& loops() {
    static const Loops found = [] {
#if defined(__x86_64__)
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            if (__builtin_cpu_supports("avx512vpopcntdq"))
                return Loops{add_shared_avx512_popcount, at_least_avx512, rank_avx512};
            return Loops{add_shared_avx512, at_least_avx512, rank_avx512};
        }
        if (__builtin_cpu_supports("avx2")) return Loops{add_shared_avx2, at_least_avx2, rank_avx2};
#endif
        return Loops{add_shared_plain, at_least_plain, rank_plain};
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
    if (candidates <= kRankedAtOnce) {  // almost always
        size_t left = 0;
        for (size_t c = 0; c < candidates; ++c) {
            const Entry entry = candidates_[c];
            if (is_present(entry)) continue;
            candidates_[left] = entry;
            values_[left++] = similarity[entry];
        }
        const size_t padded = (left + 15) / 16 * 16;
        std::fill(values_.begin() + ptrdiff_t(left), values_.begin() + ptrdiff_t(padded), 0U);
        loops().rank(values_.data(), padded, ranks_.data());
        nearest.resize(std::min(left, count));
        for (size_t c = 0; c < left; ++c)
            if (ranks_[c] < count) nearest[ranks_[c]] = {values_[c], candidates_[c]};
        return nearest;
    }
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

float NeighbourWeight::operator()(uint32_t behind, size_t num_experts) {
    constexpr double kSharpness = 0.4;  // 0.3 to 0.6 are alike
    const uint64_t question = uint64_t{behind} << 32 | static_cast<uint32_t>(num_experts);
    Answer& answer = answers_[(behind + num_experts * 61) % answers_.size()];
    if (answer.question != question) {
        const double layers =
            double(behind) / double(PathMemory::kUnit * std::max<size_t>(num_experts, 1));
        answer = {question, static_cast<float>(std::exp(-kSharpness * layers))};
    }
    return answer.weight;
}

bool is_informative(size_t num_requested, size_t num_experts) {
    return num_requested * 16 <= num_experts * 15;
}

}  // namespace moe_offload
