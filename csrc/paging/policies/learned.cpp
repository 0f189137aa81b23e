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
constexpr size_t kRowAverage = 2;       // of kHalfLives: 20 visits
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

// values[i] += value where bit i is set, for 64 values: by masks, because jumping from bit to bit
// takes longer. (Adding 0 changes nothing.)
void add_where(uint64_t bits, float value, float* values) {
    constexpr size_t kHalf = 32;
    constexpr auto kBit = [] {
        std::array<uint32_t, kHalf> bit{};
        for (size_t i = 0; i < kHalf; ++i) bit[i] = uint32_t{1} << i;
        return bit;
    }();
    const auto pattern = std::bit_cast<uint32_t>(value);
    for (size_t half = 0; half < 64 && bits >> half != 0; half += kHalf) {
        const auto mine = static_cast<uint32_t>(bits >> half);
        for (size_t i = 0; i < kHalf; ++i)
            values[half + i] += std::bit_cast<float>((mine & kBit[i]) != 0 ? pattern : 0U);
    }
}

}  // namespace

UseForecast::UseForecast(const PolicySetting& setting)
    : num_layers_(setting.num_layers()),
      stride_(static_cast<size_t>(setting.experts_per_layer())),
      memory_(num_layers_, stride_, kPassesRemembered),
      average_(setting.num_pages() * kHalfLives.size(), 0.0F),
      unused_(setting.num_pages(), 100.0F),
      worth_(setting.num_pages(), 0.0F),
      row_average_(setting.num_pages(), 0.0F),
      continued_(kAhead.size() * memory_.words() * 64, 0.0F),
      unneeded_(continued_.size()),
      recency_(stride_),
      recent_(kHorizon * num_layers_ * memory_.words(), 0),
      waiting_(kHorizon * setting.num_pages(), Sample{}),
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
        memory_.begin_pass(rows_of(request));
        const size_t words = num_layers_ * memory_.words();
        std::fill_n(recent_.begin() + static_cast<ptrdiff_t>(pass_ % kHorizon * words), words,
                    uint64_t{0});
        if (pass_ % kSolvePeriod == 0) solve();
    }
    if (memory_.num_rows() == 1 && !is_informative(request.pages.size(), stride_)) return;
    experts_.assign(request.pages.begin(), request.pages.end());
    uint64_t* used = &recent_[(pass_ % kHorizon * num_layers_ + layer) * memory_.words()];
    for (PageIndex& expert : experts_) {
        expert -= static_cast<PageIndex>(layer * stride_);
        used[expert / 64] |= uint64_t{1} << (expert % 64);
    }
    memory_.observe(layer, experts_, request.routes);
    learn(layer);
    average(layer, request);
    look_up(layer, request);
    score(layer);
}

// What became of the pages whose features were noted kHorizon passes ago.
void UseForecast::learn(size_t layer) {
    const size_t row = (pass_ % kHorizon) * num_layers_ + layer;
    if (waiting_since_[row] == 0 || waiting_since_[row] + kHorizon != pass_ + 1) return;
    Sample* samples = &waiting_[row * stride_];
    for (size_t expert = 0; expert < stride_; ++expert) samples[expert][kFeatures] = 0.0F;
    double value = std::pow(kPassDiscount, double(kHorizon) - 1.0);
    for (size_t age = 0; age < kHorizon; ++age) {  // from the last visit to the first
        const uint64_t* used =
            &recent_[((pass_ - age) % kHorizon * num_layers_ + layer) * memory_.words()];
        for (size_t word = 0; word < memory_.words(); ++word)
            for (uint64_t bits = used[word]; bits != 0; bits &= bits - 1)
                samples[word * 64 + static_cast<size_t>(std::countr_zero(bits))][kFeatures] =
                    static_cast<float>(value);
        value /= kPassDiscount;
    }
    for (size_t i = 0; i < kFeatures; ++i) {
        Sample products{};
        for (size_t expert = 0; expert < stride_; ++expert) {
            const Sample& x = samples[expert];
            const float mine = x[i];
            for (size_t j = 0; j < products.size(); ++j) products[j] += mine * x[j];
        }
        for (size_t j = 0; j < kFeatures; ++j) moments_[i][j] += double(products[j]);
        correlations_[i] += double(products[kFeatures]);
    }
}

void UseForecast::average(size_t layer, const LayerRequest& request) {
    const auto pages = request.pages;
    constexpr size_t kAverages = kHalfLives.size();
    for (size_t k = 0; k < kAverages; ++k) {
        float* average = &average_[(layer * kAverages + k) * stride_];
        const float gain = gain_[k];
        for (size_t expert = 0; expert < stride_; ++expert)
            average[expert] -= average[expert] * gain;
        for (const PageIndex page : pages) average[page - layer * stride_] += gain;
    }
    float* unused = &unused_[layer * stride_];
    for (size_t expert = 0; expert < stride_; ++expert) unused[expert] += 1.0F;
    for (const PageIndex page : pages) unused_[page] = 0.0F;

    float* of_row = &row_average_[layer * stride_];
    const float gain = gain_[kRowAverage], share = gain / static_cast<float>(memory_.num_rows());
    for (size_t expert = 0; expert < stride_; ++expert) of_row[expert] -= of_row[expert] * gain;
    if (memory_.num_rows() == 1)
        for (const PageIndex expert : experts_) of_row[expert] += share;
    else
        for (const int32_t expert : request.routes)
            if (expert >= 0 && static_cast<size_t>(expert) < stride_) of_row[expert] += share;
}

