#include "replay_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include <string>

#include "paging/simulator.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace moe_offload {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

template <typename T>
Array<T> to_array(const std::vector<T>& values) {
    return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename T>
std::span<const T> view(const Array<T>& array) {
    return {array.data(), static_cast<size_t>(array.size())};
}

void check_offsets(const char* name, std::span<const int64_t> offsets, size_t num_events,
                   size_t size) {
    bool fits = offsets.size() == num_events + 1 && offsets.front() == 0 &&
                offsets.back() == static_cast<int64_t>(size);
    for (size_t i = 0; fits && i < num_events; ++i) fits = offsets[i] <= offsets[i + 1];
    if (!fits)
        throw std::invalid_argument(std::string("replay: ") + name + " must rise from 0 to " +
                                    std::to_string(size) + " in " + std::to_string(num_events + 1) +
                                    " entries");
}

py::dict replay(const std::string& policy, std::vector<int32_t> num_experts, size_t num_slots,
                std::vector<PageIndex> kept, size_t admit_limit, const Array<uint8_t>& kinds,
                const Array<int32_t>& layers, const Array<int32_t>& counts,
                const Array<int64_t>& expert_offsets, const Array<int32_t>& experts,
                const Array<int64_t>& value_offsets, const Array<float>& values) {
    const auto num_events = static_cast<size_t>(kinds.size());
    const EventView events{view(kinds),   view(layers),        view(counts), view(expert_offsets),
                           view(experts), view(value_offsets), view(values)};
    if (events.layers.size() != num_events || events.counts.size() != num_events)
        throw std::invalid_argument("replay: kinds, layers and counts must have equal lengths");
    check_offsets("expert_offsets", events.expert_offsets, num_events, events.experts.size());
    check_offsets("value_offsets", events.value_offsets, num_events, events.values.size());
    Array<int32_t> misses(kinds.size()), prefetched(kinds.size());
    const std::span<int32_t> out_misses{misses.mutable_data(), num_events};
    const std::span<int32_t> out_prefetched{prefetched.mutable_data(), num_events};
    std::unique_ptr<Simulator> simulator;
    {
        py::gil_scoped_release release;
        PolicySetting setting{.num_experts = std::move(num_experts),
                              .num_slots = num_slots,
                              .kept = std::move(kept),
                              .next_request = {}};
        if (policy.starts_with("belady")) setting.next_request = next_requests(events, setting);
        std::fill(out_misses.begin(), out_misses.end(), 0);
        std::fill(out_prefetched.begin(), out_prefetched.end(), 0);
        simulator = std::make_unique<Simulator>(policy, setting, admit_limit);
        simulator->run(events, out_misses, out_prefetched);
    }
    py::dict per_layer;
    const auto put = [&](const char* name, uint64_t LayerCounters::* field) {
        py::list column;
        for (const LayerCounters& layer : simulator->counters()) column.append(layer.*field);
        per_layer[name] = column;
    };
    put("acquires", &LayerCounters::acquires);
    put("lookups", &LayerCounters::lookups);
    put("hits", &LayerCounters::hits);
    put("prefetch_hits", &LayerCounters::prefetch_hits);
    put("demand_misses", &LayerCounters::demand_misses);
    put("bypasses", &LayerCounters::bypasses);
    put("evictions", &LayerCounters::evictions);
    per_layer["prefetches"] = simulator->prefetches();
    per_layer["wasted_prefetches"] = simulator->wasted_prefetches();
    return py::dict("per_layer"_a = per_layer, "misses"_a = misses, "prefetched"_a = prefetched,
                    "residents"_a = simulator->residents());
}

}  // namespace

py::dict events_dict(const EventLog& log) {
    return py::dict(
        "kinds"_a = to_array(log.kinds), "layers"_a = to_array(log.layers),
        "counts"_a = to_array(log.counts), "expert_offsets"_a = to_array(log.expert_offsets),
        "experts"_a = to_array(log.experts), "value_offsets"_a = to_array(log.value_offsets),
        "values"_a = to_array(log.values));
}

void bind_replay(py::module_& m) {
    m.def("replay", &replay, py::kw_only(), "policy"_a, "num_experts"_a, "num_slots"_a, "kept"_a,
          "admit_limit"_a, "kinds"_a, "layers"_a, "counts"_a, "expert_offsets"_a, "experts"_a,
          "value_offsets"_a, "values"_a,
          "Replay events against a policy: counters per layer, copies per event, residents.");
}

}  // namespace moe_offload
