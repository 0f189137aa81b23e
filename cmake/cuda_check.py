"""`make cuda-check`: build `_cuda` for every architecture, look at its machine code, import it.

No GPU is needed. One CMake build, the one `pip install` runs, makes machine code for six
architectures out of three compilations of each source: nothing in the kernels is for sm_86, sm_89
or sm_120 alone (their PTX differs from that of sm_80 and sm_100 in the line that names the target).
Fails when a kernel spills registers, when the instructions a variant promises are not in its code,
when a test of the module fails, or when building takes over 15 minutes. cuobjdump comes with the
CUDA toolkit or with the triton package.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 15 * 60
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
COMPILED = "80;90a-real;100-real"  # and the others from their PTX:
DERIVED = {"86": "80", "89": "80", "120": "100"}
# Promised machine instructions: tensor cores, 16-byte loads or asynchronous copies, and on sm_90a
# warpgroup products and bulk tensor copies.
PROMISES = {
    "decode_up_kernel": ("HMMA", "LDG.E.*128"),
    "decode_down_kernel": ("HMMA", "LDG.E.*128"),
    "prefill_sm80_kernel": ("HMMA", "LDGSTS", "LDSM"),
    "prefill_sm90_kernel": ("HGMMA", "LDGSTS", "UTMALDG", "USETMAXREG"),
}
# Tests of what is compiled; no test may be left out for want of the module.
TESTS = """
import sys, moe_offload
moe_offload.__path__.insert(0, sys.argv[1])
import pytest, moe_offload._cuda as module
assert module.__file__.startswith(sys.argv[1]), module.__file__
sys.exit(pytest.main(["-q", "tests/test_cuda_kernels.py", "tests/test_doctor.py"]))
"""


def find_cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        sys.exit("cuda-check: needs cuobjdump, of the CUDA toolkit or of the triton package")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def build(folder: Path) -> str:
    """Build `_cuda` in folder/lib; the compiler's log, with what ptxas says of each kernel."""
    derived = [f"-gencode=arch=compute_{of},code=sm_{arch}" for arch, of in DERIVED.items()]
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        *("-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DMOE_OFFLOAD_WERROR=ON", "-DMOE_OFFLOAD_CUDA=ON"),
        f"-DMOE_OFFLOAD_CUDA_ARCHS={COMPILED}",
        f"-DCMAKE_CUDA_FLAGS=-Xptxas=-v {' '.join(derived)}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'lib'}",
    ]
    jobs = ("--parallel", str(os.cpu_count()))
    log = ""
    for command in (configure, ["cmake", "--build", str(folder), "--target", "_cuda", *jobs]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            sys.exit(f"cuda-check: _cuda does not build:\n{done.stdout[-8000:]}")
        log += done.stdout
    return log


def spills(log: str) -> list[str]:
    """A line for each kernel that spills, and for each architecture whose kernels are not there."""
    found, kernel, seen = [], "?", set()
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernel = f"{match[1]} sm_{match[2]}"
            seen.add(match[2])
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spilled and spilled.groups() != ("0", "0"):
            found.append(f"{kernel}: {line.strip()}")
    return found + [
        f"sm_{arch}: no kernel was compiled" for arch in ARCHITECTURES if arch not in seen
    ]


def broken_promises(cuobjdump: str, target: Path) -> list[str]:
    """What is missing in one object file, of all architectures."""
    sass = subprocess.run([cuobjdump, "-sass", str(target)], capture_output=True, text=True).stdout
    missing, seen = [], set()
    # "arch = sm_80" stands before the functions of that architecture, in several lines.
    for part in re.split(r"^arch = sm_", sass, flags=re.MULTILINE)[1:]:
        arch = re.split(r"\W", part, maxsplit=1)[0]
        for body in part.split("Function : ")[1:]:
            name = body.split(None, 1)[0]
            for kernel, instructions in PROMISES.items():
                if kernel not in name or (kernel == "prefill_sm90_kernel" and arch != "90a"):
                    continue
                seen.add(arch)
                missing += [
                    f"sm_{arch} {name}: no {instruction}"
                    for instruction in instructions
                    if not re.search(instruction, body)
                ]
    wanted = ["90a"] if "sm90" in target.name else ARCHITECTURES
    missing += [f"{target.name}: no named kernel for sm_{a}" for a in wanted if a not in seen]
    return missing


def main() -> int:
    start, cuobjdump = time.perf_counter(), find_cuobjdump()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        problems = spills(build(folder))
        built_s = time.perf_counter() - start
        print(f"cuda-check: _cuda is built, {built_s:.0f} s", flush=True)
        if built_s > LIMIT_S:
            problems.append(f"building took {built_s:.0f} s, more than {LIMIT_S}")
        objects = sorted((folder / "CMakeFiles" / "_cuda.dir").rglob("*.cu.o"))
        sources = list((ROOT / "csrc" / "expert_gemm" / "cuda").glob("*.cu"))
        if len(objects) != len(sources):
            problems.append(f"{len(objects)} object files of {len(sources)} sources")
        for found in pool.map(lambda target: broken_promises(cuobjdump, target), objects):
            problems += found
        command = [sys.executable, "-c", TESTS, str(folder / "lib")]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            problems.append("a test with the compiled module fails")
    seconds = time.perf_counter() - start
    print("\n".join(problems) or f"cuda-check: no spills, every promise kept, {seconds:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
