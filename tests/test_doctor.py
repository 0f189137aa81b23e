"""doctor: it tells the truth about this machine, and no probe can make it fail."""

from __future__ import annotations

import ctypes
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_offload import cli, doctor


def test_reports_what_is_here() -> None:
    report = json.loads(json.dumps(doctor.examine()))
    assert report["works"] is True
    assert report["moe_offload"]["core"]["cplusplus"] >= 202002
    assert report["packages"]["torch"] == metadata.version("torch")
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert report["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert 0 < report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]
    assert report["moe_offload"]["cpu_isas"][0] == "plain"
    flags = Path("/proc/cpuinfo").read_text().split()
    assert all(name in flags for name in report["cpu"]["instruction_sets"])
    assert ("avx2" in flags) == ("avx2" in report["cpu"]["instruction_sets"])
    assert report["direct_io"]["temporary"]["io_mode"] in ("direct", "buffered")


def test_text_names_every_package() -> None:
    text = doctor.render(doctor.examine())
    for name in doctor.PACKAGES:
        assert name in text
    assert text.endswith("Ready.")


@pytest.mark.parametrize(
    "probe",
    [
        *("_package", "_python", "_torch", "_cpu", "_memory", "_cuda_driver", "_direct_io"),
        *("_io_uring", "_huge_pages"),
    ],
)
def test_a_failing_probe_is_reported_not_raised(
    probe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise OSError("probe broke")

    monkeypatch.setattr(doctor, probe, fail)
    report = doctor.examine()
    assert "OSError: probe broke" in json.dumps(report)
    doctor.render(report)


def test_without_the_pager_it_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = doctor._import_error

    def import_error(name: str) -> str | None:
        return "ImportError: no _core" if name.endswith("._core") else real(name)

    monkeypatch.setattr(doctor, "_import_error", import_error)
    assert cli.main(["doctor"]) == cli.FAILED
    text = capsys.readouterr().out
    assert "missing (needed): moe_offload._core: the pager; ImportError: no _core" in text
    assert "Not ready" in text


def test_without_transformers_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "moe_offload.huggingface", None)
    report = doctor.examine()
    (entry,) = [e for e in report["missing"] if e["what"] == "transformers support"]
    assert entry["needed"]
    assert entry["how"] == 'pip install "moe-offload[hf]"'


class FakeDriver:
    """libcuda.so.1 as far as doctor uses it."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = 12080
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = f"Card {device.value}".encode()
        return 0


def test_cuda_driver_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    report = doctor._cuda_driver()
    assert report == {"found": True, "supports_cuda": "12.8", "devices": ["Card 0", "Card 1"]}
    assert doctor._cuda_text(report) == "supports CUDA 12.8: Card 0, Card 1"


def test_a_gpu_that_torch_cannot_use_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(torch.version, "cuda", None)
    report = doctor.examine()
    assert "torch with CUDA" in [entry["what"] for entry in report["missing"]]
    assert "this torch is a CPU build" in doctor.render(report)
    assert report["works"]


def test_a_gpu_without_our_kernels_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setitem(sys.modules, "moe_offload._cuda", None)
    report = doctor.examine()
    assert "moe_offload._cuda" in [entry["what"] for entry in report["missing"]]
    text = doctor.render(report)
    assert "experts are computed by Triton or torch instead" in text
    assert "nvcc on PATH" in text
    assert report["works"]


def test_kernels_that_nothing_could_run_are_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_cuda_driver", lambda: {"found": False, "reason": "none"})
    monkeypatch.setitem(sys.modules, "moe_offload._cuda", None)
    report = doctor.examine()
    assert "moe_offload._cuda" not in [entry["what"] for entry in report["missing"]]
    text = " ".join(doctor.render(report).split())
    assert "CUDA kernels not built; no NVIDIA driver here could run them" in text


def test_cuda_driver_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeDriver(status=999))
    assert doctor._cuda_driver() == {
        "found": False,
        "reason": "libcuda.so.1 is there, but cuInit gave error 999",
    }


def test_buffered_reads_are_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_io_mode", lambda folder: {"io_mode": "buffered"})
    report = doctor.examine()
    assert "O_DIRECT in the current directory" in [entry["what"] for entry in report["missing"]]
    assert "no; reads go through the page cache" in doctor.render(report)
    assert report["works"]


def test_the_reason_for_no_io_uring_and_huge_pages_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_io_uring", lambda: {"fallback": "seccomp said no"})
    monkeypatch.setattr(doctor, "_huge_pages", lambda: {"setting": "never"})
    report = doctor.examine()
    assert {"io_uring", "transparent huge pages"} <= {e["what"] for e in report["missing"]}
    text = doctor.render(report)
    assert "missing (optional): io_uring: files are read by a thread pool; seccomp said no" in text
    assert report["works"]


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: "/proc")
    assert "could not be tried" in doctor.render(doctor.examine())


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["works"]
