// What paging did, per layer. Look-ups and decisions are counted when they are taken, bytes when
// the copy has ended, so a replay of the same requests must give the same first group exactly.
#pragma once

#include <cstdint>

namespace moe_offload {

struct LayerCounters {
    // Decisions: lookups = hits + joined_prefetches + demand_misses.
    uint64_t acquires = 0;           // calls of acquire
    uint64_t lookups = 0;            // distinct pages asked for
    uint64_t hits = 0;               // already in a slot
    uint64_t prefetch_hits = 0;      // of those: first use of a prefetched page
    uint64_t joined_prefetches = 0;  // on its way already; the demand joined that copy
    uint64_t demand_misses = 0;      // fetched because of this demand
    uint64_t bypasses = 0;           // of those: streamed through, left no page behind
    uint64_t evictions = 0;          // pages of this layer that lost their slot
    // Bytes that reached slots.
    uint64_t demand_bytes = 0;
    uint64_t prefetch_bytes_used = 0;
    uint64_t prefetch_bytes_wasted = 0;  // evicted or cancelled before any use
    uint64_t fill_bytes = 0;             // initial fill, asked for by the user
    uint64_t disk_bytes = 0;             // read from storage for all of these, alignment included
    // Sent back to the host: whole pages whose slots these overwrote, see SwapBack.
    uint64_t swap_back_bytes = 0;
    // Time.
    uint64_t stall_ns = 0;    // the caller waited in Ticket::next
    uint64_t overlap_ns = 0;  // demand copies were under way and the caller was not waiting
};

}  // namespace moe_offload
