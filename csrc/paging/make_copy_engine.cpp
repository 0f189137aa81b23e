#include "make_copy_engine.h"

#include <stdexcept>
#include <system_error>
#include <utility>

#include "file_source.h"
#include "host_copy_engine.h"
#ifdef MOE_OFFLOAD_LIBURING
#include "uring_copy_engine.h"
#endif

namespace moe_offload {
namespace {

// Null, with the reason, when io_uring cannot be used.
std::unique_ptr<CopyEngine> try_uring([[maybe_unused]] std::shared_ptr<const FileSource> files,
                                      [[maybe_unused]] const CopyEngineOptions& options,
                                      std::string& reason) {
#ifdef MOE_OFFLOAD_LIBURING
    try {
        return std::make_unique<UringCopyEngine>(std::move(files), options.queue_depth,
                                                 options.chunk_bytes);
    } catch (const std::system_error& error) {
        reason = std::string("the kernel, a limit or a security policy refuses: ") + error.what();
    }
#else
    reason = "moe_offload was built without liburing";
#endif
    return nullptr;
}

}  // namespace

std::unique_ptr<CopyEngine> make_copy_engine(std::shared_ptr<const PageSource> source,
                                             const CopyEngineOptions& options) {
    if (options.kind != "auto" && options.kind != "io_uring" && options.kind != "threads")
        throw std::invalid_argument("io_engine: expected auto, io_uring or threads, got " +
                                    options.kind);
    const auto files = std::dynamic_pointer_cast<const FileSource>(source);
    if (options.kind == "io_uring" && !files)
        throw std::invalid_argument(
            "io_engine: io_uring reads files, and these experts come from memory or a converter. "
            "Use auto or threads.");
    if (options.kind != "threads" && files) {
        std::string reason;
        if (auto engine = try_uring(files, options, reason)) return engine;
        if (options.kind == "io_uring")
            throw std::invalid_argument("io_engine: no io_uring here, " + reason +
                                        ". Use auto or threads.");
    }
    return std::make_unique<HostCopyEngine>(std::move(source), options.num_threads,
                                            options.chunk_bytes);
}

std::string why_no_io_uring() {
    std::string reason;
    CopyEngineOptions options;
    options.queue_depth = 1;
    try_uring(std::make_shared<FileSource>(std::vector<std::string>{}, true), options, reason);
    return reason;
}

}  // namespace moe_offload
