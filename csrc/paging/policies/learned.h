// Keeps the pages that will be used soonest, by a forecast learned from the running model alone.
//
// For every expert of a layer just routed, a handful of numbers say how likely its next use is:
// exponential averages of its use over 2 to 1 000 visits, how long ago it was used, and how often
// it was used 1, 3 and 8 visits after the most similar passes of the past (PathMemory). A linear
// model of them is fitted, by recursive least squares, to what then happened: kPassDiscount^(d - 1)
// for a page used after d visits, 0 beyond kHorizon. Its prediction is the page's worth. All pages
// of the model share the eleven weights, so a few tokens of any text fit them; there is no training
// phase, no learning rate and nothing to save. A layer's scores change at its own calls only.
//
// Measured on real traces, cold start included, this closes 41 to 72 % of the distance between the
// better LRU and Belady's MIN at a quarter of the pages (docs/policies.md). It sees requests only,
// never a slot, so a replay decides as the live pager did.
#pragma once

#include <array>

#include "path_memory.h"
#include "ranked.h"

namespace moe_offload {

// The forecast, apart from any cache: what every page is worth after the requests so far.
class UseForecast {
  public:
    explicit UseForecast(const PolicySetting& setting);
    void request(const LayerRequest& request);
    // Expected kPassDiscount^(visits until the next use - 1), about 0 .. 1.
    float worth(PageIndex page) const { return worth_[page]; }

    static constexpr size_t kHorizon = 8;  // visits looked ahead
    static constexpr std::array<double, 6> kHalfLives{2, 6, 20, 60, 200, 1000};
    static constexpr std::array<size_t, 3> kAhead{1, 3, kHorizon};
    // constant, averages, recency, continuations
    static constexpr size_t kFeatures = 1 + kHalfLives.size() + 1 + kAhead.size();

  private:
    using Features = std::array<float, kFeatures>;

    void learn(size_t layer);
    void average(size_t layer, std::span<const PageIndex> pages);
    void look_up(size_t layer, size_t num_pages);
    void score(size_t layer);
    void solve();

    const size_t num_layers_, stride_;
    PathMemory memory_;
    uint64_t step_ = ~uint64_t{0};
    std::array<float, kHalfLives.size()> gain_;
    std::vector<float> average_;      // [pages, half lives] of use per visit
    std::vector<uint32_t> unused_;    // [pages] visits since the last use
    std::vector<float> worth_;        // [pages]
    std::vector<float> continued_;    // [ahead, experts] of the layer being routed
    std::vector<float> target_;       // [experts] scratch
    std::vector<PageIndex> experts_;  // of the present request, numbered from 0

    // Features wait here for their outcome: [kHorizon, layers, experts].
    std::vector<Features> waiting_;
    std::vector<uint64_t> waiting_since_;  // [kHorizon, layers] 1 + pass, 0: nothing
    uint64_t pass_ = 0;

    // Normal equations of the least squares, and their solution.
    std::array<std::array<double, kFeatures>, kFeatures> moments_{};
    std::array<double, kFeatures> correlations_{};
    std::array<float, kFeatures> weights_{};
};

class Learned final : public Ranked {
  public:
    explicit Learned(const PolicySetting& setting)
        : Ranked(setting), forecast_(setting), slots_(setting.num_slots) {}
    void request(const LayerRequest& request) override {
        Ranked::request(request);
        forecast_.request(request);
        // A request of more pages than a layer's share of the slots streams; the best of it stay.
        // A smaller one is kept whole: what is worth nothing is the next to leave, and its pages
        // need not wait for one another's slots.
        streams_ = request.pages.size() * static_cast<size_t>(num_layers_) > slots_;
    }
    double worth(PageIndex page) const override { return double(forecast_.worth(page)); }
    bool chooses() const override { return true; }
    bool admits(PageIndex incoming, PageIndex victim) const override {
        return !streams_ || Ranked::admits(incoming, victim);
    }
    bool evicts_hits() const override { return streams_; }

  private:
    UseForecast forecast_;
    const size_t slots_;
    bool streams_ = false;
};

}  // namespace moe_offload
