"""What this machine and this installation have, and what is missing: `moe-offload doctor`.

Every probe answers for itself and none may raise: this is what runs when something is broken.
O_DIRECT is tried with the pager's own file source, so the answer is the one a model will get.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import moe_offload
from moe_offload.config import format_bytes
from moe_offload.memory import available_memory_bytes
from moe_offload.presets import PRESETS

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "triton")
# Those that decide which kernels can run: oneDNN's bf16 needs the later ones to be fast.
INSTRUCTION_SETS = (
    *("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve"),
)


def examine() -> dict[str, Any]:
    """Run every probe; JSON-ready. `missing` lists what to install, `needed` first."""
    report: dict[str, Any] = {
        "moe_offload": _safely(_package),
        "python": _safely(_python),
        "presets": {name: {"lossy": preset.lossy} for name, preset in PRESETS.items()},
        "packages": {name: _version(name) for name in PACKAGES},
        "torch": _safely(_torch),
        "cpu": _safely(_cpu),
        "memory": _safely(_memory),
        "cuda_driver": _safely(_cuda_driver),
        "direct_io": {
            "current": _safely(partial(_direct_io, os.getcwd)),  # it may have been deleted
            "temporary": _safely(partial(_direct_io, tempfile.gettempdir)),
        },
        "io_uring": _safely(_io_uring),
        "huge_pages": _safely(_huge_pages),
    }
    report["missing"] = _missing(report)
    report["works"] = not any(entry["needed"] for entry in report["missing"])
    return report


def _safely(probe: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(name: str) -> str | None:
    try:
        importlib.import_module(name)
    except Exception as error:  # also a library that does not load: its message is the finding
        return f"{type(error).__name__}: {error}"
    return None


def _package() -> dict[str, Any]:
    core_error = _import_error("moe_offload._core")
    found: dict[str, Any] = {
        "version": moe_offload.__version__,
        "folder": str(Path(moe_offload.__file__).parent),
        "core": None,
        "core_error": core_error,
        "cuda_kernels": _import_error("moe_offload._cuda") is None,
        "triton_kernels": _import_error("moe_offload.triton_kernels") is None,
        "tiny_model": _tiny_model_present(),
        "huggingface_error": _import_error("moe_offload.huggingface"),
        "expert_backends": {},
    }
    if core_error is None:
        found["expert_backends"] = importlib.import_module("moe_offload.backends").describe()
        found["cpu_isas"] = importlib.import_module("moe_offload._core").cpu_isas("bfloat16")
        found["core"] = dict(importlib.import_module("moe_offload._core").build_info())
    return found


def _tiny_model_present() -> bool:
    from moe_offload.models import tiny_moe_path

    return (tiny_moe_path() / "model.safetensors").is_file()


def _python() -> dict[str, Any]:
    return {
        "version": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
    }


def _torch() -> dict[str, Any]:
    import torch

    return {
        "cuda_build": torch.version.cuda,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu() -> dict[str, Any]:
    words: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        words.setdefault(key.strip().lower(), value.strip())
    flags = set((words.get("flags") or words.get("features") or "").split())
    return {
        "model": words.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
    }


def _memory() -> dict[str, Any]:
    def limit(name: int) -> int | None:
        soft, _ = resource.getrlimit(name)
        return None if soft == resource.RLIM_INFINITY else soft

    return {
        "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "available_bytes": available_memory_bytes(),
        "address_space_limit_bytes": limit(resource.RLIMIT_AS),
        "locked_memory_limit_bytes": limit(resource.RLIMIT_MEMLOCK),
        "open_files_limit": limit(resource.RLIMIT_NOFILE),
    }


def _cuda_driver() -> dict[str, Any]:
    """Asks the driver library itself: torch may be a CPU build on a machine with a GPU."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {"found": False, "reason": "libcuda.so.1 is not installed"}
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    status = cuda.cuInit(0)
    if status != 0:
        return {"found": False, "reason": f"libcuda.so.1 is there, but cuInit gave error {status}"}
    cuda.cuDriverGetVersion(ctypes.byref(version))
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = []
    for index in range(count.value):
        device, name = ctypes.c_int(0), ctypes.create_string_buffer(256)
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        devices.append(name.value.decode(errors="replace"))
    major, minor = version.value // 1000, version.value % 1000 // 10
    return {"found": True, "supports_cuda": f"{major}.{minor}", "devices": devices}


