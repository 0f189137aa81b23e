// What the prefetch driver does with the scores of a prediction, at every layer of every step:
// ranks the experts, asks which are worth fetching, and when the layer was routed counts what was
// found. A layer leaves some microseconds for it, which is a handful of numpy calls or all of this.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace moe_offload {

// What a score is worth: the chance that an absent page will be used, learned live.
//
// Scores are not chances, and a page that is absent is less likely to be used than a resident one
// of the same score: popular experts are the resident ones. So for each moment of prediction the
// range of scores is cut into bins, and each bin counts how often its absent pages were then used.
// The score itself counts as a few observations, and old counts fade, so what was given up is tried
// again after a while.
class Chances {
  public:
    Chances();
    // That an absent page with this score is used, in [0, 1].
    double chance(float score) const;
    // An absent page with this score was, or was not, used.
    void learn(float score, bool used);
    // Forget a little; once per model call.
    void fade();

  private:
    static constexpr size_t kBins = 20;          // of scores in [0, 1]
    static constexpr double kPriorWeight = 4.0;  // observations that the score itself counts as
    static constexpr double kMemory = 0.998;     // half is forgotten after 350 calls
    static size_t bin(float score);
    static double prior(size_t bin) { return (double(bin) + 0.5) / kBins * kPriorWeight; }

    std::array<double, kBins> used_, total_;
};

// How many tokens were predicted, and how many of the experts they then used were among the `near`
// and the `deep` best of their row.
struct Found {
    int64_t tokens = 0, near = 0, deep = 0;
};

// Found, summed over predictions of one moment, for each layer.
class FoundPerLayer {
  public:
    explicit FoundPerLayer(size_t num_layers) : layers_(num_layers) {}
    // Throws std::out_of_range for a layer that there is not.
    void add(size_t layer, const Found& found);
    std::span<const Found> layers() const { return layers_; }

  private:
    std::vector<Found> layers_;
};

// One prediction, kept until its layer is routed.
class Ranking {
  public:
    // scores: [rows, experts], one row per token.
    Ranking(std::vector<float> scores, size_t rows);

    size_t rows() const { return rows_; }
    // [experts] the chance that any of the tokens uses an expert: 1 - prod(1 - score).
    std::span<const float> chance() const { return chance_; }
    // [experts] by it, best first, among equals the lower one.
    std::span<const int32_t> order() const { return order_; }

    // Of the `count` best, those that chances give at least `threshold`.
    std::vector<int32_t> likely(const Chances& chances, double threshold, size_t count) const;
    // used: [rows, top_k]. Rows of ids that are no experts (padding) do not count. In a row equal
    // scores go to the lower expert. Cost: rows x top_k x experts comparisons.
    Found found(std::span<const int64_t> used, size_t near, size_t deep) const;
    // The absent experts were, or were not, among those used.
    void teach(Chances& chances, std::span<const int32_t> absent,
               std::span<const int64_t> used) const;

  private:
    size_t rows_, experts_;
    std::vector<float> scores_, chance_;
    std::vector<int32_t> order_;
};

}  // namespace moe_offload
