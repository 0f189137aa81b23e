"""Packed integers of compressed-tensors: what is read, what is dequantised, what is refused.

That their pages give the bits of the dequantised twin is in test_quantised_checkpoints.py.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import dequantise, int4, packed, read, w4a16, write
from test_quantised_checkpoints import dequantised_because, logits, stats
from tiny_models import plain_model, prompt_ids
from torch import Tensor

import moe_offload
from moe_offload.errors import CheckpointError, UnsupportedModelError
from moe_offload.huggingface.compressed_tensors import CompressedTensors
from moe_offload.huggingface.packed_int4 import PackedCheckpoint
from moe_offload.quantization import dequantise_int4_group
from moe_offload.safetensors_file import Checkpoint

CALLS = (moe_offload.from_pretrained, moe_offload.plan)


def change(folder: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """Edit tensors and quantization_config of a saved checkpoint."""
    tensors = read(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit(tensors, config)
    write(folder, tensors, config)
    return folder


def twin_logits(folder: Path, **options: Any) -> Tensor:
    return logits(plain_model(dequantise(folder, folder / "twin"), **options))


def test_packing_is_that_of_compressed_tensors() -> None:
    """Against the package itself, where it happens to be installed: it is no dependency."""
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    args = pytest.importorskip("compressed_tensors.quantization")
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0))
    for group, strategy in ((32, "group"), (128, "group"), (None, "channel")):
        weights = args.QuantizationArgs(num_bits=4, strategy=strategy, group_size=group)
        scheme = args.QuantizationScheme(targets=["Linear"], weights=weights)
        ours = packed("weight", weight, group or 256, torch.bfloat16)
        theirs = pack.PackedQuantizationCompressor.decompress(ours, scheme)["weight"]
        got = dequantise_int4_group(ours["weight_packed"], ours["weight_scale"])
        assert torch.equal(got, theirs)
        scales = {"weight": weight.bfloat16(), "weight_scale": ours["weight_scale"]}
        again = pack.PackedQuantizationCompressor.compress(scales, scheme)
        assert torch.equal(again["weight_shape"], ours["weight_shape"])
        assert again["weight_packed"].dtype == ours["weight_packed"].dtype == torch.int32
        assert again["weight_packed"].shape == ours["weight_packed"].shape


def test_the_view_reads_what_was_packed(tmp_path: Path) -> None:
    int4(tmp_path)
    files = Checkpoint.open(tmp_path)
    view = PackedCheckpoint(files, CompressedTensors(frozenset([32])))
    twin = read(dequantise(tmp_path, tmp_path / "twin"))
    assert view.tensors.keys() == twin.keys()
    for name, tensor in twin.items():
        assert torch.equal(view.read(name), tensor), name
        assert view.tensors[name].shape == tuple(tensor.shape)
        assert view.tensors[name].dtype == tensor.dtype
        assert torch.equal(view.read(name, 1), tensor[1:2])


def test_options_reach_the_config(tmp_path: Path) -> None:
    """transformers takes fields of the config among from_pretrained's options."""
    int4(tmp_path)
    model = moe_offload.from_pretrained(
        tmp_path, device_budget="50%", num_experts_per_tok=3, attn_implementation="eager"
    )
    assert model.config.num_experts_per_tok == 3
    assert model.config._attn_implementation == "eager"
    model.generate(prompt_ids(), max_new_tokens=2, do_sample=False)


def test_a_layer_left_in_bfloat16_has_pages_of_its_own(tmp_path: Path) -> None:
    int4(tmp_path, keep=("lm_head", "mlp.gate", "layers.1.mlp.experts"))
    model = moe_offload.from_pretrained(tmp_path, device_budget="50%")
    assert stats(model)["weight_format"] == "int4_group/plain"
    assert torch.equal(logits(model), twin_logits(tmp_path))


def test_expert_counts_layers_and_bytes_on_disk(tmp_path: Path) -> None:
    """Only the pages' bytes are read from the experts: a quarter, and the scales."""
    int4(tmp_path)
    model = moe_offload.from_pretrained(tmp_path, device_budget="100%")
    found = stats(model)
    experts, hidden, inner = 8, 64, 96
    numbers = 2 * experts * 3 * hidden * inner
    assert found["fill_bytes"] == numbers // 2 + numbers // 32 * 2


# --- dequantised pages, and why -----------------------------------------------------------------


