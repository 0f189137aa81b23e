// Keeps the pages that will be used soonest, by a forecast learned from the running model alone.
//
// For every expert of a layer just routed, a handful of numbers say how likely its next use is:
// exponential averages of its use over 2 to 1 000 visits, how long ago it was used, and how likely
// it is used in 1, 3 and 8 visits by what followed the most similar passes of the past
// (PathMemory). Of a batch each sequence has its own past, and an expert is used if any of them
// does. A linear model of them is fitted, by recursive least squares, to what then happened:
// kPassDiscount^(d - 1) for a page used after d visits, 0 beyond kHorizon. Its prediction is the
// page's worth. All pages of the model share the eleven weights, so a few tokens of any text fit
// them; there is no training phase, no learning rate and nothing to save. A layer's scores change
// at its own calls only.
//
// On real traces, cold start included, it closes 40 to 71 % of the distance between the better LRU
// and Belady's MIN at a quarter of the pages, one token at a time (docs/study.md, replay.json).
// It sees requests only, never a slot, so a replay decides as the live pager did.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
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
    // Of one expert, its target behind them, padded to whole vectors.
    using Sample = std::array<float, (kFeatures + 1 + 3) / 4 * 4>;

    void learn(size_t layer);
    void average(size_t layer, const LayerRequest& request);
    void look_up(size_t layer, const LayerRequest& request);
    void continue_row(size_t layer, size_t row, size_t num_experts);
    void score(size_t layer);
    void solve();

    const size_t num_layers_, stride_;
    PathMemory memory_;
    NeighbourWeight neighbour_weight_;
    uint64_t step_ = ~uint64_t{0};
    std::array<float, kHalfLives.size()> gain_;
    // Arrays over the experts of a layer lie side by side, so that loops over them are vector code.
    std::vector<float> average_;      // [layers, half lives, experts] of use per visit
    std::vector<float> unused_;       // [pages] visits since the last use
    std::vector<float> worth_;        // [pages]
    std::vector<float> row_average_;  // [pages] of use per visit and row, of the last 20 visits
    std::vector<float> continued_;    // [ahead, 64 x words] experts of the layer being routed
    std::vector<float> unneeded_;     // [ahead, 64 x words] scratch
    std::vector<float> recency_;      // [experts] scratch
    std::vector<PageIndex> experts_;  // of the present request, numbered from 0

    std::vector<uint64_t> recent_;  // [kHorizon, layers, words] experts used in the last passes
    // Features wait here for their outcome: [kHorizon, layers, experts].
    std::vector<Sample> waiting_;
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

    bool is_ahead(PageIndex page) const { return ahead_[page] != 0; }

  private:
    uint64_t serial_ = 0;
    std::vector<uint64_t> asked_;  // [pages] serial of the last request that named it
    std::vector<uint8_t> ahead_;   // [pages] resident by prefetch, its layer not routed since
};

