// Which kernels this machine runs: compiled in (CMakeLists.txt defines MOE_HAVE_*), offered by the
// processor and, for AMX, granted by the kernel. Asked once.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "expert_gemm/cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moe_offload {

const Kernels* plain_kernels(Dtype);
const Kernels* avx2_kernels(Dtype);
const Kernels* avx512_kernels(Dtype);
const Kernels* avx512_bf16_kernels(Dtype);
const Kernels* amx_kernels(Dtype);
const Kernels* amx_emulated_kernels(Dtype);

namespace {

constexpr const char* kNames[] = {"plain", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated"};

#if defined(__x86_64__)
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
}
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tile registers are large state that Linux (5.16 and newer) grants a process on request.
bool has_amx() {
#if defined(__linux__)
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & (1u << 22)) || !(d & (1u << 24))) return false;  // AMX-BF16, AMX-TILE
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool offered(Isa isa) {
    switch (isa) {
        case Isa::kPlain:
        case Isa::kAmxEmulated:
            return true;
#if defined(__x86_64__)
        case Isa::kAvx2: {
            static const bool found = has_avx2();
            return found;
        }
        case Isa::kAvx512: {
            static const bool found = has_avx512();
            return found;
        }
        case Isa::kAvx512Bf16: {
            static const bool found = has_avx512_bf16();
            return found;
        }
        case Isa::kAmx: {
            static const bool found = has_amx();
            return found;
        }
#endif
        default:
            return false;
    }
}

}  // namespace

const Kernels* kernels_for(Isa isa, Dtype dtype) {
    if (!offered(isa)) return nullptr;
    switch (isa) {
        case Isa::kPlain:
            return plain_kernels(dtype);
        case Isa::kAmxEmulated:
            return amx_emulated_kernels(dtype);
#if defined(MOE_HAVE_AVX2)
        case Isa::kAvx2:
            return avx2_kernels(dtype);
#endif
#if defined(MOE_HAVE_AVX512)
        case Isa::kAvx512:
            return avx512_kernels(dtype);
#endif
#if defined(MOE_HAVE_AVX512_BF16)
        case Isa::kAvx512Bf16:
            return avx512_bf16_kernels(dtype);
#endif
#if defined(MOE_HAVE_AMX)
        case Isa::kAmx:
            return amx_kernels(dtype);
#endif
        default:
            return nullptr;
    }
}

const Kernels* best_kernels(Dtype dtype) {
    for (const Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2})
        if (const Kernels* found = kernels_for(isa, dtype)) return found;
    return kernels_for(Isa::kPlain, dtype);
}

const Kernels* kernels_named(const std::string& isa, Dtype dtype) {
    std::string wanted = isa;
    if (wanted.empty() || wanted == "auto") {
        const char* forced = std::getenv("MOE_OFFLOAD_CPU_ISA");
        wanted = forced ? forced : "";
    }
    if (wanted.empty() || wanted == "auto") return best_kernels(dtype);
    std::string here;
    for (int32_t i = 0; i < 6; ++i) {
        const Kernels* found = kernels_for(static_cast<Isa>(i), dtype);
        if (found && wanted == kNames[i]) return found;
        if (found) here += std::string(here.empty() ? "" : ", ") + kNames[i];
    }
    throw std::invalid_argument("CPU kernels: expected one of " + here +
                                " (what this machine has for this dtype), got \"" + wanted + "\"");
}

}  // namespace moe_offload