def test_other_dtypes_and_backends_get_dequantised_pages(tmp_path: Path) -> None:
    int4(tmp_path)
    wide = moe_offload.from_pretrained(tmp_path, dtype=torch.float32, device_budget="50%")
    assert "quantised pages mean bfloat16" in dequantised_because(wide)
    assert torch.equal(logits(wide), twin_logits(tmp_path, dtype=torch.float32))
    other = moe_offload.from_pretrained(tmp_path, expert_backend="grouped_mm")
    assert "no kernels for int4_group" in dequantised_because(other)
    moe_offload.verify(other, [prompt_ids()[0]], max_new_tokens=4).raise_if_different()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"group": 16}, r"int4 groups must be multiples of 32, got 64 / 4 columns"),
        ({"group": 48, "hidden_size": 48}, r"multiples of 32, got 48 / 1 columns"),
        ({"scale_dtype": torch.float32}, r"or all float16, got torch.float32"),
    ],
)
def test_what_the_kernels_cannot_read_is_dequantised(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    int4(tmp_path, **options)
    model = moe_offload.from_pretrained(tmp_path, device_budget="50%")
    assert reason in dequantised_because(model)
    report = moe_offload.verify(model, [prompt_ids()[0], prompt_ids(40)[0]], max_new_tokens=4)
    report.raise_if_different()
    # the product is rounded to the scales' dtype, then to the model's
    got, key = read(tmp_path), "model.layers.1.mlp.experts.3.down_proj.weight"
    wide = dequantise_int4_group(got[f"{key}_packed"], got[f"{key}_scale"])
    moe_offload.get_offloader(model).restore()
    down = model.model.layers[1].mlp.experts.down_proj[3]
    assert down.dtype == torch.bfloat16
    assert torch.equal(down, wide.bfloat16())


def test_experts_packed_in_several_ways_are_dequantised(tmp_path: Path) -> None:
    int4(tmp_path)

    def unpack(expert: int) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
        def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
            key = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
            codes, scales = tensors.pop(f"{key}_packed"), tensors.pop(f"{key}_scale")
            del tensors[f"{key}_shape"]
            tensors[key] = dequantise_int4_group(codes, scales)

        return edit

    for expert in (3, 0):
        change(tmp_path, unpack(expert))
        model = moe_offload.from_pretrained(tmp_path, device_budget="50%")
        assert "some experts of" in dequantised_because(model)
        moe_offload.verify(model, [prompt_ids()[0]], max_new_tokens=4).raise_if_different()


# --- refusals -----------------------------------------------------------------------------------


def weights(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]["weights"]


CONFIGS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    ("marlin-24", lambda c: c.update(format="marlin-24"), "format 'marlin-24'; .* must be 'pack-q"),
    ("fp8", lambda c: c.update(format="float-quantized"), "format 'float-quantized'"),
    ("mixed", lambda c: c.update(format="mixed-precision"), "format 'mixed-precision'"),
    ("8-bit", lambda c: weights(c).update(num_bits=8), "num_bits 8; .* must be 4"),
    ("float", lambda c: weights(c).update(type="float"), "type 'float'; .* must be 'int'"),
    ("asymmetric", lambda c: weights(c).update(symmetric=False), "symmetric False; .* be True"),
    ("act-order", lambda c: weights(c).update(actorder="group"), "actorder 'group'; .* static'"),
    ("dynamic", lambda c: weights(c).update(dynamic=True), "dynamic True; .* must be False"),
    ("tensor", lambda c: weights(c).update(strategy="tensor"), "strategy 'tensor'; .* or channel"),
    ("group-0", lambda c: weights(c).update(group_size=0), "group_size 0; .* '8 or more'"),
    (
        "w4a8",
        lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "input_activations .*'num_bits': 8.* must be None",
    ),
    (
        "two-groups",
        lambda c: c["config_groups"].update(
            group_1={"weights": {**weights(c), "num_bits": 8}, "targets": ["re:.*self_attn.*"]}
        ),
        "group_1.weights.num_bits 8",
    ),
    ("no-groups", lambda c: c.update(config_groups={}), "config_groups .*at least one group"),
    (
        "2:4",
        lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"}),
        "sparsity_config .*sparse-24-bitmask",
    ),
    (
        "rotated",
        lambda c: c.update(transform_config={"config_groups": {"R1": {}}}),
        "transform_config",
    ),
    ("kv-cache", lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
]


@pytest.mark.parametrize(("edit", "text"), [c[1:] for c in CONFIGS], ids=[c[0] for c in CONFIGS])
def test_other_schemes_are_refused_by_name(
    edit: Callable[[dict[str, Any]], Any], text: str, tmp_path: Path
) -> None:
    config = copy.deepcopy(w4a16(32, []))
    edit(config)
    with pytest.raises(UnsupportedModelError, match=f"compressed-tensors with .*{text}"):
        CompressedTensors.of_config(config, "somewhere")


def test_what_changes_nothing_is_accepted() -> None:
    config = w4a16(128, [])
    config["sparsity_config"] = {"format": "dense"}
    weights(config).update(actorder="static", strategy=None)
    config["config_groups"]["group_1"] = {"weights": {**weights(config), "strategy": "channel"}}
    assert CompressedTensors.of_config(config, "somewhere").group_sizes == {128, None}


@pytest.mark.parametrize("call", CALLS)
def test_refusals_reach_the_caller(call: Callable[[Path], Any], tmp_path: Path) -> None:
    int4(tmp_path)
    change(tmp_path, lambda _, config: weights(config).update(num_bits=8))
    with pytest.raises(UnsupportedModelError, match="num_bits 8"):
        call(tmp_path)


KEY = "model.layers.0.mlp.experts.3.up_proj.weight"
TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], Any], type[Exception], str]] = [
    (
        "no scales",
        lambda t: t.pop(f"{KEY}_scale"),
        CheckpointError,
        "up_proj.weight_scale is missing",
    ),
    (
        "both",
        lambda t: t.update({KEY: torch.zeros(96, 64)}),
        CheckpointError,
        f"{KEY} and {KEY}_packed both exist",
    ),
    (
        "zero points",
        lambda t: t.update({f"{KEY}_zero_point": torch.zeros(12, 2, dtype=torch.int32)}),
        UnsupportedModelError,
        "asymmetric .*weight_zero_point exists",
    ),
    (
        "act-order",
        lambda t: t.update({f"{KEY}_g_idx": torch.zeros(64, dtype=torch.int32)}),
        UnsupportedModelError,
        "activation order .*weight_g_idx exists",
    ),
    (
        "8 bits",
        lambda t: t.update({f"{KEY}_packed": torch.zeros(96, 16, dtype=torch.int32)}),
        CheckpointError,
        r"I32 \(96, 16\) with scales BF16 \(96, 2\); .* group of 32",
    ),
    (
        "dtype",
        lambda t: t.update({f"{KEY}_packed": torch.zeros(96, 8)}),
        CheckpointError,
        r"stored as F32 \(96, 8\)",
    ),
    (
        "rows",
        lambda t: t.update({f"{KEY}_scale": torch.zeros(48, 2).bfloat16()}),
        CheckpointError,
        r"scales BF16 \(48, 2\)",
    ),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("edit", "error", "text"), [case[1:] for case in TENSORS], ids=[case[0] for case in TENSORS]
)
def test_tensors_that_do_not_fit_are_refused(
    edit: Callable[[dict[str, Tensor]], Any],
    error: type[Exception],
    text: str,
    call: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    int4(tmp_path)
    change(tmp_path, lambda tensors, _: edit(tensors))
    with pytest.raises(error, match=text):
        call(tmp_path)


def test_rows_that_end_within_a_word_are_refused(tmp_path: Path) -> None:
    int4(tmp_path, group=None)
    change(tmp_path, lambda t, _: t.update({f"{KEY}_shape": torch.tensor([96, 60])}))
    with pytest.raises(UnsupportedModelError, match=r"\[60\] columns; expected a multiple of 8"):
        moe_offload.from_pretrained(tmp_path)


def test_a_config_without_packed_tensors_is_refused(tmp_path: Path) -> None:
    int4(tmp_path, keep=("proj",))
    with pytest.raises(CheckpointError, match="but none of its tensors is"):
        moe_offload.from_pretrained(tmp_path)


def test_a_quantization_config_of_the_callers_is_refused(tmp_path: Path) -> None:
    int4(tmp_path)
    with pytest.raises(UnsupportedModelError, match="leave quantization_config out"):
        moe_offload.from_pretrained(tmp_path, quantization_config={"dequantize": True})
