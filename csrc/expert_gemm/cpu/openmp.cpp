#include "expert_gemm/cpu/openmp.h"

#include <dlfcn.h>
#include <link.h>
#include <atomic>
#include <string>

namespace moe_offload {
namespace {

// Other packages bring OpenMP runtimes of their own: only one from torch's folders
// (torch/lib/libgomp.so.1, torch.libs/libgomp-a34b3233.so.1), or the system's, is torch's.
struct Found {
    bool torch = false;  // libtorch_cpu is loaded
    std::string bundled, other;
    int num_others = 0;
};

int look(dl_phdr_info* info, size_t, void* data) {
    auto& found = *static_cast<Found*>(data);
    const std::string path = info->dlpi_name == nullptr ? "" : info->dlpi_name;
    const std::string name = path.substr(path.find_last_of('/') + 1);
    if (name.starts_with("libtorch_cpu")) found.torch = true;
    if (!name.starts_with("libgomp") && !name.starts_with("libiomp") && !name.starts_with("libomp"))
        return 0;
    if (path.find("/torch/lib/") != std::string::npos ||
        path.find("/torch.libs/") != std::string::npos)
        found.bundled = path;
    else
        found.other = path, ++found.num_others;
    return 0;
}

}  // namespace

OpenMpParallel torch_openmp() {
    static std::atomic<bool> looked{false};
    static std::atomic<OpenMpParallel> parallel{nullptr};
    if (looked.load(std::memory_order_acquire)) return parallel.load(std::memory_order_relaxed);
    Found found;
    dl_iterate_phdr(look, &found);
    if (!found.torch) return nullptr;
    const std::string& path =
        !found.bundled.empty() || found.num_others != 1 ? found.bundled : found.other;
    if (void* const library =
            path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD))
        parallel.store(reinterpret_cast<OpenMpParallel>(dlsym(library, "GOMP_parallel")));
    looked.store(true, std::memory_order_release);
    return parallel.load(std::memory_order_relaxed);
}

}  // namespace moe_offload
