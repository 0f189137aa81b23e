#include "leader.h"

#include <cmath>

namespace moe_offload {
namespace {

// Passes after which a miss counts half: short enough to leave a policy that
// stopped working within a paragraph.
constexpr double kHalfLife = 64.0;
// A challenger must be better by this many square roots of the leader's misses,
// about the noise of a count: a tie does not make the cache change sides.
constexpr double kMargin = 3.0;

}  // namespace

Leader::Leader(const PolicySetting& setting)
    : KeepsPrefetched(setting),
      admit_limit_(default_admit_limit(setting.num_slots, setting.num_layers())) {
    // A tie goes to the first. `learned` begins: what it knows before anything was learned, an even
    // mixture of averages and continuations, already is better than either LRU on most texts, and
    // where it is not the lead passes within some ten tokens.
    for (const char* name : {"learned", "lru-per-layer", "lru"}) {
        auto policy = make_policy(name, setting);
        if (const auto* learned = dynamic_cast<const Learned*>(policy.get())) learned_ = learned;
        candidates_.push_back(
            {name,
             std::make_unique<SlotTable>(setting.num_pages(), setting.num_slots, std::move(policy)),
             0.0});
    }
}

Leader::~Leader() = default;

// A request as the pager would serve it, without the bytes. Returns the misses.
size_t Leader::run(SlotTable& shadow, const LayerRequest& given) {
    LayerRequest request = given;
    shadow.begin_request(request);
    misses_.clear();
    pinned_.clear();
    for (size_t i = 0; i < request.pages.size(); ++i) {
        const SlotIndex slot = shadow.slot_of(request.pages[i]);
        if (slot == kNoSlot) {
            misses_.push_back(static_cast<int32_t>(i));
            continue;
        }
        shadow.pin(slot);
        shadow.touch(request.pages[i]);
        pinned_.push_back(slot);
    }
    if (!misses_.empty())
        for (const auto& admitted : shadow.admit(request, misses_, {}, admit_limit_, {}))
            pinned_.push_back(admitted.slot);
    for (const SlotIndex slot : pinned_) shadow.unpin(slot);
    return misses_.size();
}

void Leader::request(const LayerRequest& request) {
    KeepsPrefetched::request(request);
    for (Candidate& candidate : candidates_)
        candidate.misses += double(run(*candidate.shadow, request));
    if (request.step == step_) return;
    step_ = request.step;
    static const double fade = std::exp2(-1.0 / kHalfLife);
    for (size_t i = 0; i < candidates_.size(); ++i) {
        candidates_[i].misses *= fade;
        const double best = candidates_[leader_].misses;
        if (best - candidates_[i].misses > kMargin * std::sqrt(best)) leader_ = i;
    }
}

void Leader::sequence_begins() {
    for (Candidate& candidate : candidates_) candidate.shadow->policy().sequence_begins();
}

PageIndex Leader::victim(PageIndex incoming, const MayEvict& may_evict) const {
    PageIndex lowest = kNoPage;
    double lowest_worth = 0.0;
    const SlotTable& shadow = *candidates_[leader_].shadow;
    for (const PageIndex page : residents()) {
        if (shadow.slot_of(page) != kNoSlot || is_ahead(page)) continue;
        const double worth = learned_->forecast(page);
        if (lowest != kNoPage &&
            (worth > lowest_worth || (worth == lowest_worth && last_use(page) > last_use(lowest))))
            continue;
        if (!may_evict(page)) continue;
        lowest = page;
        lowest_worth = worth;
    }
    return lowest != kNoPage ? lowest : Ranked::victim(incoming, may_evict);
}

double Leader::demand_worth(PageIndex page) const {
    return (holds(page) ? 1e6 : 0.0) + learned_->forecast(page);
}

}  // namespace moe_offload
