// Belady's MIN: the page used farthest in the future leaves. Needs the future, so replay only; no
// policy without bypass can miss less than MIN, and none at all less than MIN with bypass, where a
// missed page may pass through instead of displacing one that is needed earlier.
#pragma once

#include "ranked.h"

namespace moe_offload {

class Belady final : public Ranked {
  public:
    Belady(const PolicySetting& setting, bool bypass)
        : Ranked(setting),
          bypass_(bypass),
          future_(setting.next_request),
          next_(setting.num_pages(), kNever) {}
    void request(const LayerRequest& request) override {
        Ranked::request(request);
        for (const PageIndex page : request.pages) next_[page] = double(future_.at(cursor_++));
    }
    double worth(PageIndex page) const override { return -next_[page]; }
    bool chooses() const override { return true; }
    bool admits(PageIndex incoming, PageIndex victim) const override {
        return !bypass_ || Ranked::admits(incoming, victim);
    }
    bool evicts_hits() const override { return bypass_; }

  private:
    static constexpr double kNever = 1e18;
    const bool bypass_;
    const std::vector<int64_t> future_;
    size_t cursor_ = 0;
    std::vector<double> next_;
};

}  // namespace moe_offload
