// Four published formulas, as the papers give them; see docs/policies.md for what they miss.
#pragma once

#include <algorithm>
#include <cmath>

#include "ranked.h"

namespace moe_offload {

// SpecMD's Least-Stale (arXiv 2602.03921): what this pass is done with leaves before what still
// lies ahead of it, least recently used first in each group.
class LeastStale final : public RankedBy<LeastStale> {
  public:
    using RankedBy::RankedBy;
    double worth(PageIndex page) const override { return layer_of(page) > layer_ ? 1.0 : 0.0; }
};

// The ring of SE-MoE (arXiv 2205.10034): layers leave in the order they were computed, whatever
// they were used for, to make room for those whose turn comes next.
class LayerRing final : public RankedBy<LayerRing> {
  public:
    using RankedBy::RankedBy;
    double worth(PageIndex page) const override { return -double(distance(page)); }
};

// MoE-Infinity (arXiv 2401.14361): share of its layer's activations in the present sequences, times
// (1 - layer / layers), because prefetching has more time for deep layers. Counts start anew with
// every batch of prompts; eps ranks what the sequence has not used by layer.
class ActivationRatio final : public RankedBy<ActivationRatio> {
  public:
    explicit ActivationRatio(const PolicySetting& setting)
        : RankedBy(setting), uses_(setting.num_pages(), 0.0), total_(setting.num_layers(), 0.0) {
        for (int32_t layer = 0; layer < num_layers_; ++layer)
            urgency_.push_back(1.0 - double(layer) / num_layers_);
    }
    void sequence_begins() override {
        std::fill(uses_.begin(), uses_.end(), 0.0);
        std::fill(total_.begin(), total_.end(), 0.0);
    }
    void request(const LayerRequest& request) override {
        Ranked::request(request);
        for (const PageIndex page : request.pages) uses_[page] += 1.0;
        total_[static_cast<size_t>(request.layer)] += static_cast<double>(request.pages.size());
    }
    double worth(PageIndex page) const override {
        const auto layer = static_cast<size_t>(layer_of(page));
        return (uses_[page] / std::max(1.0, total_[layer]) + kEps) * urgency_[layer];
    }

  private:
    static constexpr double kEps = 1e-4;
    std::vector<double> uses_, total_;
    std::vector<double> urgency_;  // [layers]
};

// HybriMoE's score-aware cache (arXiv 2504.05897): an exponential average of the router's scores,
// S <- alpha * score + (1 - alpha) * S at every visit of the layer. The paper also feeds in scores
// of experts that were almost chosen; the pager sees the chosen ones only. Without weights each
// use counts 1 / experts used.
class Score final : public RankedBy<Score> {
  public:
    explicit Score(const PolicySetting& setting)
        : RankedBy(setting),
          score_(setting.num_pages(), 0.0),
          updated_(setting.num_pages(), 0),
          visits_(setting.num_layers(), 0) {
        for (size_t n = 0; n < kPowers; ++n) decay_[n] = std::pow(1.0 - kAlpha, double(n));
    }
    bool uses_weights() const override { return true; }
    void request(const LayerRequest& request) override {
        Ranked::request(request);
        const uint64_t visit = ++visits_[static_cast<size_t>(request.layer)];
        const double tokens = std::max(1, request.num_tokens);
        for (size_t i = 0; i < request.pages.size(); ++i) {
            const PageIndex page = request.pages[i];
            const double weight = request.weights.empty() ? 1.0 / double(request.pages.size())
                                                          : double(request.weights[i]) / tokens;
            score_[page] = worth(page) + kAlpha * weight;  // worth decays to this visit
            updated_[page] = visit;
        }
    }
    double worth(PageIndex page) const override {
        const uint64_t age = visits_[static_cast<size_t>(layer_of(page))] - updated_[page];
        return age < kPowers ? score_[page] * decay_[age] : 0.0;
    }

  private:
    static constexpr double kAlpha = 0.05;  // chosen on the three real traces, docs/policies.md
    static constexpr size_t kPowers = 1024;
    double decay_[kPowers];
    std::vector<double> score_;
    std::vector<uint64_t> updated_, visits_;
};

}  // namespace moe_offload
