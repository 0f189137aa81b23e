// Belady's MIN: the page used farthest in the future leaves. Needs the future, so replay only.
//
// Without bypass every missed page takes a slot; no policy that does so misses less. With bypass a
// missed page may pass through instead of displacing one that is needed earlier, and no policy at
// all misses less: the line nobody beats. To be that bound it may even keep none of a request's
// misses, as if there were a slot outside the pool to pass through; a pager needs one of its own.
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
    size_t smallest_share(size_t num_misses) const override {
        return bypass_ ? 0 : Ranked::smallest_share(num_misses);
    }

  private:
    static constexpr double kNever = 1e18;
    const bool bypass_;
    const std::vector<int64_t> future_;
    size_t cursor_ = 0;
    std::vector<double> next_;
};

}  // namespace moe_offload
