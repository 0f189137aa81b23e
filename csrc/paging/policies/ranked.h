// Base of the policies that are one formula: the resident page with the lowest worth leaves, the
// least recently used among equals. Residents are a dense list that `victim` scans once: O(slots)
// per eviction, nothing per look-up; a formula may depend on the layer that is being computed.
// RankedBy lets the compiler see the formula inside that scan, which is up to three times as fast.
#pragma once

#include "policy.h"

namespace moe_offload {

class Ranked : public EvictionPolicy {
  public:
    explicit Ranked(const PolicySetting& setting)
        : num_layers_(static_cast<int32_t>(setting.num_layers())),
          stride_(static_cast<PageIndex>(setting.experts_per_layer())),
          position_(setting.num_pages(), 0),
          last_use_(setting.num_pages(), 0),
          layer_of_(setting.num_pages()) {
        for (PageIndex page = 0; page < layer_of_.size(); ++page)
            layer_of_[page] = static_cast<int32_t>(page / stride_);
    }

    // Formula: how much a page deserves its slot now. Only the order matters.
    double worth(PageIndex page) const override = 0;

    void request(const LayerRequest& request) override { layer_ = request.layer; }
    void insert(PageIndex page) override {
        position_[page] = static_cast<uint32_t>(residents_.size());
        residents_.push_back(page);
        last_use_[page] = ++clock_;
    }
    void touch(PageIndex page) override { last_use_[page] = ++clock_; }
    void erase(PageIndex page) override {
        const PageIndex last = residents_.back();
        residents_[position_[page]] = last;
        position_[last] = position_[page];
        residents_.pop_back();
    }
    PageIndex victim(PageIndex, const MayEvict& may_evict) const override {
        return lowest_of(*this, may_evict);
    }
    bool admits(PageIndex incoming, PageIndex victim) const override {
        return worth(incoming) > worth(victim);
    }

  protected:
    // `formula`: this object, as the class whose `worth` is to be inlined.
    template <typename Formula>
    PageIndex lowest_of(const Formula& formula, const MayEvict& may_evict) const {
        PageIndex lowest = kNoPage;
        double lowest_worth = 0.0;
        for (const PageIndex page : residents_) {
            const double worth = formula.worth(page);
            if (lowest != kNoPage &&
                (worth > lowest_worth ||
                 (worth == lowest_worth && last_use_[page] > last_use_[lowest])))
                continue;
            if (!may_evict(page)) continue;
            lowest = page;
            lowest_worth = worth;
        }
        return lowest;
    }

    int32_t layer_of(PageIndex page) const { return layer_of_[page]; }
    // Layer calls until the layer of `page` is visited again, 1 .. num_layers.
    int32_t distance(PageIndex page) const {
        const int32_t ahead = layer_of(page) - layer_;
        return ahead > 0 ? ahead : ahead + num_layers_;
    }

    uint64_t last_use(PageIndex page) const { return last_use_[page]; }
    const std::vector<PageIndex>& residents() const { return residents_; }

    const int32_t num_layers_;
    const PageIndex stride_;
    int32_t layer_ = 0;  // of the present request

  private:
    std::vector<PageIndex> residents_;
    std::vector<uint32_t> position_;
    std::vector<uint64_t> last_use_;
    std::vector<int32_t> layer_of_;  // [pages]
    uint64_t clock_ = 0;
};

// Base of a final class `Formula` with a `worth` of its own.
template <typename Formula>
class RankedBy : public Ranked {
  public:
    using Ranked::Ranked;
    PageIndex victim(PageIndex, const MayEvict& may_evict) const final {
        return lowest_of(static_cast<const Formula&>(*this), may_evict);
    }
};

}  // namespace moe_offload
