// How fast a disk can be read the way a pager reads: the roof its numbers are held against.
//
// Pages at random places of the given files, cut into chunks, `depth` of them in flight, O_DIRECT,
// into memory that is thrown away: by default a buffer per read in flight, used again and again,
// which stays in the caches. A pager keeps what it reads; `memory_bytes` says over how much memory
// reads go round. No slots, no copies, no checks; shares no code with the copy engines, so it
// cannot have their faults.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace moe_offload {

struct DiskRoofOptions {
    std::vector<std::string> paths;
    uint64_t page_bytes = 0;   // a multiple of 4096, not larger than any file
    uint64_t chunk_bytes = 0;  // likewise
    int depth = 1;
    double seconds = 0.2;
    uint64_t seed = 0;
    bool io_uring = false;  // else a thread per read in flight
    bool huge_pages = true;
    uint64_t memory_bytes = 0;  // at least a chunk per read in flight
};

struct DiskRoof {
    uint64_t bytes = 0;
    double seconds = 0;
    double cpu_seconds = 0;  // of this process meanwhile
};

// Throws std::system_error when a file cannot be read with O_DIRECT, std::invalid_argument for
// io_uring where it was not built or sizes that do not fit.
DiskRoof disk_roof(const DiskRoofOptions& options);

}  // namespace moe_offload
