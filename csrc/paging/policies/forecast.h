// Belady's rule on expectations: the page whose next use is expected farthest away leaves, and a
// missed page that is expected later than every resident one passes through (SeqMoE's
// probabilistic Belady, arXiv 2609.12978; ExpertFlow's PLEC, arXiv 2410.17954).
//
// A page of layer l can be used at visits of l only: the next one is `distance` layer calls away,
// the following ones a whole pass further each. With probabilities p0, p1, ... handed in for the
// first visits and the page's own recent rate of use afterwards, its worth is the expected discount
// of its next use,
//
//     g^(distance / num_layers) * (p0 + (1 - p0) g p1 + (1 - p0)(1 - p1) g^2 p2 + ...)
//
// with g the discount per pass. (The expected distance itself would be ruled by its tail: a page
// needed now and never again would count as far away.) So slots go to the layers with predicted
// demand, pages of layers that are done are reused first within the pass, and a page predicted in
// vain is worth little as soon as its layer was routed. Without predictions the rate alone decides,
// an LFU with layer distance and bypass.
#pragma once

#include "ranked.h"

namespace moe_offload {

class Forecast final : public RankedBy<Forecast> {
  public:
    // horizon: visits predictions may reach ahead, a power of two. exclusive: experts that a
    // prediction of a visit does not name have probability 0 there (PLEC takes the predictor at its
    // word), else their rate of use.
    Forecast(const PolicySetting& setting, int32_t horizon, bool exclusive);
    void request(const LayerRequest& request) override;
    void predict(const Prediction& prediction) override;
    double worth(PageIndex page) const override;
    bool chooses() const override { return true; }
    bool evicts_hits() const override { return true; }
    bool uses_predictions() const override { return true; }

  private:
    float decayed_rate(PageIndex page) const;
    double value(PageIndex page) const;
    size_t column(uint64_t visit) const { return visit & (horizon_ - 1); }
    bool predicted(size_t layer, uint64_t visit) const {
        return predicted_[layer * horizon_ + column(visit)] == visit + 1;
    }

    const size_t horizon_;
    const bool exclusive_;
    std::vector<float> rate_;          // [pages] use per visit, exponential average
    std::vector<uint64_t> updated_;    // [pages] visit of that average
    std::vector<uint64_t> visits_;     // [layers] so far
    std::vector<uint64_t> predicted_;  // [layers * horizon] 1 + visit the entries are for
    std::vector<double> discount_;     // [num_layers + 1] by distance
    std::vector<float> probability_;   // [pages * horizon], < 0: not named
    // Worths, discounted to the next visit of their layer, change at its requests and predictions
    // only; a victim is sought among the pages of all layers.
    std::vector<uint64_t> version_;            // [layers] of what is known of a layer, from 1
    mutable std::vector<uint64_t> valued_at_;  // [pages] version of value_
    mutable std::vector<double> value_;        // [pages]
};

}  // namespace moe_offload
