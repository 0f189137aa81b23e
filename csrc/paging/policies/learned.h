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
// On real traces, cold start included, it closes 40 to 71 % of the distance between the better LRU
// and Belady's MIN at a quarter of the pages, one token at a time (docs/study.md, replay.json).
// It sees requests only, never a slot, so a replay decides as the live pager did.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>

#include "path_memory.h"
#include "ranked.h"

namespace moe_offload {

// The forecast, apart from any cache: what every page is worth after the
// requests so far.
class UseForecast {
  public:
    explicit UseForecast(const PolicySetting& setting);
    void request(const LayerRequest& request);
    // Expected kPassDiscount^(visits until the next use - 1), about 0 .. 1.
    float worth(PageIndex page) const { return worth_[page]; }

    static constexpr size_t kHorizon = 8;         // visits looked ahead
    static constexpr double kPassDiscount = 0.8;  // per visit that a use lies farther away
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

// What `learned` and `auto` have in common as caches: a prefetched page is
// taken in whatever its worth, for somebody predicted its use more closely than
// we can, and stays until its layer is routed.
class KeepsPrefetched : public Ranked {
  public:
    explicit KeepsPrefetched(const PolicySetting& setting)
        : Ranked(setting), asked_(setting.num_pages(), 0), ahead_(setting.num_pages(), false) {}
    void request(const LayerRequest& request) override {
        Ranked::request(request);
        ++serial_;
        for (const PageIndex page : request.pages) asked_[page] = serial_;
        const PageIndex first = static_cast<PageIndex>(request.layer) * stride_;
        std::fill_n(ahead_.begin() + first, stride_, false);
    }
    void insert(PageIndex page) override {
        Ranked::insert(page);
        ahead_[page] = asked_[page] != serial_;
    }
    void erase(PageIndex page) override {
        Ranked::erase(page);
        ahead_[page] = false;
    }
    double worth(PageIndex page) const final {
        return (ahead_[page] ? 1e9 : 0.0) + demand_worth(page);
    }
    bool chooses() const override { return true; }
    bool admits(PageIndex incoming, PageIndex victim) const final {
        if (ahead_[victim]) return false;
        return asked_[incoming] != serial_ || demand_admits(incoming, victim);
    }

  protected:
    virtual double demand_worth(PageIndex page) const = 0;
    virtual bool demand_admits(PageIndex incoming, PageIndex victim) const = 0;

  private:
    uint64_t serial_ = 0;
    std::vector<uint64_t> asked_;  // [pages] serial of the last request that named it
    std::vector<bool> ahead_;      // [pages] resident by prefetch, its layer not routed since
};

class Learned final : public KeepsPrefetched {
  public:
    explicit Learned(const PolicySetting& setting)
        : KeepsPrefetched(setting), forecast_(setting), slots_(setting.num_slots) {
        for (int32_t ahead = 0; ahead <= num_layers_; ++ahead)
            discount_.push_back(
                std::pow(UseForecast::kPassDiscount, double(ahead) / double(num_layers_)));
    }
    void request(const LayerRequest& request) override {
        KeepsPrefetched::request(request);
        forecast_.request(request);
        // A request of more pages than a layer's share of the slots streams; the
        // best of it stay. A smaller one is kept whole: what is worth nothing is
        // the next to leave, and its pages need not wait for one another's slots.
        streams_ = request.pages.size() * static_cast<size_t>(num_layers_) > slots_;
    }
    bool evicts_hits() const override { return streams_; }
    // Expected discount of the next use, whatever brought the page here: that of the visit, times
    // the part of a pass until it. A page of the layer just computed is a whole pass away. Where
    // every layer uses most of what it has (large batches) this keeps the arriving pages from
    // pushing out what is about to be needed; without it `learned` missed more than an LRU there.
    double forecast(PageIndex page) const {
        return std::max(double(forecast_.worth(page)), kLeastWorth) *
               discount_[static_cast<size_t>(distance(page))];
    }

  private:
    double demand_worth(PageIndex page) const override { return forecast(page); }
    bool demand_admits(PageIndex incoming, PageIndex victim) const override {
        return !streams_ || forecast(incoming) > forecast(victim);
    }

    static constexpr double kLeastWorth = 1e-4;  // the linear model can say less than nothing
    UseForecast forecast_;
    const size_t slots_;
    std::vector<double> discount_;  // [num_layers + 1] by distance
    bool streams_ = false;
};

}  // namespace moe_offload
