// Which copy engine a pager gets: io_uring where it was built, the kernel allows it and pages come
// from files; worker threads otherwise.
#pragma once

#include <memory>
#include <string>

#include "copy_engine.h"

namespace moe_offload {

struct CopyEngineOptions {
    std::string kind = "auto";  // "auto", "io_uring" or "threads"
    int num_threads = 4;        // of the thread pool
    int queue_depth = 4;        // reads in flight of io_uring
    size_t chunk_bytes = size_t{1} << 20;
};

// Throws std::invalid_argument for an unknown kind, or "io_uring" where it cannot be had. "auto"
// falls back to threads: the engine's name() tells, and why_no_io_uring says why.
std::unique_ptr<CopyEngine> make_copy_engine(std::shared_ptr<const PageSource> source,
                                             const CopyEngineOptions& options);

// "" when io_uring works in this process, else why not.
std::string why_no_io_uring();

}  // namespace moe_offload
