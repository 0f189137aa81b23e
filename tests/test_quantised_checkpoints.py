"""mxfp4, fp8 and int4 checkpoints are paged as stored, with the bits of the dequantised model.

The twin is the same checkpoint dequantised by the formats' definition (quantised_checkpoints.py)
and loaded resident by transformers, on the same expert kernels.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quantised_checkpoints
import torch
from quantised_checkpoints import dequantise, fp8, int4, mxfp4, read
from safetensors.torch import save_file
from tiny_models import plain_model, prompt_ids, tiny_model
from torch import Tensor
from transformers import FineGrainedFP8Config, Mxfp4Config

import moe_offload
from moe_offload import planning
from moe_offload.dense import use_dense_kernels
from moe_offload.errors import CheckpointError, StateError, UnsupportedModelError
from moe_offload.safetensors_file import read_header

CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "mxfp4-gpt_oss": (mxfp4, "mxfp4"),
    "fp8-qwen3_moe": (fp8, "fp8_block"),
    "fp8-qwen3_moe-bf16-scales": (partial(fp8, scale_dtype=torch.bfloat16), "fp8_block"),
    "fp8-deepseek_v3": (partial(fp8, family="deepseek_v3"), "fp8_block"),
    # blocks cut off at the edge, in experts and elsewhere, where transformers alone fails
    "fp8-partial-blocks": (
        partial(fp8, hidden_size=144, moe_intermediate_size=272, intermediate_size=400),
        "fp8_block",
    ),
    "int4-qwen3_moe": (int4, "int4_group"),
    "int4-deepseek_v3": (partial(int4, family="deepseek_v3"), "int4_group"),
    "int4-mixtral": (partial(int4, family="mixtral", keep=("lm_head", "gate.")), "int4_group"),
    "int4-groups-of-128": (
        partial(int4, group=128, hidden_size=256, moe_intermediate_size=384),
        "int4_group",
    ),
    "int4-fp16-scales": (partial(int4, scale_dtype=torch.float16), "int4_group"),
    "int4-whole-rows": (partial(int4, group=None), "int4_group"),
    "int4-fused-experts": (partial(int4, fused=True), "int4_group"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (make, _) in CHECKPOINTS.items():
        made[name] = tmp_path_factory.mktemp("checkpoint") / name
        make(made[name])
        dequantise(made[name], made[name] / "twin")
    return made


def logits(model: Any, length: int = 12) -> Tensor:
    with torch.no_grad():
        return model(prompt_ids(length)).logits


def stats(model: Any) -> dict[str, Any]:
    return moe_offload.get_offloader(model).stats()


def expert_bytes(folder: Path) -> int:
    header = read_header(folder / "model.safetensors")
    experts = [key for key in header if ".experts." in key and not key.endswith("_shape")]
    return sum(header[key].nbytes for key in experts)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_quantised_bytes_are_paged_and_give_the_bits_of_the_twin(
    name: str, folders: dict[str, Path]
) -> None:
    folder = folders[name]
    model = moe_offload.from_pretrained(folder, device_budget="100%")
    found = stats(model)
    assert found["weight_format"] == CHECKPOINTS[name][1]
    assert found["expert_backend"] == "native"
    assert found["io_mode"] in ("direct", "buffered")
    assert found["fill_bytes"] == expert_bytes(folder)
    assert all(row["dequantised"] is None for row in found["per_layer"])
    twin = plain_model(folder / "twin")
    assert expert_bytes(folder) < 0.6 * expert_bytes(folder / "twin")
    offloader = moe_offload.get_offloader(model)
    for budget in ("100%", offloader.smallest_budget_bytes):
        offloader.resize(budget)
        for length in (1, 12, 60):
            assert torch.equal(logits(model, length), logits(twin, length))
    tokens = [m.generate(prompt_ids(), max_new_tokens=12, do_sample=False) for m in (model, twin)]
    assert torch.equal(*tokens)
    assert stats(model)["demand_misses"] > 0


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if "partial" not in name])
def test_verify_under_hostile_timing_against_transformers(
    name: str, folders: dict[str, Path]
) -> None:
    model = moe_offload.from_pretrained(folders[name], device_budget="40%")
    report = moe_offload.verify(model, [prompt_ids()[0], prompt_ids(40)[0]], max_new_tokens=6)
    report.raise_if_different()
    assert report.stats["demand_misses"] > 0


@pytest.mark.parametrize(
    "name", ["mxfp4-gpt_oss", "fp8-qwen3_moe", "fp8-partial-blocks", "int4-qwen3_moe"]
)
def test_restore_leaves_the_dequantised_model(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = moe_offload.from_pretrained(folders[name])
    with pytest.raises(StateError, match="restore"):
        model.save_pretrained(tmp_path / "no")
    moe_offload.get_offloader(model).restore()
    twin = plain_model(folders[name] / "twin")
    for key, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    model.set_experts_implementation("moe_offload")
    use_dense_kernels(model)
    assert torch.equal(logits(model), logits(twin))
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_plan_counts_quantised_bytes(name: str, folders: dict[str, Path]) -> None:
    plan = planning.plan(folders[name], "60%")
    model = moe_offload.from_pretrained(folders[name], device_budget="60%")
    found = stats(model)
    assert plan.weight_format == found["weight_format"]
    assert plan.source == "files"
    assert f"read verbatim, {plan.weight_format}" in str(plan)
    assert plan.expert_disk_bytes == expert_bytes(folders[name])
    assert (plan.num_slots, plan.slots_bytes) == (found["num_slots"], found["device_budget_bytes"])
    assert plan.expert_bytes == found["total_expert_bytes"]
    assert plan.dense_bytes == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def dequantised_because(model: Any) -> str:
    found = stats(model)
    assert (found["weight_format"], found["io_mode"]) == ("plain", "converted")
    (reason,) = {row["dequantised"] for row in found["per_layer"]}
    return reason


def test_where_pages_are_dequantised_stats_say_why(folders: dict[str, Path]) -> None:
    folder = folders["mxfp4-gpt_oss"]
    twin = logits(plain_model(folder / "twin"))
    wide = moe_offload.from_pretrained(folder, dtype=torch.float32)
    assert "quantised pages mean bfloat16" in dequantised_because(wide)
    wide_twin = plain_model(folder / "twin", dtype=torch.float32)
    assert torch.equal(logits(wide), logits(wide_twin))
    other = moe_offload.from_pretrained(folder, expert_backend="grouped_mm")
    assert "no kernels for mxfp4" in dequantised_because(other)
    for given in (Mxfp4Config(dequantize=True), None):
        name = "mxfp4-gpt_oss" if given else "fp8-qwen3_moe"
        config = given or FineGrainedFP8Config(dequantize=True)
        asked = moe_offload.from_pretrained(folders[name], quantization_config=config)
        assert "was given" in dequantised_because(asked)
    asked = moe_offload.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    assert torch.equal(logits(asked), twin)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU transformers keeps it quantised")
def test_other_block_sizes_are_dequantised(tmp_path: Path) -> None:
    """Blocks of 32 x 32: transformers reads the size off the grid."""
    fp8(tmp_path)
    tensors = {
        key: torch.full([-(-size // 32) for size in tensors[key.removesuffix("_scale_inv")].shape],
                        float(scale.max()))
        if key.endswith("_scale_inv") else scale
        for tensors in [read(tmp_path)] for key, scale in tensors.items()
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    quantised_checkpoints.write(tmp_path, tensors, {**config, "weight_block_size": [32, 32]})
    model = moe_offload.from_pretrained(tmp_path)
    assert r"blocks are (32, 32)" in dequantised_because(model)
    assert torch.equal(logits(model), logits(plain_model(tmp_path)))


def test_a_layer_left_in_bfloat16_has_pages_of_its_own(tmp_path: Path) -> None:
    fp8(tmp_path, keep=("lm_head", "mlp.gate", "layers.1.mlp.experts"))
    dequantise(tmp_path, tmp_path / "twin")
    model = moe_offload.from_pretrained(tmp_path, device_budget="50%")
    found = stats(model)
    assert [row["weight_format"] for row in found["per_layer"]] == ["fp8_block", "plain"]
    assert found["weight_format"] == "fp8_block/plain"
    assert torch.equal(logits(model), logits(plain_model(tmp_path / "twin")))


@pytest.mark.parametrize(
    "name", ["mxfp4-gpt_oss", "fp8-qwen3_moe", "fp8-deepseek_v3", "int4-deepseek_v3"]
)
def test_restored_models_are_saved_dequantised(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = moe_offload.from_pretrained(folders[name])
    moe_offload.get_offloader(model).restore()
    model.save_pretrained(tmp_path)
    saved, expected = read(tmp_path), read(folders[name] / "twin")
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    twin = plain_model(folders[name] / "twin")
    assert torch.equal(logits(plain_model(tmp_path)), logits(twin))


# --- bad input --------------------------------------------------------------------------------


def without(folder: Path, part: str) -> Path:
    tensors = read(folder)
    gone = next(key for key in tensors if part in key)
    save_file(
        {key: t for key, t in tensors.items() if key != gone},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    return folder


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (mxfp4, "down_proj_scales"),
        (mxfp4, "gate_up_proj_blocks"),
        (fp8, "experts.3.up_proj.weight_scale_inv"),
        (fp8, "q_proj.weight_scale_inv"),
    ],
)
def test_missing_scales_are_named(make: Callable[[Path], Any], part: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(CheckpointError, match=r"is quantised, but .*missing"):
        moe_offload.from_pretrained(without(tmp_path, part))


def test_scales_of_another_model_are_refused(tmp_path: Path) -> None:
    mxfp4(tmp_path)
    tensors = read(tmp_path)
    for key in [k for k in tensors if k.endswith("_scales")]:
        tensors[key] = tensors[key][:, :-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"scales \(8, 63, 3\) for blocks \(8, 64, 3, 16\)"):
        moe_offload.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "auto-round"])
def test_other_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    tiny_model("qwen3_moe", torch.bfloat16).save_pretrained(tmp_path)
    quantised_checkpoints.write(tmp_path, read(tmp_path), {"quant_method": method})
    for call in (moe_offload.from_pretrained, moe_offload.plan):
        with pytest.raises(UnsupportedModelError, match=f"by {method}; .* mxfp4, fp8 "):
            call(tmp_path)
