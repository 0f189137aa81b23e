// Least frequently used with decay: a page's score is the sum over its uses of 2^(-age / half
// life), age in touches of the whole pool. Equal to adding 2^(now / half life) at each use, so
// scores never have to be aged; they are rescaled together before they overflow. A page keeps its
// score while it is not resident: what was popular is recognised when it comes back.
#pragma once

#include <set>
#include <utility>

#include "policy.h"

namespace moe_offload {

class Lfu final : public EvictionPolicy {
  public:
    // half_life in touches of the whole pool; of this layer under per-layer; make_policy chooses
    // it.
    Lfu(size_t num_pages, double half_life);
    void insert(PageIndex page) override;
    void touch(PageIndex page) override;
    void erase(PageIndex page) override;
    PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const override;

  private:
    void use(PageIndex page);
    void rescale();

    std::vector<double> score_;
    std::vector<bool> resident_;
    std::set<std::pair<double, PageIndex>> order_;  // resident pages, lowest score first
    double growth_;
    double weight_ = 1.0;
};

}  // namespace moe_offload
