#include "path_predictor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>

namespace moe_offload {
namespace {

constexpr size_t kPassesRemembered = 4096;
constexpr size_t kNeighbours = 16;
const float kGain = static_cast<float>(1.0 - std::exp2(-1.0 / 20.0));  // half life of 20 visits
constexpr float kAverageWeight = 0.3F;  // of the average, in neighbours as similar as the nearest

size_t largest(const std::vector<int32_t>& counts) {
    if (counts.empty() || *std::min_element(counts.begin(), counts.end()) < 1)
        throw std::invalid_argument("PathPredictor: expected at least one expert in every layer");
    return static_cast<size_t>(*std::max_element(counts.begin(), counts.end()));
}

}  // namespace

PathPredictor::PathPredictor(std::vector<int32_t> num_experts)
    : num_experts_(std::move(num_experts)),
      stride_(largest(num_experts_)),
      memory_(num_experts_.size(), stride_, kPassesRemembered),
      average_(num_experts_.size() * stride_, 0.0F),
      chances_(stride_) {}

void PathPredictor::check_layer(int32_t layer) const {
    if (layer < 0 || static_cast<size_t>(layer) >= num_experts_.size())
        throw std::invalid_argument("PathPredictor: expected a layer in [0, " +
                                    std::to_string(num_experts_.size()) + "), got " +
                                    std::to_string(layer));
}

void PathPredictor::observe(int32_t layer, std::span<const int32_t> experts, int32_t num_tokens,
                            std::span<const int32_t> routes) {
    check_layer(layer);
    const int32_t count = num_experts_[static_cast<size_t>(layer)];
    for (const int32_t expert : experts)
        if (expert < 0 || expert >= count)
            throw std::invalid_argument("PathPredictor: layer " + std::to_string(layer) +
                                        " has experts [0, " + std::to_string(count) + "), got " +
                                        std::to_string(expert));
    if (layer <= last_layer_)
        memory_.begin_pass(rows_of({.layer = layer,
                                    .pages = {},
                                    .weights = {},
                                    .num_tokens = num_tokens,
                                    .routes = routes}));
    last_layer_ = layer;
    const size_t rows = memory_.num_rows();
    // A prompt that uses nearly every expert resembles everything.
    if (rows == 1 && !is_informative(experts.size(), static_cast<size_t>(count))) return;
    experts_.assign(experts.begin(), experts.end());
    experts_per_row_ = rows == 1 ? experts.size() : routes.size() / rows;
    memory_.observe(static_cast<size_t>(layer), experts_, routes);
    float* average = &average_[static_cast<size_t>(layer) * stride_];
    for (size_t expert = 0; expert < stride_; ++expert) average[expert] -= average[expert] * kGain;
    const float share = kGain / static_cast<float>(rows);
    for (const int32_t expert : rows == 1 ? experts : routes)
        if (expert >= 0 && expert < count) average[expert] += share;
}

std::vector<float> PathPredictor::predict(int32_t layer) {
    check_layer(layer);
    const auto size = static_cast<size_t>(num_experts_[static_cast<size_t>(layer)]);
    const size_t rows = std::max<size_t>(memory_.num_rows(), 1);
    std::vector<float> unneeded(size, 1.0F);
    for (size_t row = 0; row < rows; ++row) {
        predict_row(row, static_cast<size_t>(layer));
        if (rows == 1) return {chances_.begin(), chances_.begin() + static_cast<ptrdiff_t>(size)};
        for (size_t expert = 0; expert < size; ++expert)
            unneeded[expert] *= 1.0F - chances_[expert];
    }
    for (float& chance : unneeded) chance = 1.0F - chance;
    return unneeded;
}

void PathPredictor::predict_row(size_t row, size_t layer) {
    std::fill(chances_.begin(), chances_.end(), 0.0F);
    // A layer still to come in this pass: what it used in the similar passes
    // themselves. One that is done: what it used in the passes after them.
    const bool is_next = static_cast<int32_t>(layer) <= last_layer_;
    float total = kAverageWeight;
    const auto neighbours = memory_.nearest(row, kNeighbours);
    for (const auto& neighbour : neighbours) {
        const auto entry = is_next ? memory_.next(neighbour.entry) : neighbour.entry;
        if (entry == memory_.none()) continue;
        const float weight =
            neighbour_weight_(neighbours[0].similarity - neighbour.similarity, experts_per_row_);
        total += weight;
        for (size_t word = 0; word < memory_.words(); ++word)
            for (uint64_t bits = memory_.experts(entry, layer, word); bits != 0; bits &= bits - 1)
                chances_[word * 64 + static_cast<size_t>(std::countr_zero(bits))] += weight;
    }
    for (size_t expert = 0; expert < stride_; ++expert)
        chances_[expert] =
            (chances_[expert] + kAverageWeight * average_[layer * stride_ + expert]) / total;
}

}  // namespace moe_offload
