"""Pages that begin behind the start of their slots: the same weights, the same bits.

The pages of real models are shifted from 1 MiB on; here from one byte on, by a constant. How far a
page is shifted depends on the disk (what O_DIRECT needs of addresses), so tests that want a shift
other than zero are skipped where the disk needs none.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_cases import GPT_OSS, Case, Inputs
from quantised_checkpoints import fp8, int4, mxfp4
from test_quantised_ffn import quantised, quantised_twin
from tiny_models import experts_modules, prompt_ids, tiny_model
from torch import Tensor

import moe_offload
from moe_offload import _core, pager
from moe_offload.backends.native import BoundLayer
from moe_offload.errors import StateError
from moe_offload.pager import ExpertPool
from moe_offload.pages import PageLayout

SIZES = {"hidden_size": 64, "moe_intermediate_size": 96}  # matrices of whole 512-byte blocks
MODELS: dict[str, Any] = {
    "bfloat16": lambda folder: tiny_model("qwen3_moe", torch.bfloat16, **SIZES).save_pretrained(
        folder
    ),
    "odd-sizes": lambda folder: tiny_model("olmoe").save_pretrained(folder),
    "several-files": lambda folder: tiny_model("mixtral", **SIZES).save_pretrained(
        folder, max_shard_size="64KB"
    ),
    "transposed-biased": lambda folder: tiny_model("gpt_oss").save_pretrained(folder),
    "mxfp4": mxfp4,
    "fp8": fp8,
    "int4": int4,
    "fp8-bf16-scales": partial(fp8, scale_dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in MODELS.items():
        made[name] = tmp_path_factory.mktemp("checkpoint")
        make(made[name])
    return made


@pytest.fixture
def shifting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager, "MIN_SHIFTED_BYTES", 1)


def logits(model: Any, length: int) -> Tensor:
    with torch.no_grad():
        return model(prompt_ids(length)).logits


def shifts_of(pool: ExpertPool) -> set[int]:
    """Of the pages that are resident."""
    return {pool.pager.slot_shift(slot) for _, _, slot in pool.pager.residents()}


def needs_shifts(pools: list[ExpertPool]) -> None:
    if all(shifts_of(pool) <= {0} for pool in pools):
        pytest.skip("this disk takes any address, or none: nothing is shifted")


@pytest.mark.parametrize("name", MODELS)
def test_bits_are_those_of_pages_at_the_start_of_their_slots(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = moe_offload.from_pretrained(folders[name], device_budget="100%")
    assert not any(pool.shifted for pool in moe_offload.get_offloader(plain).pools)
    want = {length: logits(plain, length) for length in (1, 40)}
    monkeypatch.setattr(pager, "MIN_SHIFTED_BYTES", 1)
    model = moe_offload.from_pretrained(folders[name], device_budget="100%")
    offloader = moe_offload.get_offloader(model)
    assert all(pool.shifted for pool in offloader.pools)
    generator = random.Random(0)
    for step in range(12):
        for length, logit in want.items():
            assert torch.equal(logits(model, length), logit), (step, length)
        offloader.chaos(step, max_delay_us=100, reorder=True, evict_probability=0.3)
        offloader.resize(generator.choice(["25%", "40%", "75%", "100%"]))
    offloader.chaos()
    offloader.resize("100%")
    needs_shifts(offloader.pools)


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_every_page_holds_its_expert(folders: dict[str, Path], engine: str, shifting: None) -> None:
    if engine == "io_uring" and (reason := _core.why_no_io_uring()):
        pytest.skip(f"no io_uring here: {reason}")
    modules = experts_modules(tiny_model("mixtral", **SIZES))  # what was saved
    model = moe_offload.from_pretrained(
        folders["several-files"], device_budget="100%", io_engine=engine
    )
    (pool,) = moe_offload.get_offloader(model).pools
    residents = pool.pager.residents()
    assert len(residents) == pool.num_pages
    for layer, expert, slot in residents:
        experts = modules[layer][1]
        for name, tensor in pool.page_views(slot).items():
            assert torch.equal(tensor, getattr(experts, name)[expert]), (layer, expert, name)
    needs_shifts([pool])
    assert pool.slot_stride == pool.layout.slot_stride + 4096


def test_only_backends_that_ask_get_shifted_pages(folders: dict[str, Path], shifting: None) -> None:
    folder = folders["bfloat16"]
    for options in ({"expert_backend": "grouped_mm"}, {"direct_io": False}):
        model = moe_offload.from_pretrained(folder, device_budget="50%", **options)
        (pool,) = moe_offload.get_offloader(model).pools
        assert not pool.shifted
        assert pool.views["down_proj"].shape == (pool.num_slots, 64, 96)
        assert pool.pager.slot_shifts == 0
        logits(model, 12)
        assert shifts_of(pool) == {0}
    live = moe_offload.offload(tiny_model("olmoe"), device_budget="50%")
    assert not live.pools[0].shifted


def test_a_shifted_pool_has_no_views(folders: dict[str, Path], shifting: None) -> None:
    model = moe_offload.from_pretrained(folders["bfloat16"], device_budget="50%")
    (pool,) = moe_offload.get_offloader(model).pools
    with pytest.raises(StateError, match=r"shifted within their slots.*page_views\(slot\)"):
        _ = pool.views
    pool.close()
    with pytest.raises(StateError, match="its slots were given back"):
        pool.page_views(0)


def test_small_pages_stay_at_the_start_of_their_slots(folders: dict[str, Path]) -> None:
    model = moe_offload.from_pretrained(folders["bfloat16"], device_budget="50%")
    (pool,) = moe_offload.get_offloader(model).pools
    assert not pool.shifted
    assert pool.slot_stride == pool.layout.slot_stride


def test_a_page_must_fit_its_slot(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    path.write_bytes(bytes(12_000))
    source = _core.FileSource([str(path)], True)
    if source.io_mode == "buffered":
        pytest.skip("no O_DIRECT here")
    source.add_page(0, 0, [(0, 4088, 4096, 0)])
    source.add_page(0, 1, [(0, 4096, 4096, 0)])
    slab = torch.zeros(2 * 8192 + 4096, dtype=torch.uint8)
    options: dict[str, Any] = {
        "source": source,
        "num_experts": [2],
        "layer_names": ["experts"],
        "slots": slab.data_ptr(),
        "num_slots": 2,
        "slot_stride": 8192,
        "shift_pages": True,
    }
    paging = _core.Pager(**options, page_bytes=4096)
    paging.fill([(0, 0), (0, 1)])
    paging.drain()
    shifts = {expert: paging.slot_shift(slot) for _, expert, slot in paging.residents()}
    paging.close()
    assert shifts[1] == 0
    if shifts[0] == 0:
        pytest.skip("this disk takes any address")
    with pytest.raises(ValueError, match=f"8192 bytes shifted by {shifts[0]} does not fit a slot"):
        _core.Pager(**options, page_bytes=8192)
    with pytest.raises(ValueError, match="page of 0 bytes shifted by"):
        _core.Pager(**options)


def shifted_layer(
    layer: BoundLayer, weights: dict[str, Tensor], shifts: list[int]
) -> tuple[_core.FfnWeights, list[Tensor]]:
    """Weights of [E, ...] as pages of a slab full of NaN, page e `shifts[e]` bytes further on."""
    layout = PageLayout.build({n: (tuple(t.shape[1:]), t.dtype) for n, t in weights.items()})
    stride = layout.slot_stride + 4096
    slab = torch.full((len(shifts) * stride + 4096,), 255, dtype=torch.uint8)
    slab = slab[-slab.data_ptr() % 4096 :][: len(shifts) * stride]
    for expert, shift in enumerate(shifts):
        for section in layout.sections:
            begin = expert * stride + shift + section.offset
            raw = weights[section.name][expert].contiguous().view(torch.uint8).flatten()
            slab[begin : begin + section.nbytes] = raw
    table = torch.tensor(shifts, dtype=torch.int32)
    views = layout.views(slab, stride)
    return layer.weights(views, table.data_ptr()), [slab, table]


KERNEL_CASES = [
    Case("one-row", 1, 2, 4, 96, 64, bias=True),
    Case("few-rows", 6, 2, 4, 96, 160, bias=True),
    Case("many-rows", 70, 2, 3, 160, 96, GPT_OSS, bias=True),
]


@pytest.mark.parametrize("isa", _core.cpu_isas("bfloat16"))
@pytest.mark.parametrize("form", ["plain", "mxfp4", "fp8_block", "fp8_block_bf16", "int4_group"])
@pytest.mark.parametrize("case", KERNEL_CASES, ids=lambda case: case.name)
def test_kernels_give_the_same_bits_at_every_shift(case: Case, form: str, isa: str) -> None:
    inputs = Inputs.make(replace(case), torch.bfloat16)
    stored, options = inputs.weights, {}
    if form == "plain":
        want = inputs.native(isa)
    else:
        base = form.removesuffix("_bf16")
        group = 32 if base == "int4_group" else 0
        stored = quantised_twin(inputs, base, form != base, group)
        options = {"weight_format": base}
        want = quantised(inputs, stored, base, isa)
    layer = inputs.layer(isa, **options)
    for shift in range(0, 512, 8):
        shifts = [(shift + 136 * expert) % 512 for expert in range(case.experts)]
        weights, keep = shifted_layer(layer, stored, shifts)
        run = inputs.start(layer, 2)
        run.compute_all(weights)
        assert torch.equal(inputs.finish(run), want), (shift, len(keep))
