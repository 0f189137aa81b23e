"""`make cuda-check`: compile every kernel for every architecture and look at the machine code.

No GPU is needed. Fails when a kernel spills registers, when the instructions a variant promises are
not in its code, or when compiling takes over 15 minutes. cuobjdump comes with the CUDA toolkit or
with the triton package.
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

CSRC = Path(__file__).resolve().parent.parent / "csrc"
LIMIT_S = 15 * 60
ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")
# Promised machine instructions: tensor cores, 16-byte loads or asynchronous copies, and on sm_90a
# warpgroup products and bulk tensor copies.
PROMISES = {
    "decode_up_kernel": ("HMMA", "LDG.E.*128"),
    "decode_down_kernel": ("HMMA", "LDG.E.*128"),
    "prefill_sm80_kernel": ("HMMA", "LDGSTS", "LDSM"),
    "prefill_sm90_kernel": ("HGMMA", "LDGSTS", "UTMALDG", "USETMAXREG"),
}


def find_cuobjdump() -> str | None:
    if found := shutil.which("cuobjdump"):
        return found
    try:
        import triton
    except ImportError:
        return None
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


def compile_one(nvcc: str, source: Path, arch: str, folder: Path) -> tuple[Path, list[str]]:
    """The object file, and a line for each kernel that spills."""
    target = folder / f"{source.stem}_{arch}.o"
    code = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [nvcc, "-std=c++20", "-O3", code, f"-I{CSRC}", "-Xptxas", "-v", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"cuda-check: {source.name} does not compile for sm_{arch}:\n{done.stderr[:4000]}")
    spills, kernel = [], "?"
    for line in (done.stdout + done.stderr).splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            kernel = match[1]
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spilled and spilled.groups() != ("0", "0"):
            spills.append(f"{source.name} sm_{arch} {kernel}: {line.strip()}")
    return target, spills


def broken_promises(cuobjdump: str, target: Path, arch: str) -> list[str]:
    sass = subprocess.run([cuobjdump, "-sass", str(target)], capture_output=True, text=True).stdout
    missing, seen = [], 0
    for body in sass.split("Function : ")[1:]:
        name = body.split(None, 1)[0]
        for kernel, instructions in PROMISES.items():
            if kernel not in name or (kernel == "prefill_sm90_kernel" and arch != "90a"):
                continue
            seen += 1
            missing += [
                f"sm_{arch} {name}: no {instruction}"
                for instruction in instructions
                if not re.search(instruction, body)
            ]
    if not seen and (arch == "90a" or "sm90" not in target.name):
        missing.append(f"{target.name}: none of the named kernels is in it")
    return missing


def main() -> int:
    nvcc, cuobjdump = shutil.which("nvcc"), find_cuobjdump()
    if nvcc is None or cuobjdump is None:
        sys.exit("cuda-check: needs nvcc on PATH and cuobjdump (of the toolkit or of triton)")
    architectures = sys.argv[1:] or ARCHITECTURES
    start, problems = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def problems_of(source: Path, arch: str) -> list[str]:
            target, spills = compile_one(nvcc, source, arch, Path(folder))
            found = spills + broken_promises(cuobjdump, target, arch)
            print(f"{source.name} sm_{arch}: compiled, {time.perf_counter() - start:.0f} s")
            return found

        sources = sorted((CSRC / "expert_gemm" / "cuda").glob("*.cu"))
        jobs = [
            pool.submit(problems_of, source, arch) for source in sources for arch in architectures
        ]
        for job in jobs:
            problems += job.result()
    seconds = time.perf_counter() - start
    if seconds > LIMIT_S:
        problems.append(f"compiling took {seconds:.0f} s, more than {LIMIT_S}")
    print("\n".join(problems) or f"cuda-check: no spills, every promise kept, {seconds:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
