"""Paging to a GPU, on the fake driver: "device" memory is host memory, so that whole models run and
are compared bit for bit with what the CPU path computes. What only a GPU can show is in
tests/test_gpu_paging.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import fake_cuda
import pytest
import torch
from experts import random_routing, random_weights, resident, write_page_file

from moe_offload import _core
from moe_offload.backends import choose
from moe_offload.budgets import plan_host
from moe_offload.config import OffloadConfig
from moe_offload.device import ComputeDevice, check_capability, open_device
from moe_offload.errors import BudgetError, DeviceError, PageReadError, UnsupportedModelError
from moe_offload.layer import OffloadedExperts, _as_layer, run_experts
from moe_offload.offloader import Offloader
from moe_offload.pages import PageLayout
from moe_offload.sources import CallbackPages, FilePages, TensorPages

E, H, F, A, LAYERS = 8, 48, 32, 3, 3


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))


@pytest.fixture
def driver(library: Path) -> ctypes.CDLL:
    driver = fake_cuda.load(library)
    driver.fake_cuda_reset()
    return driver


@pytest.fixture
def device(library: Path, driver: ctypes.CDLL) -> ComputeDevice:
    return ComputeDevice(torch.device("cpu"), _core.CudaDevice(0, str(library)))


@pytest.fixture
def layers() -> list[dict[str, torch.Tensor]]:
    return [random_weights(E, H, F, torch.bfloat16, seed=layer) for layer in range(LAYERS)]


def _exact(**options) -> OffloadConfig:
    """The arithmetic of `resident`, to the bit."""
    return OffloadConfig.from_options(expert_backend="grouped_mm", **options)


def offloader_over_tensors(layers, device, **options) -> Offloader:
    pages, described = TensorPages(), []
    for index, weights in enumerate(layers):
        pages.add_layer(index, weights)
        described.append(_as_layer(weights, f"layers.{index}", "silu"))
    return Offloader(described, pages, _exact(**options), device=device)


def check_exact(offloader: Offloader, layers, rounds: int = 6) -> None:
    generator = torch.Generator().manual_seed(5)
    module = torch.nn.Module().eval()
    for step in range(rounds):
        for index, weights in enumerate(layers):
            tokens = 1 + 7 * (step % 3)
            hidden = torch.randn(tokens, H, generator=generator).to(torch.bfloat16)
            ids, topk = random_routing(tokens, E, A, generator)
            got = run_experts(offloader.handle(index), module, hidden, ids, topk)
            assert torch.equal(got, resident(weights, hidden, ids, topk, "grouped_mm"))


@pytest.mark.parametrize("budget", ["10%", "40%", "100%"])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_live_tensors_are_exact_and_pinned_where_they_lie(
    device, driver, layers, budget, policy
) -> None:
    with offloader_over_tensors(layers, device, device_budget=budget, policy=policy) as offloader:
        offloader.wait_until_pinned()
        driver.fake_cuda_set_delay(7, 100)
        check_exact(offloader, layers)
        stats = offloader.stats()
        assert stats["copied_bytes"] == stats["demand_bytes"] + stats["fill_bytes"] > 0
        assert stats["disk_bytes"] == 0
        assert stats["pinned_bytes"] > sum(t.nbytes for w in layers for t in w.values())
        assert stats["pinning_limit"] is None
        assert driver.fake_cuda_counts().pageable_copies == 0
    counts = driver.fake_cuda_counts()
    assert (counts.misuses, counts.registrations, counts.streams) == (0, 0, 0)


@pytest.mark.parametrize("host_budget", ["25%", "100%"])
def test_files_go_through_a_bounded_host_tier(
    device, driver, layers, tmp_path, host_budget
) -> None:
    described, pages = write_page_file(tmp_path / "pages", layers)
    config = _exact(device_budget="25%", host_budget=host_budget)
    described = [_as_layer(w, f"layers.{i}", "silu") for i, w in enumerate(layers)]
    with Offloader(described, pages, config, device=device) as offloader:
        driver.fake_cuda_set_delay(3, 50)
        check_exact(offloader, layers)
        first = offloader.stats()
        check_exact(offloader, layers)
        second = offloader.stats()
    frame = _core.host_frame_bytes(offloader.pools[0].layout.page_bytes)
    share = {"25%": 6, "100%": 24}[host_budget]
    assert first["host_bytes"] == share * frame
    assert first["host_hits"] + first["host_misses"] >= first["demand_misses"]
    if host_budget == "100%":  # everything was read once, and never again
        assert second["disk_bytes"] == first["disk_bytes"] > 0
        assert second["host_evictions"] == 0
    else:
        assert second["disk_bytes"] > first["disk_bytes"]
        assert second["host_evictions"] > 0


def test_converted_pages_go_through_the_host_tier(device, layers) -> None:
    pages = CallbackPages(lambda layer, expert: {n: t[expert] for n, t in layers[layer].items()})
    described = [_as_layer(w, f"layers.{i}", "silu") for i, w in enumerate(layers)]
    with Offloader(described, pages, _exact(), device=device) as offloader:
        check_exact(offloader, layers)


def test_what_cannot_be_pinned_still_arrives_and_is_reported(device, driver, layers) -> None:
    driver.fake_cuda_set_register_limit(8 * 512 * 1024 + 4096)  # the staging buffers, and one page
    with offloader_over_tensors(layers, device) as offloader:
        check_exact(offloader, layers)
        stats = offloader.stats()
        assert stats["staged_bytes"] > 0
        assert "refused to pin more than" in stats["pinning_limit"]
    with offloader_over_tensors(layers, device, host_budget=4096) as offloader:
        check_exact(offloader, layers)
        assert "refused" in offloader.stats()["pinning_limit"] or offloader.stats()["staged_bytes"]


def test_hostile_timing_changes_nothing(device, driver, layers) -> None:
    with offloader_over_tensors(layers, device, device_budget="20%") as offloader:
        driver.fake_cuda_set_delay(11, 200)
        offloader.chaos(3, max_delay_us=200, reorder=True, evict_probability=0.2)
        for index in range(LAYERS):
            offloader.prefetch(index, [0, 5])
        check_exact(offloader, layers)
        offloader.chaos(4, fail_probability=1.0, evict_probability=1.0)
        with pytest.raises(PageReadError, match="injected failure"):
            check_exact(offloader, layers)
        offloader.chaos()
        for pool in offloader.pools:
            pool.pager.drain()  # copies of that call still fail, and a demand may join them
        check_exact(offloader, layers)


def test_a_refused_copy_names_the_page_and_leaves_the_pager_usable(device, driver, layers) -> None:
    with offloader_over_tensors(layers, device, device_budget="20%") as offloader:
        driver.fake_cuda_fail(b"cuMemcpyHtoDAsync", 1, 0, 1)
        with pytest.raises(
            PageReadError, match=r"layer 0 .*cuMemcpyHtoDAsync failed with CUDA_ERR"
        ):
            check_exact(offloader, layers)
        check_exact(offloader, layers)


def test_resize_and_several_offloaders_on_one_device(device, driver, layers) -> None:
    with (
        offloader_over_tensors(layers, device, device_budget="50%") as first,
        offloader_over_tensors(layers[::-1], device, device_budget="30%") as second,
    ):
        check_exact(first, layers)
        check_exact(second, layers[::-1])
        first.resize("25%")
        check_exact(first, layers)
    assert driver.fake_cuda_counts().registrations == 0


def test_memory_pinned_by_the_first_offloader_serves_the_second(device, driver, layers) -> None:
    with offloader_over_tensors(layers, device) as first:
        first.wait_until_pinned()
        with offloader_over_tensors(layers, device) as second:
            second.wait_until_pinned()
            check_exact(first, layers)
            check_exact(second, layers)  # through staging buffers: a page is registered only once
            assert first.stats()["pinning_limit"] is None
            assert second.stats()["pinning_limit"] is not None


# --- refusals ----------------------------------------------------------------------------------


def test_a_missing_driver_and_a_missing_device_are_named(library, driver) -> None:
    with pytest.raises(DeviceError, match=r"cannot load libnowhere\.so"):
        _core.CudaDevice(0, "libnowhere.so")
    with pytest.raises(DeviceError, match="no device 4, there are 1"):
        _core.CudaDevice(4, str(library))
    driver.fake_cuda_set_num_devices(0)
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_NO_DEVICE"):
        _core.CudaDevice(0, str(library))
    driver.fake_cuda_reset()
    assert _core.CudaDevice(0, str(library)).name == "Fake GPU"  # the process goes on


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(DeviceError, match="was built without CUDA"):
        open_device("cuda")
    with pytest.raises(DeviceError, match="was built without CUDA"):
        OffloadedExperts(random_weights(E, H, F), device="cuda:1", device_budget="50%")


def test_an_old_gpu_is_refused(library, driver) -> None:
    driver.fake_cuda_set_capability(6, 1)
    old = _core.CudaDevice(0, str(library))
    with pytest.raises(DeviceError, match=r"capability 6\.1; this torch .* for 7\.5 and newer"):
        check_capability(old, ["sm_75", "sm_90", "compute_90"])
    check_capability(old, ["sm_50", "sm_90"])
    check_capability(old, [])


def test_tensors_of_another_device_are_refused(device, layers) -> None:
    with offloader_over_tensors(layers, device) as offloader:
        hidden = torch.zeros(2, H, device="meta", dtype=torch.bfloat16)
        ids, topk = torch.zeros(2, A, dtype=torch.long), torch.zeros(2, A)
        with pytest.raises(ValueError, match=r"layers\.0: hidden_states must be on cpu.*got meta"):
            run_experts(offloader.handle(0), torch.nn.Module().eval(), hidden, ids, topk)


def test_host_budgets_are_planned_and_refused() -> None:
    layout = PageLayout.build({"up_proj": ((64, 64), torch.float32)})  # 16 KiB
    frame = _core.host_frame_bytes(layout.page_bytes)
    files, tensors = FilePages(), TensorPages()
    assert plan_host([layout], [10], "100%", files, 1 << 30) == [10 * frame]
    assert plan_host([layout], [10], "auto", files, 16 * frame) == [8 * frame]
    assert plan_host([layout], [10], "auto", files, 1 << 40) == [10 * frame]
    assert plan_host([layout], [10], "50%", tensors, 0) == [5 * frame]
    assert plan_host([layout], [10], "auto", tensors, 0) == [1 << 62]  # no limit: it is in memory
    assert plan_host([layout], [2], "100%", files, 1 << 30) == [4 * frame]  # never fewer than four
    with pytest.raises(BudgetError, match=r"host_budget: '30%' .* at least 65536 bytes"):
        plan_host([layout], [10], "30%", files, 1 << 30)
    with pytest.raises(BudgetError, match=r"only 32\.0 KiB of memory are free"):
        plan_host([layout], [10], "100%", files, 2 * frame)
    for bad in ("much", 0, "200%"):
        with pytest.raises(BudgetError, match=r"host_budget:"):
            OffloadConfig(host_budget=bad)


def test_devices_and_chunks_are_checked() -> None:
    for good in ("cpu", "cuda", "cuda:3"):
        assert OffloadConfig(device=good).device == good
    for bad in ("gpu", "cuda:", "cuda:x", "mps"):
        with pytest.raises(ValueError, match='expected "cpu", "cuda" or "cuda:N"'):
            OffloadConfig(device=bad)
    with pytest.raises(ValueError, match="copy_chunk_bytes"):
        OffloadConfig(copy_chunk_bytes=5000)


def test_backends_of_another_device_are_not_taken() -> None:
    layer = _as_layer(random_weights(E, H, F), "experts", "silu")
    layout = PageLayout.build(layer.tensors)
    backend, _ = choose("auto", layer.module, layout, "experts", "cuda")
    assert "cuda" in backend.devices  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match="grouped_mm: it does not compute on mps"):
        choose("grouped_mm", layer.module, layout, "experts", "mps")
