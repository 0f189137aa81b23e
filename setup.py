"""Builds the native modules with CMake; everything else about the package is in pyproject.toml.

One CMake project builds `_core` (always) and `_cuda` (when it can), so this file only finds the
tools, runs them, and copies the modules to where setuptools wants them. Not obvious:

- The build tree is `build/cmake-<python>`, also for `pip install -e`, where setuptools would take a
  fresh temporary folder: an edit then recompiles one file instead of all. It is thrown away when a
  tool or option changed, because pip's isolated builds leave paths to deleted tools in the cache.
- An in-place build links `moe_offload/triton_kernels` to the top-level folder, so that a checkout
  that was never installed, and mypy, see the package under the name it has when installed.

`CMAKE_ARGS` in the environment is passed on, for example `CMAKE_ARGS=-DMOE_OFFLOAD_WERROR=ON`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
BUILD_DIR = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"


def find_tool(name: str) -> str | None:
    """The tool on PATH, else beside the interpreter (a virtual environment not activated)."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def run(command: list[str], what: str) -> None:
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise CompileError(
            f"moe_offload: {what} failed; CMake's or the compiler's own message is above. "
            f"The command was: {shlex.join(command)}"
        )


class CMakeBuild(build_ext):
    """`build_ext` whose modules come out of one CMake run."""

    def run(self) -> None:
        if self.inplace:
            link_triton_kernels()
        self.run_cmake()
        if self.inplace:
            for module in map(self.get_ext_filename, ("moe_offload._core", "moe_offload._cuda")):
                if not (BUILD_DIR / "lib" / Path(module).name).exists():
                    (ROOT / module).unlink(missing_ok=True)  # of other sources or options
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        built = BUILD_DIR / "lib" / target.name
        if built.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(built), str(target))
        elif not ext.optional:
            raise CompileError(f"moe_offload: CMake finished but did not write {built}")

    def run_cmake(self) -> None:
        cmake = find_tool("cmake")
        if cmake is None:
            raise CompileError(
                "moe_offload: building needs CMake 3.20 or newer, found none. "
                "Use `pip install .` (it fetches CMake by itself), or `pip install cmake ninja`."
            )
        configure = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={BUILD_DIR / 'lib'}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        if ninja := find_tool("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        else:
            configure += ["-G", "Unix Makefiles"]

        stamp = BUILD_DIR / "moe_offload_configure.txt"
        key = "\n".join([cmake, *configure, os.environ.get("CXX", "")])
        if BUILD_DIR.exists() and (not stamp.exists() or stamp.read_text() != key):
            shutil.rmtree(BUILD_DIR)
        BUILD_DIR.mkdir(parents=True, exist_ok=True)
        run([cmake, "-S", str(ROOT), "-B", str(BUILD_DIR), *configure], "configuring")
        stamp.write_text(key)
        num_jobs = self.parallel or os.cpu_count() or 1
        run([cmake, "--build", str(BUILD_DIR), "--parallel", str(num_jobs)], "compiling")


def link_triton_kernels() -> None:
    link = ROOT / "moe_offload" / "triton_kernels"
    if not link.exists():
        link.symlink_to(Path("..") / "triton_kernels", target_is_directory=True)


def packages() -> list[str]:
    """The import packages; the folder triton_kernels is installed as moe_offload.triton_kernels."""
    nested = [f"moe_offload.triton_kernels.{name}" for name in find_packages("triton_kernels")]
    own = find_packages(include=["moe_offload", "moe_offload.*"])
    return sorted({*own, "moe_offload.triton_kernels", *nested})


setup(
    packages=packages(),
    package_dir={"moe_offload.triton_kernels": "triton_kernels"},
    ext_modules=[
        Extension("moe_offload._core", sources=[]),
        # Built by CMake when it finds a CUDA compiler and kernels in csrc/expert_gemm/cuda.
        Extension("moe_offload._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
