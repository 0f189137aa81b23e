// How fast a core reads memory: the roof of expert FFNs with few rows.
#pragma once

#include <cstddef>
#include <cstdint>

namespace moe_offload {

struct MemoryRoof {
    uint64_t sum = 0;  // of the 64-bit words, modulo 2^64: they have been read
    double seconds = 0;
};

// Reads `nbytes` (whole 64 bytes) once through in the calling thread. `ahead`: so many bytes
// further on every line is prefetched into the L2; 0: the processor's own prefetchers do it all.
// Which of the two is faster depends on the processor, few_rows.h has numbers of one.
MemoryRoof memory_roof(const std::byte* data, size_t nbytes, size_t ahead);

}  // namespace moe_offload
