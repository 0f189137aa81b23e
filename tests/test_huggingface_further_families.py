"""Families with no code of their own: each equals its resident self, live and from a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from further_families import FURTHER, UNTESTED, further_model
from tiny_models import FAMILIES, prompt_ids
from torch import Tensor
from transformers import PreTrainedModel

import moe_offload
from moe_offload.dense import use_dense_kernels
from moe_offload.errors import PredictorError
from moe_offload.huggingface.experts import NAME
from moe_offload.huggingface.loading import from_pretrained
from moe_offload.verification import to_aligned_memory


def logits(model: object) -> Tensor:
    with torch.no_grad():
        return model(input_ids=prompt_ids(batch=2)).logits


def stepped_logits(model: object) -> list[Tensor]:
    """A prompt and two single tokens on its cache."""
    found, cache = [], None
    for length in (12, 1, 1):
        ids = prompt_ids(length, seed=length + len(found))
        with torch.no_grad():
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return found


def check_paged(model: object, expected: Tensor) -> None:
    got = logits(model)
    stats = moe_offload.get_offloader(model).stats()
    assert torch.equal(got, expected)
    assert stats["lookups"] > 0, "the experts were not paged at all"
    assert {row["passed_over"] for row in stats["per_layer"]} == {None}, "not on our kernels"


@pytest.mark.parametrize("name", FURTHER)
def test_live_and_loaded_models_equal_resident(name: str, tmp_path: Path) -> None:
    model = further_model(name)
    expected = logits(model)
    assert torch.isfinite(expected).all()
    model.save_pretrained(tmp_path)
    with moe_offload.offload(model, device_budget="25%"):
        check_paged(model, expected)
    assert torch.equal(logits(model), expected), "restore left something behind"
    loaded = from_pretrained(tmp_path, device_budget="25%")
    assert type(loaded) is type(model)
    check_paged(loaded, logits(resident(tmp_path, type(model))))


@pytest.mark.parametrize("name", FURTHER)
def test_our_kernels_compute_what_transformers_computes(name: str) -> None:
    """In float32, where two correct ways differ by rounding: 1e-6 of the largest logit seen."""
    model = further_model(name).float()
    ours = logits(model)
    model.set_experts_implementation("eager")
    theirs = logits(model)
    assert not torch.equal(ours, theirs), "both were computed by the same code"
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def resident(folder: Path, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """As transformers loads it: some families keep a few dense weights in float32."""
    model = model_class.from_pretrained(folder)
    model.set_experts_implementation(NAME)
    use_dense_kernels(model)
    to_aligned_memory(model)
    return model


# Routers that lookahead-0 cannot ask: why.
NOT_ASKED = {
    "deepseek_v4": "is given the tokens as well",
    "hy_v4": "is more than one state",
    "inkling_text": "expected one router beside",
    "qwen4_exp": "is more than one state",
    "zaya": "expected one router beside",
}


@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.filterwarnings("ignore:lookahead")
def test_fetching_ahead_by_its_own_router_never_breaks_a_model(name: str) -> None:
    """What `predictor="auto"` does with large pages on disk."""
    model = further_model(name)
    expected = stepped_logits(model)
    try:
        offloader = moe_offload.offload(model, "25%", predictor="lookahead-0")
    except PredictorError as error:
        assert NOT_ASKED[name] in str(error)  # noqa: PT017
        return
    got = stepped_logits(model)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    report = offloader.stats()["predictor"]
    if name in NOT_ASKED:
        assert NOT_ASKED[name] in report["refused"][0]
    else:
        assert report["refused"] == []
        assert report["recall"]["input+0"]["tokens"] > 0, "nothing was predicted"


def test_no_family_is_forgotten() -> None:
    """What the README says of transformers 5.17: all families but those named."""
    if not transformers.__version__.startswith("5.17."):
        pytest.skip(f"the list is of transformers 5.17, this is {transformers.__version__}")
    folder = Path(transformers.__file__).parent / "models"
    common = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if "@use_experts_implementation" in file.read_text()
    }
    tested = {re.sub("_text$", "", name) for name in FURTHER} | {entry.name for entry in FAMILIES}
    assert tested | set(UNTESTED) == common
    assert not tested & set(UNTESTED)
