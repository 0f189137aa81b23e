#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "belady.h"
#include "forecast.h"
#include "leader.h"
#include "learned.h"
#include "lfu.h"
#include "lru.h"
#include "per_layer.h"
#include "published.h"
#include "static.h"

namespace moe_offload {

// --- lru ----------------------------------------------------------------------------------------

Lru::Lru(size_t num_pages)
    : prev_(num_pages + 1, kNoPage),
      next_(num_pages + 1, kNoPage),
      sentinel_(static_cast<PageIndex>(num_pages)) {
    prev_[sentinel_] = next_[sentinel_] = sentinel_;
}

void Lru::insert(PageIndex page) {
    const PageIndex newest = prev_[sentinel_];
    prev_[page] = newest;
    next_[page] = sentinel_;
    next_[newest] = prev_[sentinel_] = page;
}

void Lru::touch(PageIndex page) {
    Lru::erase(page);
    Lru::insert(page);
}

void Lru::erase(PageIndex page) {
    next_[prev_[page]] = next_[page];
    prev_[next_[page]] = prev_[page];
    prev_[page] = next_[page] = kNoPage;
}

PageIndex Lru::victim(PageIndex, const MayEvict& may_evict) const {
    for (PageIndex page = next_[sentinel_]; page != sentinel_; page = next_[page])
        if (may_evict(page)) return page;
    return kNoPage;
}

// --- lfu ----------------------------------------------------------------------------------------

Lfu::Lfu(size_t num_pages, double half_life)
    : score_(num_pages, 0.0), resident_(num_pages, false), growth_(std::exp2(1.0 / half_life)) {}

void Lfu::use(PageIndex page) {
    weight_ *= growth_;
    score_[page] += weight_;
    if (weight_ > 1e200) rescale();
}

void Lfu::rescale() {
    order_.clear();
    for (PageIndex page = 0; page < score_.size(); ++page) {
        score_[page] /= weight_;
        if (resident_[page]) order_.emplace(score_[page], page);
    }
    weight_ = 1.0;
}

void Lfu::insert(PageIndex page) {
    use(page);
    resident_[page] = true;
    order_.emplace(score_[page], page);
}

void Lfu::touch(PageIndex page) {
    erase(page);
    insert(page);
}

void Lfu::erase(PageIndex page) {
    order_.erase({score_[page], page});
    resident_[page] = false;
}

PageIndex Lfu::victim(PageIndex, const MayEvict& may_evict) const {
    for (const auto& [score, page] : order_)
        if (may_evict(page)) return page;
    return kNoPage;
}

// --- static -------------------------------------------------------------------------------------

Static::Static(size_t num_pages, const std::vector<PageIndex>& kept)
    : Lru(num_pages), kept_(num_pages, false) {
    for (const PageIndex page : kept) kept_.at(page) = true;
}

PageIndex Static::victim(PageIndex incoming, const MayEvict& may_evict) const {
    return Lru::victim(incoming, [&](PageIndex page) { return !kept_[page] && may_evict(page); });
}

// --- per layer ----------------------------------------------------------------------------------

PerLayer::PerLayer(const PolicySetting& setting,
                   const std::function<std::unique_ptr<EvictionPolicy>(size_t)>& make)
    : stride_(static_cast<PageIndex>(setting.experts_per_layer())), layers_(setting.num_layers()) {
    // An even share; what does not divide goes to the first layers, what a small layer cannot use
    // to those that can. At least one slot each: a layer without would never be served.
    for (Layer& layer : layers_) {
        layer.policy = make(stride_);
        layer.quota = 1;
    }
    size_t left = setting.num_slots - std::min(setting.num_slots, layers_.size());
    for (bool any = true; left > 0 && any;) {
        any = false;
        for (size_t i = 0; i < layers_.size() && left > 0; ++i)
            if (layers_[i].quota < static_cast<size_t>(setting.num_experts[i])) {
                ++layers_[i].quota;
                --left;
                any = true;
            }
    }
}

void PerLayer::insert(PageIndex page) {
    ++layer(page).resident;
    layer(page).policy->insert(page % stride_);
}

void PerLayer::touch(PageIndex page) { layer(page).policy->touch(page % stride_); }

void PerLayer::erase(PageIndex page) {
    --layer(page).resident;
    layer(page).policy->erase(page % stride_);
}

bool PerLayer::may_take_free_slot(PageIndex incoming) const {
    const Layer& layer = layers_[incoming / stride_];
    return layer.resident < layer.quota;
}

PageIndex PerLayer::victim(PageIndex incoming, const MayEvict& may_evict) const {
    const auto victim_in = [&](PageIndex index) {
        const PageIndex first = index * stride_;
        const PageIndex page = layers_[index].policy->victim(
            incoming, [&](PageIndex expert) { return may_evict(first + expert); });
        return page == kNoPage ? kNoPage : first + page;
    };
    const PageIndex own = victim_in(incoming / stride_);
    if (own != kNoPage || !may_take_free_slot(incoming)) return own;
    // Fewer slots than layers: somebody else's page, in layer order from the one just left.
    for (PageIndex back = 1; back < layers_.size(); ++back) {
        const auto count = static_cast<PageIndex>(layers_.size());
        const PageIndex other = victim_in((incoming / stride_ + count - back) % count);
        if (other != kNoPage) return other;
    }
    return kNoPage;
}

// --- forecast -----------------------------------------------------------------------------------

namespace {
// Half life of the rate of use, in visits of the layer (tokens at batch 1).
constexpr double kRateHalfLife = 32.0;
constexpr double kRateFloor = 1e-4;
constexpr double kPassDiscount = 0.7;
}  // namespace

Forecast::Forecast(const PolicySetting& setting, int32_t horizon, bool exclusive)
    : RankedBy(setting),
      horizon_(static_cast<size_t>(horizon)),
      exclusive_(exclusive),
      rate_(setting.num_pages(), 0.0F),
      updated_(setting.num_pages(), 0),
      visits_(setting.num_layers(), 0),
      predicted_(setting.num_layers() * horizon_, 0),
      probability_(setting.num_pages() * horizon_, -1.0F),
      version_(setting.num_layers(), 1),
      valued_at_(setting.num_pages(), 0),
      value_(setting.num_pages(), 0.0) {
    for (int32_t ahead = 0; ahead <= num_layers_; ++ahead)
        discount_.push_back(std::pow(kPassDiscount, double(ahead) / num_layers_));
}

float Forecast::decayed_rate(PageIndex page) const {
    static const std::vector<float> decay = [] {
        std::vector<float> powers(512);
        for (size_t n = 0; n < powers.size(); ++n)
            powers[n] = static_cast<float>(std::exp2(-double(n) / kRateHalfLife));
        return powers;
    }();
    const uint64_t age = visits_[static_cast<size_t>(layer_of(page))] - updated_[page];
    return rate_[page] * decay[std::min<uint64_t>(age, decay.size() - 1)];
}

void Forecast::request(const LayerRequest& request) {
    Ranked::request(request);
    static const float gain = static_cast<float>(1.0 - std::exp2(-1.0 / kRateHalfLife));
    const uint64_t visit = ++visits_[static_cast<size_t>(request.layer)];
    ++version_[static_cast<size_t>(request.layer)];
    for (const PageIndex page : request.pages) {
        rate_[page] = decayed_rate(page) + gain;
        updated_[page] = visit;
    }
}

void Forecast::predict(const Prediction& prediction) {
    if (prediction.visits_ahead < 0 || static_cast<size_t>(prediction.visits_ahead) >= horizon_)
        return;
    const auto layer = static_cast<size_t>(prediction.layer);
    const uint64_t visit = visits_[layer] + static_cast<uint64_t>(prediction.visits_ahead);
    const size_t column = this->column(visit);
    if (!predicted(layer, visit))
        for (PageIndex page = prediction.layer * stride_; page < (prediction.layer + 1) * stride_;
             ++page)
            probability_[page * horizon_ + column] = -1.0F;
    predicted_[layer * horizon_ + column] = visit + 1;
    ++version_[layer];
    for (size_t i = 0; i < prediction.pages.size(); ++i)
        probability_[prediction.pages[i] * horizon_ + column] = prediction.probabilities[i];
}

double Forecast::worth(PageIndex page) const {
    const uint64_t version = version_[static_cast<size_t>(layer_of(page))];
    if (valued_at_[page] != version) {
        value_[page] = value(page);
        valued_at_[page] = version;
    }
    return value_[page] * discount_[static_cast<size_t>(distance(page))];
}

double Forecast::value(PageIndex page) const {
    const auto layer = static_cast<size_t>(layer_of(page));
    const double rate = std::max(kRateFloor, double(decayed_rate(page)));
    double absent = 1.0, value = 0.0;  // discounted to the layer's next visit
    for (uint64_t visit = visits_[layer]; visit < visits_[layer] + horizon_; ++visit) {
        if (!predicted(layer, visit)) break;
        const float named = probability_[page * horizon_ + column(visit)];
        const double used = named >= 0.0F ? double(named) : exclusive_ ? 0.0 : rate;
        value += absent * used;
        absent *= (1.0 - used) * kPassDiscount;
    }
    return value + absent * rate / (1.0 - (1.0 - rate) * kPassDiscount);
}

// --- by name ------------------------------------------------------------------------------------

int32_t PolicySetting::experts_per_layer() const {
    return num_experts.empty() ? 0 : *std::max_element(num_experts.begin(), num_experts.end());
}

std::vector<std::string> policy_names(bool live_only) {
    std::vector<std::string> names{"lru",    "lru-per-layer", "lfu",        "lfu-per-layer",
                                   "static", "least-stale",   "layer-ring", "activation-ratio",
                                   "score",  "forecast",      "predictive", "learned",
                                   "auto"};
    if (!live_only) names.insert(names.end(), {"belady", "belady-bypass"});
    return names;
}

std::unique_ptr<EvictionPolicy> make_policy(const std::string& name, const PolicySetting& setting) {
    // Half life of ten passes over all pages: long enough to rank a domain's experts, short enough
    // to follow a change of domain within a few hundred tokens.
    const auto lru = [](size_t pages) { return std::make_unique<Lru>(pages); };
    const auto lfu = [](size_t pages) {
        return std::make_unique<Lfu>(pages, 10.0 * double(pages));
    };
    if (name == "lru") return lru(setting.num_pages());
    if (name == "lru-per-layer") return std::make_unique<PerLayer>(setting, lru);
    if (name == "lfu") return lfu(setting.num_pages());
    if (name == "lfu-per-layer") return std::make_unique<PerLayer>(setting, lfu);
    if (name == "static") return std::make_unique<Static>(setting.num_pages(), setting.kept);
    if (name == "least-stale") return std::make_unique<LeastStale>(setting);
    if (name == "layer-ring") return std::make_unique<LayerRing>(setting);
    if (name == "activation-ratio") return std::make_unique<ActivationRatio>(setting);
    if (name == "score") return std::make_unique<Score>(setting);
    if (name == "forecast") return std::make_unique<Forecast>(setting, 8, false);
    if (name == "predictive") return std::make_unique<Forecast>(setting, 1, true);
    if (name == "learned") return std::make_unique<Learned>(setting);
    if (name == "auto") return std::make_unique<Leader>(setting);
    if (name == "belady") return std::make_unique<Belady>(setting, false);
    if (name == "belady-bypass") return std::make_unique<Belady>(setting, true);
    std::string known;
    for (const std::string& each : policy_names(false)) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("policy: expected one of " + known + ", got " + name);
}

}  // namespace moe_offload
