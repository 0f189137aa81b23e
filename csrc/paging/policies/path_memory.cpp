#include "path_memory.h"

#include <algorithm>
#include <cmath>

namespace moe_offload {
namespace {

// Bits set, in plain arithmetic: the loop over passes becomes vector code on
// every machine, which the compiler's popcount does only where there is an
// instruction for it.
inline uint32_t count_bits(uint64_t x) {
    x -= (x >> 1) & 0x5555555555555555U;
    x = (x & 0x3333333333333333U) + ((x >> 2) & 0x3333333333333333U);
    x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fU;
    x += x >> 8;
    x += x >> 16;
    x += x >> 32;
    return static_cast<uint32_t>(x & 0x7fU);
}

}  // namespace

PathMemory::PathMemory(size_t num_layers, size_t experts_per_layer, size_t capacity)
    : num_layers_(num_layers),
      words_((experts_per_layer + 63) / 64),
      capacity_(capacity),
      bits_(num_layers * words_ * capacity, 0),
      similarity_(capacity, 0),
      faded_(capacity, 0),
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
        uint32_t* similarity = similarity_.data();
        for (size_t s = 0; s < capacity_; ++s) similarity[s] += kUnit * count_bits(row[s] & mask);
        row[now_] = mask;
    }
}

std::span<const PathMemory::Neighbour> PathMemory::nearest(size_t count) {
    nearest_.clear();
    if (count == 0) return nearest_;
    uint32_t lowest = 0;  // a pass must exceed it
    const size_t end = known_;
    for (size_t s = 0; s < end; ++s) {
        if (similarity_[s] <= lowest || s == now_) continue;
        const auto age = static_cast<uint32_t>(now_ >= s ? now_ - s : now_ + capacity_ - s);
        const auto place = std::find_if(nearest_.begin(), nearest_.end(), [&](const Neighbour& n) {
            return n.similarity < similarity_[s];
        });
        nearest_.insert(place, {similarity_[s], age});
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
