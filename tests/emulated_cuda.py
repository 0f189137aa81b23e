"""`moe_offload._cuda` without a GPU, for Python tests: the real bindings over the kernels' own
source, which csrc/simt runs on the CPU. Pointers are host memory, so everything around the kernels
can be tested to the last bit: checks, arguments, the backend, paging. Compiled once per run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload import cuda_kernels
from moe_offload.backends.cuda import Cuda

CSRC = Path(__file__).resolve().parent.parent / "csrc"
# What takes long to compile is bindings, and long to run kernels.
SOURCES = {
    "expert_gemm/cuda/bindings.cpp": "-O0",
    "tests/emulated_cuda/emulated_launch.cpp": "-O2",
    "simt/host.cpp": "-O2",
    "simt/fiber.cpp": "-O2",
}


def build(folder: Path) -> types.ModuleType:
    """Compile and load the module; skips the test where that cannot be."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    headers = [Path(sysconfig.get_path("include")), _pybind11()]
    if compiler is None or not all(path.exists() for path in headers):
        pytest.skip("needs a C++ compiler and Python's headers to build the emulated CUDA kernels")
    common = [compiler, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", f"-I{CSRC}"]
    common += [*(f"-I{path}" for path in headers), '-DMOE_OFFLOAD_CUDA_ARCHS="emulated"']
    objects, running = [], []
    for source, optimize in SOURCES.items():
        objects.append(str(folder / f"{Path(source).stem}.o"))
        command = [*common, optimize, "-c", str(CSRC / source), "-o", objects[-1]]
        running.append(subprocess.Popen(command))
    assert [process.wait() for process in running] == [0] * len(running), "does not compile"
    library = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", "-pthread", *objects, "-o", str(library)], check=True)
    # Not "moe_offload._cuda": pybind11 hands out what it has of a name, and the compiled kernels
    # may have been imported before.
    spec = importlib.util.spec_from_file_location("emulated._cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__file__ == str(library), module.__file__
    return module


def _pybind11() -> Path:
    for name in ("pybind11", "torch"):  # torch carries a copy of the headers
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            include = Path(spec.origin).parent / "include"
            if (include / "pybind11").exists():
                return include
    return Path("no pybind11")


def install(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package take it for a built `_cuda`, and the CPU for a GPU of capability 8.0."""
    monkeypatch.setitem(sys.modules, "moe_offload._cuda", module)
    monkeypatch.setattr(cuda_kernels, "missing", lambda: None)
    monkeypatch.setattr(cuda_kernels, "DEVICE_TYPE", "cpu")
    monkeypatch.setattr(Cuda, "devices", ("cuda", "cpu"))
    stream: Any = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
