"""GPTQ checkpoints: pages of int4_group made by transposing, with the bits of the dequantised twin.

The twin is dequantised by AutoGPTQ's formula (quantised_checkpoints.degptq), zero points and order
taken as stored, and loaded resident by transformers, on the same expert kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import dequantise, gptq, read
from test_int4_checkpoints import change
from test_quantised_checkpoints import dequantised_because, logits, stats
from tiny_models import plain_model, prompt_ids
from torch import Tensor

import moe_offload
from moe_offload.errors import CheckpointError, MoEOffloadError, UnsupportedModelError
from moe_offload.huggingface.gptq import Gptq

CHECKPOINTS: dict[str, Callable[[Path], Any]] = {
    "qwen3_moe": gptq,
    "deepseek_v3": partial(gptq, family="deepseek_v3"),
    "gptq_v2": partial(gptq, form="gptq_v2"),
    "groups-of-128": partial(gptq, group=128, hidden_size=256, moe_intermediate_size=384),
    "whole-rows": partial(gptq, group=None),
    "bf16-scales": partial(gptq, scale_dtype=torch.bfloat16),
    "zero-biases": partial(gptq, bias=True),
}


@pytest.fixture(params=CHECKPOINTS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    CHECKPOINTS[request.param](tmp_path)
    dequantise(tmp_path, tmp_path / "twin")
    return tmp_path


def test_pages_are_transposed_and_give_the_bits_of_the_twin(folder: Path) -> None:
    model = moe_offload.from_pretrained(folder, device_budget="100%")
    found = stats(model)
    assert (found["weight_format"], found["io_mode"]) == ("int4_group", "converted")
    assert found["expert_backend"] == "native"
    assert all(row["dequantised"] is None for row in found["per_layer"])
    tensors = read(folder)
    stored = [t.nbytes for key, t in tensors.items()
              if ".experts." in key and key.endswith((".qweight", ".scales"))]  # fmt: skip
    assert found["total_expert_bytes"] < 1.1 * sum(stored) + 16 * 4096  # slots begin at 4096
    twin = plain_model(folder / "twin")
    offloader = moe_offload.get_offloader(model)
    for budget in ("100%", offloader.smallest_budget_bytes):
        offloader.resize(budget)
        for length in (1, 12, 60):
            assert torch.equal(logits(model, length), logits(twin, length))
    report = moe_offload.verify(model, [prompt_ids()[0], prompt_ids(40)[0]], max_new_tokens=6)
    report.raise_if_different()
    assert report.stats["demand_misses"] > 0


def test_plan_restore_and_save(folder: Path, tmp_path: Path) -> None:
    plan = moe_offload.plan(folder, "60%")
    model = moe_offload.from_pretrained(folder, device_budget="60%")
    assert (plan.weight_format, plan.source) == ("int4_group", "converted files")
    assert "converted while read, int4_group" in str(plan)
    assert plan.slots_bytes == stats(model)["device_budget_bytes"]
    experts = [t for key, t in read(folder).items() if ".experts." in key and ".bias" not in key]
    assert plan.expert_disk_bytes == sum(t.nbytes for t in experts)
    moe_offload.get_offloader(model).restore()
    model.save_pretrained(tmp_path / "saved")
    saved, expected = read(tmp_path / "saved"), read(folder / "twin")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())


def test_in_fp16_pages_are_dequantised(tmp_path: Path) -> None:
    """What most of these checkpoints say of themselves; the product is not rounded twice then."""
    gptq(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, dtype=torch.float16, device_budget="50%")
    assert "shall be torch.float16; quantised pages mean bfloat16" in dequantised_because(model)
    moe_offload.verify(model, [prompt_ids()[0]], max_new_tokens=4).raise_if_different()


KEY = "model.layers.1.mlp.experts.3.up_proj"


def wrong_zero(tensors: dict[str, Tensor], module: str) -> None:
    tensors[f"{module}.qzeros"][1, 3] -= 0x10


def wrong_order(tensors: dict[str, Tensor], module: str) -> None:
    tensors[f"{module}.g_idx"] = tensors[f"{module}.g_idx"].flip(0).contiguous()


@pytest.mark.parametrize(
    ("edit", "text"),
    [(wrong_zero, "zero points other than 8"), (wrong_order, r"another order \(g_idx\)")],
)
def test_what_the_config_denies_is_found_when_it_is_read(
    edit: Callable[[dict[str, Tensor], str], None], text: str, tmp_path: Path
) -> None:
    def load_and_run() -> None:
        logits(moe_offload.from_pretrained(tmp_path, device_budget="50%"), 60)

    gptq(tmp_path)
    load_and_run()
    for module in (KEY, "model.layers.0.self_attn.q_proj"):
        gptq(tmp_path)
        change(tmp_path, lambda tensors, _, module=module: edit(tensors, module))
        with pytest.raises(MoEOffloadError, match=f"{module}.weight has .*{text}"):
            load_and_run()


def test_a_bias_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    gptq(tmp_path, bias=True)
    change(tmp_path, lambda tensors, _: tensors[f"{KEY}.bias"][5:6].fill_(1.0))
    with pytest.raises(CheckpointError, match=r"experts.3.up_proj.bias is not zero"):
        moe_offload.from_pretrained(tmp_path)


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"bits": 8}, "bits 8; .* must be 4"),
    ({"sym": False}, "sym False; .* must be True"),
    ({"desc_act": True}, "desc_act True; .* must be False"),
    ({"group_size": 4}, "group_size 4; .*-1 or 8 and more"),
    ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; .*gptq or gptq_v2"),
    ({"is_marlin_format": True}, "is_marlin_format True"),
    ({"pack_dtype": "int16"}, "pack_dtype 'int16'"),
    ({"dynamic": {"+:.*experts.*": {"bits": 8}}}, "dynamic {'\\+:.*experts"),
]


@pytest.mark.parametrize(("given", "text"), CONFIGS)
def test_other_schemes_are_refused_by_name(given: dict[str, Any], text: str) -> None:
    config = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    assert Gptq.of_config(config, "somewhere").group_size == 128
    with pytest.raises(UnsupportedModelError, match=f"quantised by gptq with .*{text}"):
        Gptq.of_config({**config, **given}, "somewhere")


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda t: t.pop(f"{KEY}.scales"), "up_proj.scales is missing"),
        (lambda t: t.pop(f"{KEY}.qzeros"), "up_proj.qzeros is missing"),
        (lambda t: t.update({f"{KEY}.scales": torch.zeros(4, 96).half()}), r"F16 \(4, 96\)"),
        (lambda t: t.update({f"{KEY}.g_idx": torch.zeros(32).int()}), "stored as I32"),
        (lambda t: t.update({f"{KEY}.weight": torch.zeros(96, 64)}), "both exist"),
    ],
)
@pytest.mark.parametrize("call", [moe_offload.from_pretrained, moe_offload.plan])
def test_tensors_that_do_not_fit_are_refused(
    call: Callable[[Path], Any],
    edit: Callable[[dict[str, Tensor]], Any],
    text: str,
    tmp_path: Path,
) -> None:
    gptq(tmp_path)
    change(tmp_path, lambda tensors, _: edit(tensors))
    with pytest.raises(CheckpointError, match=text):
        call(tmp_path)
