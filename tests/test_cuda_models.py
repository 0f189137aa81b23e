"""transformers models whose experts are paged "to a GPU": the fake driver, whose memory is the
host's. Everything but the kernels is as on a real one: pinning, streams, the host tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_cuda
import pytest

pytest.importorskip("transformers")

import torch
from tiny_models import plain_model, prompt_ids, tiny_model

import moe_offload
from moe_offload import _core, offloader
from moe_offload.device import ComputeDevice
from moe_offload.errors import DeviceError, StateError
from moe_offload.huggingface.attach import Attachment


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """device="cuda" finds the fake driver, and tensors stay where the host can read them."""
    driver = fake_cuda.load(library)
    driver.fake_cuda_reset()
    driver.fake_cuda_set_delay(1, 100)

    def open_fake(name: str) -> ComputeDevice:
        assert name == "cuda"
        return ComputeDevice(torch.device("cpu"), _core.CudaDevice(0, str(library)))

    monkeypatch.setattr(offloader, "open_device", open_fake)


def generate(model) -> torch.Tensor:
    return model.generate(prompt_ids(), max_new_tokens=12, do_sample=False)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_live_model_generates_the_same_tokens(gpu: None, family: str) -> None:
    model = tiny_model(family)
    want = generate(model)
    paged = moe_offload.offload(
        model, device="cuda", device_budget="30%", expert_backend="grouped_mm"
    )
    assert torch.equal(generate(model), want)
    stats = paged.stats()
    assert stats["copied_bytes"] > 0
    assert stats["pinned_bytes"] > 0
    assert stats["device"] == "cpu"  # of the tensors here; "cuda:0" on a GPU
    paged.restore()
    assert torch.equal(generate(model), want)


@pytest.mark.parametrize("host_budget", ["auto", "50%"])
def test_a_checkpoint_goes_from_disk_through_host_memory(
    gpu: None, tmp_path: Path, host_budget: str
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    want = generate(plain_model(tmp_path))
    model = moe_offload.from_pretrained(
        tmp_path,
        device="cuda",
        device_budget="30%",
        host_budget=host_budget,
        expert_backend="grouped_mm",
    )
    assert torch.equal(generate(model), want)
    stats = moe_offload.get_offloader(model).stats()
    assert stats["disk_bytes"] > 0
    assert (stats["host_evictions"] > 0) == (host_budget == "50%")
    moe_offload.get_offloader(model).close()


def test_a_model_that_does_not_fit_beside_its_slots_comes_back_whole(
    gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("mixtral")
    want = generate(model)

    def move(self: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        if device.type == "cpu":  # the way back
            return self
        raise torch.OutOfMemoryError("CUDA out of memory")

    start = Attachment.start

    def start_elsewhere(self: Attachment, *args: Any) -> Any:
        started = start(self, *args)
        started.device = ComputeDevice(torch.device("meta"), started.device.cuda)
        return started

    monkeypatch.setattr(Attachment, "start", start_elsewhere)
    monkeypatch.setattr(type(model), "to", move)
    with pytest.raises(DeviceError, match="without its experts does not fit on meta beside"):
        moe_offload.offload(model, device="cuda", device_budget="30%", expert_backend="grouped_mm")
    monkeypatch.undo()
    assert torch.equal(generate(model), want)


def test_verify_on_a_gpu_is_refused(gpu: None) -> None:
    model = tiny_model("mixtral")
    with moe_offload.offload(model, device="cuda") as paged:
        paged.device = ComputeDevice(torch.device("cuda"), paged.device.cuda)
        with pytest.raises(StateError, match="verify compares on the CPU"):
            moe_offload.verify(model, [[1, 2, 3]], max_new_tokens=2)
