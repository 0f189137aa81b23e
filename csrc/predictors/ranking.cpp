#include "predictors/ranking.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace moe_offload {

Chances::Chances() {
    for (size_t i = 0; i < kBins; ++i) used_[i] = prior(i);
    total_.fill(kPriorWeight);
}

size_t Chances::bin(float score) {
    return score > 0 ? std::min(static_cast<size_t>(double(score) * kBins), kBins - 1) : 0;
}

double Chances::chance(float score) const { return used_[bin(score)] / total_[bin(score)]; }

void Chances::learn(float score, bool used) {
    total_[bin(score)] += 1;
    used_[bin(score)] += used;
}

void Chances::fade() {
    for (size_t i = 0; i < kBins; ++i) {
        used_[i] = prior(i) + (used_[i] - prior(i)) * kMemory;
        total_[i] = kPriorWeight + (total_[i] - kPriorWeight) * kMemory;
    }
}

void FoundPerLayer::add(size_t layer, const Found& found) {
    Found& sum = layers_.at(layer);
    sum.tokens += found.tokens;
    sum.near += found.near;
    sum.deep += found.deep;
}

Ranking::Ranking(std::vector<float> scores, size_t rows)
    : rows_(rows), experts_(rows ? scores.size() / rows : 0), scores_(std::move(scores)) {
    if (rows == 1) {
        chance_ = scores_;
    } else {
        chance_.assign(experts_, 1.0F);
        for (size_t row = 0; row < rows; ++row)
            for (size_t e = 0; e < experts_; ++e) chance_[e] *= 1.0F - scores_[row * experts_ + e];
        for (float& chance : chance_) chance = 1.0F - chance;
    }
    order_.resize(experts_);
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
        return chance_[static_cast<size_t>(a)] > chance_[static_cast<size_t>(b)];
    });
}

std::vector<int32_t> Ranking::likely(const Chances& chances, double threshold, size_t count) const {
    std::vector<int32_t> chosen;
    for (const int32_t expert : order().first(std::min(count, experts_)))
        if (chances.chance(chance_[static_cast<size_t>(expert)]) >= threshold)
            chosen.push_back(expert);
    return chosen;
}

Found Ranking::found(std::span<const int64_t> used, size_t near, size_t deep) const {
    const size_t top_k = rows_ ? used.size() / rows_ : 0;
    Found found;
    for (size_t row = 0; row < rows_; ++row) {
        const float* score = &scores_[row * experts_];
        bool counts = false;
        for (const int64_t id : used.subspan(row * top_k, top_k)) {
            if (id < 0 || static_cast<size_t>(id) >= experts_) continue;
            counts = true;
            const auto expert = static_cast<size_t>(id);
            size_t better = 0;
            for (size_t e = 0; e < experts_; ++e) better += score[e] > score[expert];
            for (size_t e = 0; e < expert; ++e) better += score[e] == score[expert];
            found.near += better < near;
            found.deep += better < deep;
        }
        found.tokens += counts;
    }
    return found;
}

void Ranking::teach(Chances& chances, std::span<const int32_t> absent,
                    std::span<const int64_t> used) const {
    for (const int32_t expert : absent)
        chances.learn(chance_[static_cast<size_t>(expert)],
                      std::find(used.begin(), used.end(), expert) != used.end());
}

}  // namespace moe_offload
