#include "learned.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace moe_offload {
namespace {

// Chosen on parts of the real traces. 4 096 passes against 1 024 are worth up to 6 points of the
// gap that the policy closes, against 8 192 they cost under 1; sixteen neighbours and a discount of
// 0.8 are within 1.5 of their tried neighbours (docs/policies.md), as are
// averages weighted 0.03 to 1 and every call learned from. The last three were not varied.
constexpr size_t kPassesRemembered = 4096;
constexpr size_t kNeighbours = 16;
constexpr double kPassDiscount = UseForecast::kPassDiscount;
constexpr float kAverageWeight = 0.3F;  // of the 20-visit average, in neighbours
constexpr uint64_t kSamplePeriod = 5;   // one layer call in five is learned from
constexpr uint64_t kSolvePeriod = 4;    // passes
constexpr double kForget = 0.998;       // per solve: half forgotten after 1 400 passes
constexpr double kPriorStrength = 10.0;

// Before anything is known: an even mixture of the averages and of the
// continuations.
constexpr float prior(size_t feature) {
    constexpr size_t kAverages = UseForecast::kHalfLives.size();
    if (feature == 0 || feature == kAverages + 1) return 0.0F;
    return feature <= kAverages ? 0.5F / kAverages : 0.3F;
}

}  // namespace

UseForecast::UseForecast(const PolicySetting& setting)
    : num_layers_(setting.num_layers()),
      stride_(static_cast<size_t>(setting.experts_per_layer())),
      memory_(num_layers_, stride_, kPassesRemembered),
      average_(setting.num_pages() * kHalfLives.size(), 0.0F),
      unused_(setting.num_pages(), 100),
      worth_(setting.num_pages(), 0.0F),
      continued_(kAhead.size() * stride_, 0.0F),
      target_(stride_),
      waiting_(kHorizon * setting.num_pages()),
      waiting_since_(kHorizon * num_layers_, 0) {
    for (size_t k = 0; k < kHalfLives.size(); ++k)
        gain_[k] = static_cast<float>(1.0 - std::exp2(-1.0 / kHalfLives[k]));
    for (size_t f = 0; f < kFeatures; ++f) weights_[f] = prior(f);
}

void UseForecast::request(const LayerRequest& request) {
    const auto layer = static_cast<size_t>(request.layer);
    if (request.step != step_) {
        step_ = request.step;
        ++pass_;
        memory_.begin_pass();
        if (pass_ % kSolvePeriod == 0) solve();
    }
    if (!is_informative(request.pages.size(), stride_)) return;
    experts_.assign(request.pages.begin(), request.pages.end());
    for (PageIndex& expert : experts_) expert -= static_cast<PageIndex>(layer * stride_);
    memory_.observe(layer, experts_);
    learn(layer);
    average(layer, request.pages);
    look_up(layer, experts_.size());
    score(layer);
}

// What became of the pages whose features were noted kHorizon passes ago.
void UseForecast::learn(size_t layer) {
    const size_t row = (pass_ % kHorizon) * num_layers_ + layer;
    if (waiting_since_[row] == 0 || waiting_since_[row] + kHorizon != pass_ + 1) return;
    std::fill(target_.begin(), target_.end(), 0.0F);
    double value = std::pow(kPassDiscount, double(kHorizon) - 1.0);
    for (size_t age = 0; age < kHorizon; ++age) {  // from the last visit to the first
        for (size_t word = 0; word < memory_.words(); ++word)
            for (uint64_t bits = memory_.experts(age, layer, word); bits != 0; bits &= bits - 1)
                target_[word * 64 + static_cast<size_t>(std::countr_zero(bits))] =
                    static_cast<float>(value);
        value /= kPassDiscount;
    }
    const Features* features = &waiting_[row * stride_];
    for (size_t i = 0; i < kFeatures; ++i) {
        std::array<float, kFeatures> products{};
        float correlation = 0.0F;
        for (size_t expert = 0; expert < stride_; ++expert) {
            const float x = features[expert][i];
            for (size_t j = 0; j < kFeatures; ++j) products[j] += x * features[expert][j];
            correlation += x * target_[expert];
        }
        for (size_t j = 0; j < kFeatures; ++j) moments_[i][j] += double(products[j]);
        correlations_[i] += double(correlation);
    }
}

void UseForecast::average(size_t layer, std::span<const PageIndex> pages) {
    constexpr size_t kAverages = kHalfLives.size();
    float* average = &average_[layer * stride_ * kAverages];
    for (size_t expert = 0; expert < stride_; ++expert, average += kAverages)
        for (size_t k = 0; k < kAverages; ++k) average[k] -= average[k] * gain_[k];
    for (size_t page = layer * stride_; page < (layer + 1) * stride_; ++page) ++unused_[page];
    for (const PageIndex page : pages) {
        unused_[page] = 0;
        for (size_t k = 0; k < kAverages; ++k) average_[page * kAverages + k] += gain_[k];
    }
}

