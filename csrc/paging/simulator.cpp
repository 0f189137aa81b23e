#include "simulator.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace moe_offload {

Simulator::Simulator(const std::string& policy, const PolicySetting& setting, size_t admit_limit)
    : setting_(setting),
      stride_(static_cast<size_t>(setting.experts_per_layer())),
      admit_limit_(admit_limit > 0 ? admit_limit
                                   : default_admit_limit(setting.num_slots, setting.num_layers())),
      table_(setting.num_pages(), setting.num_slots, make_policy(policy, setting)),
      counters_(setting.num_layers()),
      prefetches_(setting.num_layers(), 0),
      wasted_(setting.num_layers(), 0),
      expected_at_(setting.num_pages(), 0),
      unused_(setting.num_pages(), false),
      seen_(setting.num_pages(), 0) {
    if (setting.num_layers() == 0 || stride_ == 0)
        throw std::invalid_argument("Simulator: expected at least one layer with experts");
    if (setting.num_slots < kMinSlots)
        throw std::invalid_argument("Simulator: expected at least " + std::to_string(kMinSlots) +
                                    " slots, got " + std::to_string(setting.num_slots));
}

void Simulator::run(const EventView& events, std::span<int32_t> misses,
                    std::span<int32_t> prefetches) {
    for (size_t i = 0; i < events.kinds.size(); ++i) {
        const int32_t layer = events.layers[i];
        if (layer < 0 || static_cast<size_t>(layer) >= setting_.num_layers())
            throw std::invalid_argument("Simulator: event " + std::to_string(i) + " names layer " +
                                        std::to_string(layer) + " of " +
                                        std::to_string(setting_.num_layers()));
        const auto begin = static_cast<size_t>(events.expert_offsets[i]);
        const auto end = static_cast<size_t>(events.expert_offsets[i + 1]);
        if (events.kinds[i] == static_cast<uint8_t>(EventKind::kRoutes)) {
            const auto ids = events.experts.subspan(begin, end - begin);
            routes_.assign(ids.begin(), ids.end());
            continue;
        }
        const int32_t count = setting_.num_experts[static_cast<size_t>(layer)];
        pages_.clear();
        ++serial_;
        for (size_t j = begin; j < end; ++j) {
            const int32_t expert = events.experts[j];
            if (expert < 0 || expert >= count)
                throw std::invalid_argument("Simulator: event " + std::to_string(i) +
                                            " names expert " + std::to_string(expert) + " of " +
                                            std::to_string(count) + " in layer " +
                                            std::to_string(layer));
            const size_t page = static_cast<size_t>(layer) * stride_ + static_cast<size_t>(expert);
            if (seen_[page] == serial_)
                throw std::invalid_argument("Simulator: event " + std::to_string(i) +
                                            " names expert " + std::to_string(expert) + " twice");
            seen_[page] = serial_;
            pages_.push_back(static_cast<PageIndex>(page));
        }
        const auto first = static_cast<size_t>(events.value_offsets[i]);
        const auto values =
            events.values.subspan(first, static_cast<size_t>(events.value_offsets[i + 1]) - first);
        switch (static_cast<EventKind>(events.kinds[i])) {
            case EventKind::kRequest: {
                const int32_t missed = request(layer, values, events.counts[i]);
                if (!misses.empty()) misses[i] = missed;
                routes_.clear();
                break;
            }
            case EventKind::kPrefetch: {
                const int32_t started = prefetch(layer);
                if (!prefetches.empty()) prefetches[i] = started;
                break;
            }
            case EventKind::kPredict:
                table_.policy().predict({layer, pages_, values, events.counts[i]});
                break;
            case EventKind::kSequence:
                table_.policy().sequence_begins();
                break;
            case EventKind::kFill:
                for (const PageIndex page : pages_)
                    if (table_.slot_of(page) == kNoSlot) table_.place_free(page);
                break;
            case EventKind::kExpect:
                for (const PageIndex page : pages_)
                    expected_at_[page] = table_.slot_of(page) == kNoSlot
                                             ? 0
                                             : counters_[static_cast<size_t>(layer)].acquires + 1;
                break;
            default:
                throw std::invalid_argument("Simulator: event " + std::to_string(i) +
                                            " has the unknown kind " +
                                            std::to_string(events.kinds[i]));
        }
    }
}