class Learned final : public KeepsPrefetched {
  public:
    explicit Learned(const PolicySetting& setting)
        : KeepsPrefetched(setting),
          forecast_(setting),
          slots_(setting.num_slots),
          words_((stride_ + 63) / 64),
          resident_(setting.num_layers() * words_, 0),
          lowest_(setting.num_layers(), kNoPage),
          known_(setting.num_layers(), true) {
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
        known_[static_cast<size_t>(request.layer)] = false;
    }
    void insert(PageIndex page) override {
        KeepsPrefetched::insert(page);
        residents_of(page) |= bit_of(page);
        known_[layer_index(page)] = false;
    }
    void touch(PageIndex page) override {
        KeepsPrefetched::touch(page);
        if (lowest_[layer_index(page)] == page) known_[layer_index(page)] = false;
    }
    void erase(PageIndex page) override {
        KeepsPrefetched::erase(page);
        residents_of(page) &= ~bit_of(page);
        if (lowest_[layer_index(page)] == page) known_[layer_index(page)] = false;
    }
    // As Ranked's, by layers: within one the order changes at its own calls only, so each keeps its
    // lowest page, and only those few are compared.
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override {
        PageIndex lowest = kNoPage;
        double lowest_worth = 0.0;
        for (size_t layer = 0; layer < lowest_.size(); ++layer) {
            if (!known_[layer]) {
                lowest_[layer] = lowest_of(layer, nullptr);
                known_[layer] = true;
            }
            PageIndex page = lowest_[layer];
            if (page == kNoPage || !is_lower(page, lowest, lowest_worth)) continue;
            if (!may_evict(page)) page = lowest_of(layer, &may_evict);
            if (page == kNoPage || !is_lower(page, lowest, lowest_worth)) continue;
            lowest = page;
            lowest_worth = forecast(page);
        }
        // Prefetched pages are worth more than all others.
        return lowest != kNoPage ? lowest : Ranked::victim(incoming, may_evict);
    }
    bool evicts_hits() const override { return streams_; }
    bool uses_routes() const override { return true; }
    // Expected discount of the next use, whatever brought the page here: that of the visit, times
    // the part of a pass until it. A page of the layer just computed is a whole pass away. Where
    // every layer uses most of what it has (large batches) this keeps the arriving pages from
    // pushing out what is about to be needed; without it `learned` missed more than an LRU there.
    double forecast(PageIndex page) const {
        const int32_t ahead = layer_of(page) - layer_;
        return std::max(double(forecast_.worth(page)), kLeastWorth) *
               discount_[static_cast<size_t>(ahead > 0 ? ahead : ahead + num_layers_)];
    }

  private:
    uint64_t& residents_of(PageIndex page) {
        return resident_[layer_index(page) * words_ + page % stride_ / 64];
    }
    uint64_t bit_of(PageIndex page) const { return uint64_t{1} << (page % stride_ % 64); }
    size_t layer_index(PageIndex page) const { return static_cast<size_t>(layer_of(page)); }
    double demand_worth(PageIndex page) const override { return forecast(page); }
    bool demand_admits(PageIndex incoming, PageIndex victim) const override {
        return !streams_ || forecast(incoming) > forecast(victim);
    }
    bool is_lower(PageIndex page, PageIndex than, double worth) const {
        if (than == kNoPage) return true;
        const double mine = forecast(page);
        return mine < worth || (mine == worth && last_use(page) < last_use(than));
    }
    // Of a layer's pages that no prefetch brought; null: whether they may leave or not.
    PageIndex lowest_of(size_t layer, const MayEvict* may_evict) const {
        PageIndex lowest = kNoPage;
        float lowest_worth = 0.0F;
        const auto first = static_cast<PageIndex>(layer) * stride_;
        for (size_t word = 0; word < words_; ++word)
            for (uint64_t bits = resident_[layer * words_ + word]; bits != 0; bits &= bits - 1) {
                const auto page =
                    static_cast<PageIndex>(first + word * 64 + std::countr_zero(bits));
                if (is_ahead(page)) continue;
                const float worth = std::max(forecast_.worth(page), float(kLeastWorth));
                if (lowest != kNoPage &&
                    (worth > lowest_worth ||
                     (worth == lowest_worth && last_use(page) > last_use(lowest))))
                    continue;
                if (may_evict && !(*may_evict)(page)) continue;
                lowest = page;
                lowest_worth = worth;
            }
        return lowest;
    }

    static constexpr double kLeastWorth = 1e-4;  // the linear model can say less than nothing
    UseForecast forecast_;
    const size_t slots_, words_;
    std::vector<double> discount_;           // [num_layers + 1] by distance
    std::vector<uint64_t> resident_;         // [layers, words] a bit for each expert
    mutable std::vector<PageIndex> lowest_;  // [layers], where known_
    mutable std::vector<uint8_t> known_;     // [layers]
    bool streams_ = false;
};

}  // namespace moe_offload