// How often each expert was used within 1, 3, 8 visits after the passes most
// like this one.
void UseForecast::look_up(size_t layer, size_t num_pages) {
    std::fill(continued_.begin(), continued_.end(), 0.0F);
    const auto neighbours = memory_.nearest(kNeighbours);
    std::array<float, kAhead.size()> total{};
    for (const auto& neighbour : neighbours) {
        const float weight =
            neighbour_weight(neighbours[0].similarity - neighbour.similarity, num_pages);
        const size_t last = std::min<size_t>(kHorizon, neighbour.age);
        for (size_t word = 0; word < memory_.words(); ++word) {
            uint64_t seen = 0;
            for (size_t ahead = 1; ahead <= last; ++ahead) {
                uint64_t first =
                    memory_.experts(neighbour.age - ahead, layer, word) & ~seen;  // first uses
                seen |= first;
                for (; first != 0; first &= first - 1) {
                    const size_t expert = word * 64 + static_cast<size_t>(std::countr_zero(first));
                    for (size_t k = 0; k < kAhead.size(); ++k)
                        if (ahead <= kAhead[k]) continued_[k * stride_ + expert] += weight;
                }
            }
        }
        for (size_t k = 0; k < kAhead.size(); ++k)
            total[k] += weight * static_cast<float>(std::min(last, kAhead[k])) /
                        static_cast<float>(kAhead[k]);
    }
    // Where the memory has nothing to say the 20-visit average speaks.
    const float* average = &average_[layer * stride_ * kHalfLives.size()];
    for (size_t k = 0; k < kAhead.size(); ++k) {
        const float visits = static_cast<float>(std::min<size_t>(kAhead[k], 4));
        const float scale_k = 1.0F / (total[k] + kAverageWeight);
        for (size_t expert = 0; expert < stride_; ++expert) {
            float& continued = continued_[k * stride_ + expert];
            continued += kAverageWeight * visits * average[expert * kHalfLives.size() + 2];
            continued *= scale_k;
        }
    }
}

void UseForecast::score(size_t layer) {
    constexpr size_t kAverages = kHalfLives.size();
    const size_t row = (pass_ % kHorizon) * num_layers_ + layer;
    Features* features = &waiting_[row * stride_];
    for (size_t expert = 0; expert < stride_; ++expert) {
        const size_t page = layer * stride_ + expert;
        Features& x = features[expert];
        x[0] = 1.0F;
        for (size_t k = 0; k < kAverages; ++k) x[1 + k] = average_[page * kAverages + k];
        x[1 + kAverages] = 1.0F / static_cast<float>(1 + unused_[page]);
        for (size_t k = 0; k < kAhead.size(); ++k)
            x[2 + kAverages + k] = continued_[k * stride_ + expert];
        float worth = 0.0F;
        for (size_t f = 0; f < kFeatures; ++f) worth += weights_[f] * x[f];
        worth_[page] = worth;
    }
    const bool sampled = (pass_ * num_layers_ + layer) % kSamplePeriod == 0;
    waiting_since_[row] = sampled ? pass_ + 1 : 0;
}

// (moments + s I) weights = correlations + s prior, by elimination: the matrix
// is positive definite.
void UseForecast::solve() {
    std::array<std::array<double, kFeatures + 1>, kFeatures> system;
    for (size_t i = 0; i < kFeatures; ++i) {
        std::copy(moments_[i].begin(), moments_[i].end(), system[i].begin());
        system[i][i] += kPriorStrength;
        system[i][kFeatures] = correlations_[i] + kPriorStrength * double(prior(i));
    }
    for (size_t i = 0; i < kFeatures; ++i)
        for (size_t j = i + 1; j < kFeatures; ++j) {
            const double factor = system[j][i] / system[i][i];
            for (size_t k = i; k <= kFeatures; ++k) system[j][k] -= factor * system[i][k];
        }
    for (size_t i = kFeatures; i-- > 0;) {
        double sum = system[i][kFeatures];
        for (size_t k = i + 1; k < kFeatures; ++k) sum -= system[i][k] * double(weights_[k]);
        weights_[i] = static_cast<float>(sum / system[i][i]);
    }
    for (auto& row : moments_)
        for (double& moment : row) moment *= kForget;
    for (double& correlation : correlations_) correlation *= kForget;
}

}  // namespace moe_offload
