"""The package as users get it: what a source distribution, a wheel and an editable install hold.

One fixture makes the source distribution of a clean copy (an old egg-info would lend it its list of
files), unpacks it and builds the wheel and the editable wheel there, so a file missing from the
distribution shows up as a failed build. The results are imported by an interpreter without
site-packages (`python -S`): neither torch nor the environment's own moe_offload can hide a mistake.
The native module is linked from the objects of the checkout's own build, which `make test` has just
made of the same sources (that they are the same is tested), or where there are none compiled in the
least time: without optimisation and without the kernels of single instruction sets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import moe_offload

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
# In front of each call of the compiler: copies the object file if OBJECTS has it.
REUSE = """#!/bin/sh
for argument; do
    test "$previous" = -o && object=$argument
    previous=$argument
done
test -f "$OBJECTS/$object" && exec cp "$OBJECTS/$object" "$object"
exec "$@"
"""
BUILD = """
import sys
from setuptools import build_meta
kind, out = sys.argv[1:]
getattr(build_meta, "build_" + kind)(out)
"""


@dataclass(frozen=True)
class Built:
    sdist_names: set[str]
    wheel_names: set[str]
    wheel: Path  # the unpacked wheel, to be put on PYTHONPATH
    editable: Path  # the unpacked editable wheel, to be added as a site folder
    source: Path  # the unpacked source distribution, which the editable wheel points to


def run_python(
    *args: str, cwd: Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=200,
    )


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir()
    env = {
        "CMAKE_ARGS": "-DMOE_OFFLOAD_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O0 "
        "-DMOE_OFFLOAD_ISA_KERNELS=OFF"
    }
    if (OBJECTS / "CMakeFiles" / "_core.dir").exists():
        launcher = out.with_suffix(".sh")
        launcher.write_text(REUSE)
        launcher.chmod(0o755)
        env["CMAKE_ARGS"] = f"-DMOE_OFFLOAD_CUDA=OFF -DCMAKE_CXX_COMPILER_LAUNCHER={launcher}"
        env["OBJECTS"] = str(OBJECTS)
    result = run_python("-c", BUILD, kind, str(out), cwd=source, env=env)
    assert result.returncode == 0, f"{kind}:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    (archive,) = out.iterdir()
    return archive


def stale_cuda(source: Path) -> Path:
    """Where an in-place build that had nvcc would have left its module."""
    return source / "moe_offload" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    if not (ROOT / "setup.py").exists():
        pytest.skip("needs the source tree")
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools >= 77")
    pytest.importorskip("pybind11", reason="building needs pybind11 (pip install -e '.[dev]')")
    pytest.importorskip("cmake", reason="building needs cmake (pip install -e '.[dev]')")

    work = tmp_path_factory.mktemp("packaging")
    others = shutil.ignore_patterns(".*", "build", "dist", "bench", "*.egg-info", "*.so")
    shutil.copytree(ROOT, work / "clean", symlinks=True, ignore=others)
    with tarfile.open(build("sdist", work / "clean", work / "sdist")) as archive:
        sdist_names = {name.partition("/")[2] for name in archive.getnames()}
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(work / "unpacked", **safely)
    (source,) = (work / "unpacked").iterdir()
    stale_cuda(source).touch()
    unpacked = {}
    for kind in ("wheel", "editable"):
        with zipfile.ZipFile(build(kind, source, work / kind)) as archive:
            unpacked[kind] = set(archive.namelist())
            archive.extractall(work / f"{kind}_site")
    return Built(
        sdist_names, unpacked["wheel"], work / "wheel_site", work / "editable_site", source
    )


def native_modules(names: set[str]) -> set[str]:
    return {Path(name).name.partition(".")[0] for name in names if name.endswith(".so")}


def test_wheel_holds_one_top_level_package(built: Built) -> None:
    top_level = {name.split("/")[0] for name in built.wheel_names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"moe_offload"}


def test_wheel_holds_native_module_model_and_type_marker(built: Built) -> None:
    assert "_core" in native_modules(built.wheel_names)
    model = {
        f"moe_offload/models/{path.relative_to(ROOT / 'moe_offload' / 'models').as_posix()}"
        for path in (ROOT / "moe_offload" / "models" / "tiny_moe").rglob("*")
        if path.is_file()
    }
    wanted = {"moe_offload/py.typed", "moe_offload/triton_kernels/__init__.py", *model}
    assert wanted <= built.wheel_names, f"missing: {sorted(wanted - built.wheel_names)}"


def test_wheel_holds_no_sources_of_the_native_module(built: Built) -> None:
    suffixes = (".cpp", ".h", ".cu", ".cuh", "CMakeLists.txt")
    assert not [name for name in built.wheel_names if name.endswith(suffixes)]


def test_wheel_declares_the_console_script(built: Built) -> None:
    (metadata,) = built.wheel.glob("*.dist-info")
    assert "moe-offload = moe_offload.cli:main" in (metadata / "entry_points.txt").read_text()
    assert {"moe_offload/cli.py", "moe_offload/cli/__init__.py"} & built.wheel_names
    assert f"Version: {moe_offload.__version__}\n" in (metadata / "METADATA").read_text()


def test_source_distribution_holds_every_native_source(built: Built) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "cmake", "triton_kernels")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {"csrc/bindings.cpp", "cmake/cuda_archs.cmake"} <= sources
    sources |= {"CMakeLists.txt", "setup.py", "LICENSE"}
    missing = sources - built.sdist_names
    assert not missing, f"missing: {sorted(missing)}"
    other = [n for n in sources if (built.source / n).read_bytes() != (ROOT / n).read_bytes()]
    assert not other, f"not those of the checkout: {sorted(other)}"
    assert not native_modules(built.sdist_names)


SHOW = """
import moe_offload._core as core, moe_offload.triton_kernels as kernels, importlib.util
print(core.__file__)
print(kernels.__file__)
print(importlib.util.find_spec("triton_kernels"))
"""


def test_wheel_imports_native_module_and_triton_kernels(built: Built, tmp_path: Path) -> None:
    result = run_python("-S", "-c", SHOW, cwd=tmp_path, env={"PYTHONPATH": str(built.wheel)})
    assert result.returncode == 0, result.stderr
    core, kernels, top_level = result.stdout.splitlines()
    assert Path(core).parent == built.wheel / "moe_offload"
    assert Path(kernels) == built.wheel / "moe_offload" / "triton_kernels" / "__init__.py"
    assert top_level == "None"


def test_editable_install_imports_from_the_source_tree(built: Built, tmp_path: Path) -> None:
    code = f"import site; site.addsitedir({str(built.editable)!r})\n{SHOW}"
    result = run_python("-S", "-c", code, cwd=tmp_path, env={"PYTHONPATH": ""})
    assert result.returncode == 0, result.stderr
    core, kernels, top_level = result.stdout.splitlines()
    assert Path(core).parent == built.source / "moe_offload"
    assert Path(kernels).resolve() == built.source / "triton_kernels" / "__init__.py"
    assert top_level == "None"


def test_editable_install_without_cuda_removes_an_earlier_one(built: Built) -> None:
    gone = stale_cuda(built.source)
    assert gone.with_name(gone.name.replace("_cuda", "_core")).exists()
    assert not gone.exists()


def test_triton_kernels_refuses_its_top_level_name() -> None:
    result = run_python("-S", "-c", "import triton_kernels", cwd=ROOT)
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: 'triton_kernels' was found in moe_offload's source")
    assert "import moe_offload.triton_kernels" in last_line


def test_import_starts_nothing_and_prints_nothing() -> None:
    code = """
import os, sys
def threads(): return len(os.listdir("/proc/self/task"))
before = threads()
import moe_offload
heavy = [name for name in ("torch", "transformers", "triton", "numpy") if name in sys.modules]
assert not heavy, f"import moe_offload imported {heavy}"
assert threads() == before, f"import moe_offload started {threads() - before} threads"
"""
    result = run_python("-c", code, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_native_module_starts_no_thread_and_needs_no_torch() -> None:
    code = """
import os, sys
before = len(os.listdir("/proc/self/task"))
import moe_offload._core
assert "torch" not in sys.modules
assert len(os.listdir("/proc/self/task")) == before
"""
    result = run_python("-c", code, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
