// Requests: what a layer's pages cost, who waits for whom, and what the pager says of itself.
#include "pager.h"

#include <unistd.h>
#include <algorithm>
#include <stdexcept>
#include <utility>

#include "clock.h"
#include "errors.h"

namespace moe_offload {

Pager::Pager(PagerOptions options, std::unique_ptr<EvictionPolicy> policy,
             std::unique_ptr<CopyEngine> engine)
    : options_(std::move(options)),
      experts_per_layer_(
          options_.num_experts.empty()
              ? 0
              : *std::max_element(options_.num_experts.begin(), options_.num_experts.end())),
      admit_limit_(options_.admit_limit),
      uses_weights_(policy->uses_weights()),
      uses_routes_(policy->uses_routes()),
      uses_predictions_(policy->uses_predictions()),
      owner_pid_(::getpid()),
      table_(options_.num_experts.size() * static_cast<size_t>(experts_per_layer_),
             options_.num_slots, std::move(policy)),
      loads_(options_.num_experts.size() * static_cast<size_t>(experts_per_layer_)),
      uses_(options_.num_slots),
      slot_shifts_(options_.num_slots, 0),
      whole_(options_.swap_back ? options_.num_slots : 0, nullptr),
      counters_(options_.num_experts.size()),
      visits_(options_.num_experts.size(), 0),
      seen_(loads_.size(), 0),
      engine_(std::move(engine)) {
    const size_t num_layers = options_.num_experts.size();
    if (num_layers == 0 || experts_per_layer_ < 1)
        throw std::invalid_argument("Pager: expected at least one layer with experts");
    if (options_.layer_names.size() != num_layers)
        throw std::invalid_argument("Pager: expected one name per layer");
    if (options_.num_slots < kMinSlots || options_.slots == nullptr)
        throw std::invalid_argument("Pager: expected at least " + std::to_string(kMinSlots) +
                                    " slots, got " + std::to_string(options_.num_slots));
    if (!options_.shifts.empty() && options_.shifts.size() != loads_.size())
        throw std::invalid_argument("Pager: expected a shift for each of " +
                                    std::to_string(loads_.size()) + " pages, got " +
                                    std::to_string(options_.shifts.size()));
    if (admit_limit_ == 0) admit_limit_ = default_admit_limit(options_.num_slots, num_layers);
}

Pager::~Pager() { close(); }

void Pager::close() {
    if (::getpid() != owner_pid_) {
        // The worker threads do not exist in a forked child; joining them would never return,
        // and the lock may have been held by one of them. The engine is left to the kernel.
        static_cast<void>(engine_.release());
        return;
    }
    {
        Lock lock(mutex_);
        if (closed_) return;
        closed_ = true;
    }
    changed_.notify_all();
    engine_->stop();
}

// --- requests ---------------------------------------------------------------------------------

void Pager::check_usable() const {
    if (::getpid() != owner_pid_)
        throw StateError("pager: created in process " + std::to_string(owner_pid_) +
                         " and used in its forked child " + std::to_string(::getpid()) +
                         ". Load the model in the child, or start it with the spawn method.");
}

PageIndex Pager::page_of(int32_t layer, int32_t expert) const {
    return static_cast<PageIndex>(layer * experts_per_layer_ + expert);
}
int32_t Pager::layer_of(PageIndex page) const {
    return static_cast<int32_t>(page) / experts_per_layer_;
}
int32_t Pager::expert_of(PageIndex page) const {
    return static_cast<int32_t>(page) % experts_per_layer_;
}
std::string Pager::describe(PageIndex page) const {
    return "layer " + std::to_string(layer_of(page)) + " (" +
           options_.layer_names[static_cast<size_t>(layer_of(page))] + ") expert " +
           std::to_string(expert_of(page));
}

// Called with the lock held.
void Pager::check_request(int32_t layer, std::span<const int32_t> experts) {
    if (closed_) throw StateError("pager: used after close; load or offload the model again");
    if (layer < 0 || static_cast<size_t>(layer) >= options_.num_experts.size())
        throw std::invalid_argument("pager: expected a layer in [0, " +
                                    std::to_string(options_.num_experts.size()) + "), got " +
                                    std::to_string(layer));
    const int32_t count = options_.num_experts[static_cast<size_t>(layer)];
    ++serial_;
    for (const int32_t expert : experts) {
        if (expert < 0 || expert >= count)
            throw std::invalid_argument("pager: layer " + std::to_string(layer) +
                                        " has experts [0, " + std::to_string(count) + "), got " +
                                        std::to_string(expert));
        uint64_t& seen = seen_[page_of(layer, expert)];
        if (seen == serial_)
            throw std::invalid_argument("pager: expected distinct experts, got " +
                                        std::to_string(expert) + " twice");
        seen = serial_;
    }
}

void Pager::check_values(std::span<const int32_t> experts, std::span<const float> values) const {
    if (values.size() != experts.size())
        throw std::invalid_argument("pager: expected one value per expert, got " +
                                    std::to_string(values.size()) + " for " +
                                    std::to_string(experts.size()));
}

std::shared_ptr<Ticket> Pager::acquire(int32_t layer, std::span<const int32_t> experts,
                                       std::span<const float> weights, int32_t num_tokens,
                                       std::optional<StreamHandle> stream,
                                       std::span<const int32_t> routes) {
    check_usable();
    auto ticket = std::make_shared<Ticket>(shared_from_this(), layer, stream);
    Lock lock(mutex_);
    ticket->closed_ = true;  // until it is complete: an exception below leaves nothing to undo
    check_request(layer, experts);
    if (!weights.empty()) check_values(experts, weights);
    if (!routes.empty() && (num_tokens < 1 || routes.size() % static_cast<size_t>(num_tokens) != 0))
        throw std::invalid_argument("pager: expected as many routes for each of " +
                                    std::to_string(num_tokens) + " tokens, got " +
                                    std::to_string(routes.size()) + " in all");
    ticket->closed_ = false;
    ++num_live_tickets_;
    ticket->opened_ns_ = now_ns();
    if (log_ && !routes.empty()) log_->add(EventKind::kRoutes, layer, routes, {}, num_tokens);
    if (log_) log_->add(EventKind::kRequest, layer, experts, weights, num_tokens);
    if (evict_probability_ > 0) evict_at_random();

    pages_.clear();
    for (const int32_t expert : experts) pages_.push_back(page_of(layer, expert));
    LayerRequest request{.layer = layer,
                         .pages = pages_,
                         .weights = weights,
                         .num_tokens = num_tokens,
                         .routes = routes};
    table_.begin_request(request);

    LayerCounters& counters = counters_[static_cast<size_t>(layer)];
    ++counters.acquires;
    ++visits_[static_cast<size_t>(layer)];
    counters.lookups += experts.size();
    ticket->items_.resize(experts.size());
    ticket->num_undelivered_ = experts.size();
    // The pages that are here are locked before any slot is given away.
    std::vector<int32_t> misses, fresh;
    for (size_t i = 0; i < experts.size(); ++i) {
        const PageIndex page = pages_[i];
        Ticket::Item& item = ticket->items_[i];
        item.load = loads_[page];
        if (item.load) {
            table_.pin(item.load->slot);
            table_.touch(page);
            if (join(item.load, counters)) fresh.push_back(static_cast<int32_t>(i));
        } else {
            item.load = std::make_shared<Load>();
            item.load->page = page;
            item.load->demanded = true;
            item.owns_load = true;
            misses.push_back(static_cast<int32_t>(i));
        }
    }
    // What is left of this layer's prefetches is stale now.
    for (size_t i = prefetching_.size(); i > 0; --i) {
        const auto load = prefetching_[i - 1].lock();
        if (load && !load->demanded && layer_of(load->page) == layer) cancel(load);
    }
    counters.demand_misses += misses.size();
    if (!misses.empty()) schedule_misses(*ticket, request, misses, fresh);
    return ticket;
}

// A demand meets a page that is resident or on its way. True at the first use of a prefetch.
bool Pager::join(const std::shared_ptr<Load>& load, LayerCounters& counters) {
    const bool first_use = load->cause == Load::Cause::kPrefetch && !load->demanded;
    load->demanded = true;
    if (load->state == Load::State::kReady) {
        if (first_use) counters.prefetch_bytes_used += load->bytes;
        if (first_use && load->fence) {  // enqueued, but not here yet
            ++counters.joined_prefetches;
            return true;
        }
        ++counters.hits;
        if (first_use) ++counters.prefetch_hits;
    } else {
        ++counters.joined_prefetches;
        if (load->job) engine_->promote(load->job);
    }
    return first_use;
}

// Gives slots to the misses of a ticket and starts the copies that need not wait for a release.
void Pager::schedule_misses(Ticket& ticket, const LayerRequest& request,
                            std::span<const int32_t> misses, std::span<const int32_t> fresh) {
    const auto load_of = [&](int32_t item) -> const std::shared_ptr<Load>& {
        return ticket.items_[static_cast<size_t>(item)].load;
    };
    const SlotTable::Circumstances live{
        [&](int32_t item) { return load_of(item)->state == Load::State::kReady; },
        [this] { return reclaim_prefetch(); }};
    const auto& admitted = table_.admit(request, misses, fresh, admit_limit_, live);
    for (const PageIndex page : table_.evicted()) {
        account_eviction(page);
        loads_[page] = nullptr;
    }
    for (const int32_t item : fresh)  // those that pass through are nobody else's any more
        if (const PageIndex page = load_of(item)->page; table_.slot_of(page) == kNoSlot)
            loads_[page] = nullptr;
    if (admitted.empty()) {  // other tickets pin everything: wait for them
        for (const int32_t index : misses) starved_.emplace_back(&ticket, index);
        return;
    }
    LayerCounters& counters = counters_[static_cast<size_t>(ticket.layer_)];
    for (const auto& [item, slot, after, stays] : admitted) {
        const auto& load = load_of(item);
        load->slot = slot;
        if (stays)
            loads_[load->page] = load;
        else
            ++counters.bypasses;
        if (after >= 0)
            ticket.items_[static_cast<size_t>(after)].successor = item;
        else
            start(load);
    }
}

// --- observation ------------------------------------------------------------------------------

std::vector<LayerCounters> Pager::counters() const {
    check_usable();
    Lock lock(mutex_);
    return counters_;
}

void Pager::reset_counters() {
    check_usable();
    Lock lock(mutex_);
    std::fill(counters_.begin(), counters_.end(), LayerCounters{});
    timeline_.clear();
}

std::pair<std::vector<TimelineEvent>, uint64_t> Pager::timeline() const {
    check_usable();
    Lock lock(mutex_);
    return {{timeline_.events().begin(), timeline_.events().end()}, timeline_.dropped()};
}

std::vector<std::tuple<int32_t, int32_t, SlotIndex>> Pager::residents() const {
    check_usable();
    Lock lock(mutex_);
    std::vector<std::tuple<int32_t, int32_t, SlotIndex>> residents;
    for (PageIndex page = 0; page < loads_.size(); ++page)
        if (loads_[page] && loads_[page]->state == Load::State::kReady)
            residents.emplace_back(layer_of(page), expert_of(page), loads_[page]->slot);
    return residents;
}

void Pager::set_recording(bool recording) {
    check_usable();
    Lock lock(mutex_);
    log_ = recording ? std::make_unique<EventLog>() : nullptr;
}

EventLog Pager::recorded() const {
    check_usable();
    Lock lock(mutex_);
    return log_ ? *log_ : EventLog{};
}

size_t Pager::num_live_tickets() const {
    check_usable();
    Lock lock(mutex_);
    return num_live_tickets_;
}

void Pager::set_chaos(const Chaos& chaos, double evict_probability) {
    check_usable();
    {
        Lock lock(mutex_);
        evict_probability_ = evict_probability;
        random_.seed(chaos.seed);
    }
    engine_->set_chaos(chaos);
}

}  // namespace moe_offload
