// Which resident page leaves, and which missed page is worth a slot. A policy sees page numbers
// and the order of events, no time and no copies; so the live pager and a replay of a recorded
// trace, which call it through the same SlotTable, take the same decisions.
//
// Order of calls for one request of a layer: `request`, then `touch` for each page that is
// resident, then for the misses `victim` / `admits` / `erase` / `insert`. Not thread safe.
#pragma once

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace moe_offload {

// Dense number of a page: layer * experts_per_layer + expert.
using PageIndex = uint32_t;
constexpr int32_t kMaxRoutedTokens = 32;  // of a call whose routes a policy is told
constexpr PageIndex kNoPage = std::numeric_limits<PageIndex>::max();

// One call of one layer: everything a policy may know about it.
struct LayerRequest {
    int32_t layer = 0;
    std::span<const PageIndex> pages;  // distinct, in the order asked for
    std::span<const float> weights;    // [pages] router weight summed over tokens; empty: not given
    int32_t num_tokens = 0;            // tokens of the call, 0: not given
    uint64_t step =
        0;  // passes over the model; a layer not after the previous one begins a new one
    // [num_tokens, A] whose experts are whose, numbered from 0 in the layer; ids outside of it are
    // nobody's. {}: not given.
    std::span<const int32_t> routes = {};
};

// What a predictor knows about a visit of a layer to come.
struct Prediction {
    int32_t layer = 0;
    std::span<const PageIndex> pages;
    std::span<const float> probabilities;  // [pages] that the visit needs the page
    int32_t visits_ahead = 0;              // 0: the layer's next visit, 1: the one after, ...
};

class EvictionPolicy {
  public:
    using MayEvict = std::function<bool(PageIndex)>;

    virtual ~EvictionPolicy() = default;

    // --- what happens
    virtual void request(const LayerRequest&) {}
    virtual void predict(const Prediction&) {}
    virtual void sequence_begins() {}  // what follows belongs to new prompts

    // --- residency: a page got a slot, was demanded while it had one, lost it
    virtual void insert(PageIndex page) = 0;
    virtual void touch(PageIndex page) = 0;
    virtual void erase(PageIndex page) = 0;

    // --- decisions; they change nothing, the caller erases what it evicts
    // The resident page that should leave for `incoming`, among those for which may_evict holds;
    // kNoPage when none should.
    virtual PageIndex victim(PageIndex incoming, const MayEvict& may_evict) const = 0;
    // False when a free slot is not for this page (a quota): a victim makes room instead.
    virtual bool may_take_free_slot(PageIndex) const { return true; }
    // Of the misses of one request those with the highest worth stay, if not all can.
    virtual double worth(PageIndex) const { return 0.0; }
    // True when the policy decides how many misses stay (`admits`), false for the pager's limit.
    virtual bool chooses() const { return false; }
    // Is the incoming page worth more than the victim? Asked when `chooses`; of every request at
    // least smallest_share misses stay, because bytes cannot arrive without a slot. (A bound that
    // no pager has to reach may say 0: all may pass through slots outside the pool.)
    virtual bool admits(PageIndex, PageIndex) const { return true; }
    // One slot would do; but a stream through one slot copies and computes in turn, so from four
    // misses on two are used.
    virtual size_t smallest_share(size_t num_misses) const { return num_misses < 4 ? 1 : 2; }
    // May pages of the very request be victims, once they have been used?
    virtual bool evicts_hits() const { return false; }
    // Does `predict` matter? Callers need not predict otherwise.
    virtual bool uses_predictions() const { return false; }
    // Does `request` read router weights? Callers need not gather them otherwise.
    virtual bool uses_weights() const { return false; }
    // Does `request` read routes? Callers need not gather them otherwise, nor for one token or for
    // more than kMaxRoutedTokens.
    virtual bool uses_routes() const { return false; }
};

// What a policy is made for. Fields a policy does not need may stay empty.
struct PolicySetting {
    std::vector<int32_t> num_experts;  // [num_layers]
    size_t num_slots = 0;
    std::vector<PageIndex> kept;        // static: stays for ever
    std::vector<int64_t> next_request;  // belady: per look-up, number of the page's next request

    size_t num_layers() const { return num_experts.size(); }
    int32_t experts_per_layer() const;  // stride of PageIndex: the largest count
    size_t num_pages() const { return num_layers() * static_cast<size_t>(experts_per_layer()); }
};

// Names: see policy_names. Throws std::invalid_argument for another one.
std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, const PolicySetting& setting);

// All names in documentation order; `live_only` leaves out those that need the future.
std::vector<std::string> policy_names(bool live_only);

}  // namespace moe_offload
