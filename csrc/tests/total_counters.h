// The counters of all layers together, as tests look at them.
#pragma once

#include "paging/pager.h"

namespace moe_offload {

inline LayerCounters total_counters(const Pager& pager) {
    LayerCounters sum;
    for (const LayerCounters& layer : pager.counters())
        for (uint64_t LayerCounters::* field :
             {&LayerCounters::lookups, &LayerCounters::hits, &LayerCounters::prefetch_hits,
              &LayerCounters::joined_prefetches, &LayerCounters::demand_misses,
              &LayerCounters::bypasses, &LayerCounters::evictions, &LayerCounters::demand_bytes,
              &LayerCounters::prefetch_bytes_used, &LayerCounters::prefetch_bytes_wasted,
              &LayerCounters::fill_bytes, &LayerCounters::swap_back_bytes,
              &LayerCounters::stall_ns})
            sum.*field += layer.*field;
    return sum;
}

}  // namespace moe_offload