// Pager::acquire, with copies that end at once and a ticket that is released before the next one.
int32_t Simulator::request(int32_t layer, std::span<const float> weights, int32_t num_tokens) {
    LayerRequest request{.layer = layer,
                         .pages = pages_,
                         .weights = weights,
                         .num_tokens = num_tokens,
                         .routes = routes_};
    table_.begin_request(request);
    LayerCounters& counters = counters_[static_cast<size_t>(layer)];
    ++counters.acquires;
    counters.lookups += pages_.size();
    misses_.clear();
    pinned_.clear();
    fresh_.clear();
    for (size_t i = 0; i < pages_.size(); ++i) {
        const PageIndex page = pages_[i];
        const SlotIndex slot = table_.slot_of(page);
        if (slot == kNoSlot) {
            misses_.push_back(static_cast<int32_t>(i));
            continue;
        }
        table_.pin(slot);
        pinned_.push_back(slot);
        table_.touch(page);
        ++counters.hits;
        if (unused_[page]) {
            unused_[page] = false;
            ++counters.prefetch_hits;
            fresh_.push_back(static_cast<int32_t>(i));
        }
    }
    counters.demand_misses += misses_.size();
    if (!misses_.empty()) {
        const auto& admitted = table_.admit(request, misses_, fresh_, admit_limit_, {});
        for (const PageIndex page : table_.evicted()) count_eviction(page);
        counters.bypasses += misses_.size();
        for (const auto& miss : admitted) {
            pinned_.push_back(miss.slot);
            if (miss.stays) --counters.bypasses;
        }
    }
    for (const SlotIndex slot : pinned_) table_.unpin(slot);
    return static_cast<int32_t>(misses_.size());
}

int32_t Simulator::prefetch(int32_t layer) {
    const auto may_evict = [this](PageIndex candidate) {
        return expected_at_[candidate] != counters_[candidate / stride_].acquires + 1;
    };
    int32_t started = 0;
    for (const PageIndex page : pages_) {
        if (table_.slot_of(page) != kNoSlot) continue;
        const auto placed = table_.place(page, may_evict, false);
        if (!placed) break;
        if (placed->evicted != kNoPage) count_eviction(placed->evicted);
        unused_[page] = true;
        expected_at_[page] = counters_[static_cast<size_t>(layer)].acquires + 1;
        ++started;
    }
    prefetches_[static_cast<size_t>(layer)] += static_cast<uint64_t>(started);
    return started;
}

void Simulator::count_eviction(PageIndex page) {
    const size_t layer = page / stride_;
    ++counters_[layer].evictions;
    expected_at_[page] = 0;
    if (unused_[page]) {
        unused_[page] = false;
        ++wasted_[layer];
    }
}

std::vector<PageIndex> Simulator::residents() const {
    std::vector<PageIndex> residents;
    for (PageIndex page = 0; page < setting_.num_pages(); ++page)
        if (table_.slot_of(page) != kNoSlot) residents.push_back(page);
    return residents;
}

std::vector<int64_t> next_requests(const EventView& events, const PolicySetting& setting) {
    const auto stride = static_cast<size_t>(setting.experts_per_layer());
    std::vector<int64_t> number(events.kinds.size(), 0);
    int64_t requests = 0;
    size_t lookups = 0;
    for (size_t i = 0; i < events.kinds.size(); ++i)
        if (events.kinds[i] == static_cast<uint8_t>(EventKind::kRequest)) {
            number[i] = requests++;
            lookups += static_cast<size_t>(events.expert_offsets[i + 1] - events.expert_offsets[i]);
        }
    std::vector<int64_t> result(lookups), upcoming(setting.num_pages(), kNeverAgain);
    for (size_t i = events.kinds.size(); i-- > 0;) {
        if (events.kinds[i] != static_cast<uint8_t>(EventKind::kRequest)) continue;
        for (int64_t j = events.expert_offsets[i + 1]; j-- > events.expert_offsets[i];) {
            const size_t page = static_cast<size_t>(events.layers[i]) * stride +
                                static_cast<size_t>(events.experts[static_cast<size_t>(j)]);
            if (page >= upcoming.size())
                throw std::invalid_argument("next_requests: event " + std::to_string(i) +
                                            " names an expert out of range");
            result[--lookups] = upcoming[page];
            upcoming[page] = number[i];
        }
    }
    return result;
}

}  // namespace moe_offload
