// Routes sorted by expert, on the host: for the CPU kernels, and for kernels on a GPU.
//
// For those the host has to know which experts have rows before it can ask the pager for their
// pages. So it reads the routed ids, and having them it sorts them too: a counting sort, stable in
// route order. The maps go to the device in one copy; sorting there instead would put a chain of
// launches in front of the one read that the host waits for. A token may name an expert twice, or
// none.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moe_offload {

// Where the sort writes, as `Permutation` of triton_kernels/permute.py has it.
struct RouteMaps {
    int32_t* route_of_row;    // [R], -1 in rows that no route has
    int32_t* row_of_route;    // [R], -1 for ids outside [0, E)
    int32_t* expert_offsets;  // [E + 1], rows of expert e are [offsets[e], offsets[e + 1])
    int32_t* active_experts;  // [min(R, E)], experts with rows, ascending; -1 behind them
    int32_t* num_active;      // [1]
};

template <class Id>
void sort_routes(const Id* ids, int32_t num_routes, int32_t num_experts, const RouteMaps& maps) {
    const auto ours = [num_experts](Id id) { return id >= 0 && id < Id{num_experts}; };
    int32_t* offsets = maps.expert_offsets;
    std::fill_n(offsets, num_experts + 1, 0);
    for (int32_t i = 0; i < num_routes; ++i)
        if (ours(ids[i])) ++offsets[ids[i] + 1];
    *maps.num_active = 0;
    std::fill_n(maps.active_experts, std::min(num_routes, num_experts), -1);
    for (int32_t expert = 0; expert < num_experts; ++expert) {
        if (offsets[expert + 1] > 0) maps.active_experts[(*maps.num_active)++] = expert;
        offsets[expert + 1] += offsets[expert];
    }
    std::vector<int32_t> next(offsets, offsets + num_experts);
    for (int32_t i = 0; i < num_routes; ++i) {
        maps.row_of_route[i] = ours(ids[i]) ? next[static_cast<size_t>(ids[i])]++ : -1;
        if (ours(ids[i])) maps.route_of_row[maps.row_of_route[i]] = i;
    }
    std::fill(maps.route_of_row + offsets[num_experts], maps.route_of_row + num_routes, -1);
}

}  // namespace moe_offload