def _direct_io(find_folder: Callable[[], str]) -> dict[str, Any]:
    folder = find_folder()
    return {"folder": folder, **_safely(partial(_io_mode, folder))}


def _io_mode(folder: str) -> dict[str, Any]:
    from moe_offload import _core

    with tempfile.NamedTemporaryFile(dir=folder, prefix="moe_offload_doctor_") as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())
        return {"io_mode": _core.FileSource([file.name], True).io_mode}


def _io_uring() -> dict[str, Any]:
    from moe_offload import _core

    return {"fallback": _core.why_no_io_uring() or None}


def _huge_pages() -> dict[str, Any]:
    text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return {"setting": text.partition("[")[2].partition("]")[0]}


def _missing(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What is absent, what it is for, and how to get it."""
    package = report["moe_offload"]
    entries = []
    if package.get("core") is None:
        why = package.get("core_error") or package.get("error")
        how = "pip install . (needs a C++20 compiler), in a checkout: setup.py build_ext --inplace"
        entries.append(_entry(True, "moe_offload._core", f"the pager; {why}", how))
    if package.get("huggingface_error"):
        how = 'pip install "moe-offload[hf]"'
        entries.append(_entry(True, "transformers support", package["huggingface_error"], how))
    elif report["packages"]["accelerate"] is None:
        why = "device maps, and the disk-offload baseline of the benchmarks"
        entries.append(_entry(False, "accelerate", why, 'pip install "moe-offload[hf]"'))
    if not package.get("tiny_model"):
        why = "`moe-offload demo` and the model name `tiny`"
        how = "install from a complete checkout or from the wheel"
        entries.append(_entry(False, "the packaged tiny model", why, how))
    for name, mode in report["direct_io"].items():
        if mode.get("io_mode") == "buffered":
            why = f"{mode['folder']} has none; pages read from there go through the page cache"
            how = "keep checkpoints on a file system with O_DIRECT (ext4, xfs, btrfs, NVMe)"
            entries.append(_entry(False, f"O_DIRECT in the {name} directory", why, how))
    if report["io_uring"].get("fallback"):
        why = f"files are read by a thread pool; {report['io_uring']['fallback']}"
        how = "allow it: sysctl kernel.io_uring_disabled=0, the container's seccomp profile"
        if "liburing" in report["io_uring"]["fallback"]:
            how = "apt install liburing-dev, then install moe_offload again"
        entries.append(_entry(False, "io_uring", why, how))
    if report["huge_pages"].get("setting") == "never":
        why = "reads from disk cost more CPU time, on virtual disks they are slower as well"
        how = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (as root)"
        entries.append(_entry(False, "transparent huge pages", why, how))
    if report["cuda_driver"].get("found") and not report["torch"].get("cuda_build"):
        why = 'a GPU is here, but this torch is a CPU build: device="cuda" is refused'
        how = "install a torch built for CUDA"
        entries.append(_entry(False, "torch with CUDA", why, how))
    elif report["cuda_driver"].get("found") and not package.get("cuda_kernels"):
        why = "a GPU is here; its experts are computed by Triton or torch instead"
        how = "install moe_offload again with the CUDA toolkit's nvcc on PATH"
        entries.append(_entry(False, "moe_offload._cuda", why, how))
    return entries


def _entry(needed: bool, what: str, why: str, how: str) -> dict[str, Any]:
    return {"needed": needed, "what": what, "why": why, "how": how}


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    package, torch, cpu = report["moe_offload"], report["torch"], report["cpu"]
    core = package.get("core")
    versions = [f"{name} {version or 'absent'}" for name, version in report["packages"].items()]
    rows = [
        ("moe_offload", f"{package.get('version')} in {package.get('folder')}"),
        ("pager (_core)", _built(core) if core else f"NOT BUILT: {package.get('core_error')}"),
        ("expert backends", _backends_text(package.get("expert_backends", {}))),
        ("native kernels (bf16)", ", ".join(package.get("cpu_isas", [])) or "none"),
        ("presets", _presets_text()),
        ("CUDA kernels", _cuda_kernels_text(package, report["cuda_driver"])),
        ("tiny model", "present" if package.get("tiny_model") else "absent"),
        ("python", f"{report['python'].get('version')}, {report['python'].get('platform')}"),
        ("packages", ", ".join(versions)),
        ("torch", torch.get("error") or _torch_text(torch)),
        ("processor", cpu.get("error") or f"{cpu['cores']} cores, {cpu['model']}"),
        ("instructions", " ".join(cpu.get("instruction_sets", [])) or "none of those looked for"),
        ("memory", _memory_text(report["memory"])),
        ("limits", _limits_text(report["memory"])),
        ("CUDA driver", _cuda_text(report["cuda_driver"])),
    ]
    for name, mode in report["direct_io"].items():
        found = {"direct": "yes", "buffered": "no; reads go through the page cache"}
        text = found.get(mode.get("io_mode", ""), f"could not be tried: {mode.get('error')}")
        rows.append((f"O_DIRECT, {name}", f"{text} ({mode.get('folder', '?')})"))
    uring, huge = report["io_uring"], report["huge_pages"]
    rows.append(("io_uring", uring.get("error") or uring["fallback"] or "yes"))
    rows.append(("huge pages", huge.get("error") or huge["setting"]))
    lines = [f"{name:<22}{text}" for name, text in rows]
    lines.append("")
    for entry in report["missing"]:
        kind = "needed" if entry["needed"] else "optional"
        lines.append(f"missing ({kind}): {entry['what']}: {entry['why']}. Get it: {entry['how']}")
    lines.append("Ready." if report["works"] else "Not ready: see what is needed above.")
    return "\n".join(lines)


def _built(core: dict[str, Any]) -> str:
    standard = str(core["cplusplus"])[2:4]  # 202002 is C++20
    return f"built: C++{standard}, compiler {core['compiler']}, pybind11 {core['pybind11']}"


def _backends_text(backends: dict[str, str | None]) -> str:
    """Fastest first; "auto" takes the first that supports a layer."""
    texts = [f"{name} (not here: {why})" if why else name for name, why in backends.items()]
    return ", ".join(texts) or "none"


def _torch_text(torch: dict[str, Any]) -> str:
    build = f"CUDA {torch['cuda_build']} build" if torch["cuda_build"] else "CPU build"
    return f"{build}, {torch['cpu_capability']} kernels, {torch['threads']} threads"


def _presets_text() -> str:
    names = (f"{name} (CHANGES TOKENS)" if p.lossy else name for name, p in PRESETS.items())
    return ", ".join(names)


def _memory_text(memory: dict[str, Any]) -> str:
    if "error" in memory:
        return memory["error"]
    total, available = memory["total_bytes"], memory["available_bytes"]
    return f"{format_bytes(available)} available of {format_bytes(total)}"


def _limits_text(memory: dict[str, Any]) -> str:
    def text(name: str) -> str:
        value = memory.get(name)
        if value is None:
            return "unlimited"
        return format_bytes(value) if name.endswith("_bytes") else str(value)

    return (
        f"address space {text('address_space_limit_bytes')}, locked memory "
        f"{text('locked_memory_limit_bytes')}, open files {text('open_files_limit')}"
    )


def _cuda_kernels_text(package: dict[str, Any], driver: dict[str, Any]) -> str:
    if package.get("cuda_kernels"):
        return "built"
    return "not built" if driver.get("found") else "not built; no NVIDIA driver here could run them"


def _cuda_text(driver: dict[str, Any]) -> str:
    if not driver.get("found"):
        return f"none: {driver.get('reason') or driver.get('error')}"
    return f"supports CUDA {driver['supports_cuda']}: {', '.join(driver['devices']) or 'no device'}"
