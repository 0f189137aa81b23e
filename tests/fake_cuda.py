"""The fake CUDA driver (csrc/tests/fake_cuda) for Python tests: built once, steered by ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "csrc" / "tests" / "fake_cuda"


class Counts(ctypes.Structure):
    """FakeCudaCounts in fake_cuda.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("misuses", "pageable_copies", "copies", "readers")),
        *((name, ctypes.c_int64) for name in ("contexts", "streams", "events", "registrations")),
        ("registered_bytes", ctypes.c_int64),
    )


def build(folder: Path) -> Path:
    """Compile the driver into `folder`; skips the test where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler to build the fake CUDA driver")
    library = folder / "libfake_cuda.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread"]
    sources = map(str, SOURCE.glob("*.cpp"))
    subprocess.run([*command, *sources, "-o", str(library)], check=True)
    return library


def load(library: Path) -> ctypes.CDLL:
    driver = ctypes.CDLL(str(library))
    driver.fake_cuda_counts.restype = Counts
    driver.fake_cuda_set_register_limit.argtypes = [ctypes.c_uint64]
    driver.fake_cuda_set_delay.argtypes = [ctypes.c_uint64, ctypes.c_int64]
    return driver