// How likely each expert is used within 1, 3, 8 visits: by any row, taken to be independent.
void UseForecast::look_up(size_t layer, const LayerRequest& request) {
    const size_t rows = memory_.num_rows();
    if (rows == 1) return continue_row(layer, 0, experts_.size());
    std::fill(unneeded_.begin(), unneeded_.end(), 1.0F);
    for (size_t row = 0; row < rows; ++row) {
        continue_row(layer, row, request.routes.size() / rows);
        for (size_t i = 0; i < unneeded_.size(); ++i)
            unneeded_[i] *= 1.0F - std::min(continued_[i], 1.0F);
    }
    for (size_t i = 0; i < unneeded_.size(); ++i) continued_[i] = 1.0F - unneeded_[i];
}

// How often a row used each expert within 1, 3, 8 visits after the moments most like its present
// one, at which it uses num_experts of the layer.
void UseForecast::continue_row(size_t layer, size_t row, size_t num_experts) {
    std::fill(continued_.begin(), continued_.end(), 0.0F);
    const auto neighbours = memory_.nearest(row, kNeighbours);
    std::array<float, kAhead.size()> total{};
    for (const auto& neighbour : neighbours) {
        const float weight =
            neighbour_weight_(neighbours[0].similarity - neighbour.similarity, num_experts);
        std::array<PathMemory::Entry, kHorizon> after;  // as far as it is known
        size_t last = 0;
        for (auto entry = memory_.next(neighbour.entry); entry != memory_.none() && last < kHorizon;
             entry = memory_.next(entry))
            after[last++] = entry;
        for (size_t word = 0; word < memory_.words(); ++word) {
            uint64_t used = 0;
            size_t ahead = 0;
            for (size_t k = 0; k < kAhead.size(); ++k) {
                for (; ahead < std::min(last, kAhead[k]); ++ahead)
                    used |= memory_.experts(after[ahead], layer, word);
                add_where(used, weight, &continued_[(k * memory_.words() + word) * 64]);
            }
        }
        for (size_t k = 0; k < kAhead.size(); ++k)
            total[k] += weight * static_cast<float>(std::min(last, kAhead[k])) /
                        static_cast<float>(kAhead[k]);
    }
    // Where the memory has nothing to say the 20-visit average speaks.
    const float* average = &row_average_[layer * stride_];
    for (size_t k = 0; k < kAhead.size(); ++k) {
        const float visits = static_cast<float>(std::min<size_t>(kAhead[k], 4));
        const float scale_k = 1.0F / (total[k] + kAverageWeight);
        float* continued = &continued_[k * memory_.words() * 64];
        for (size_t expert = 0; expert < stride_; ++expert) {
            continued[expert] += kAverageWeight * visits * average[expert];
            continued[expert] *= scale_k;
        }
    }
}

void UseForecast::score(size_t layer) {
    constexpr size_t kAverages = kHalfLives.size();
    const float* unused = &unused_[layer * stride_];
    for (size_t expert = 0; expert < stride_; ++expert)
        recency_[expert] = 1.0F / (1.0F + unused[expert]);
    std::array<const float*, kFeatures> feature{};  // [experts] each; the first is 1
    for (size_t k = 0; k < kAverages; ++k)
        feature[1 + k] = &average_[(layer * kAverages + k) * stride_];
    feature[1 + kAverages] = recency_.data();
    for (size_t k = 0; k < kAhead.size(); ++k)
        feature[2 + kAverages + k] = &continued_[k * memory_.words() * 64];
    float* worth = &worth_[layer * stride_];
    std::fill_n(worth, stride_, weights_[0]);
    for (size_t f = 1; f < kFeatures; ++f) {
        const float weight = weights_[f];
        const float* values = feature[f];
        for (size_t expert = 0; expert < stride_; ++expert)
            worth[expert] += weight * values[expert];
    }
    const size_t row = (pass_ % kHorizon) * num_layers_ + layer;
    const bool sampled = (pass_ * num_layers_ + layer) % kSamplePeriod == 0;
    waiting_since_[row] = sampled ? pass_ + 1 : 0;
    if (!sampled) return;
    Sample* samples = &waiting_[row * stride_];
    for (size_t expert = 0; expert < stride_; ++expert) {
        samples[expert][0] = 1.0F;
        for (size_t f = 1; f < kFeatures; ++f) samples[expert][f] = feature[f][expert];
    }
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
