"""Models that cannot be offloaded, and files that change under a running model.

Every refusal names the class or file and says what to do; after it, the model is as it was.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import experts_modules, prompt_ids, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import moe_offload
from moe_offload.dense import use_dense_kernels
from moe_offload.errors import PageReadError, UnsupportedModelError
from moe_offload.huggingface.experts import NAME


def logits(model: Any, seed: int = 0) -> Tensor:
    model.set_experts_implementation(NAME)  # also once restored: the kernels of the slots
    use_dense_kernels(model)
    with torch.no_grad():
        return model(prompt_ids(seed=seed)).logits


# --- unsupported models ------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def dense_model() -> nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL)).eval()


def longcat_model() -> nn.Module:
    mla = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    moe = {"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2}
    extra = {**mla, **moe, "v_head_dim": 8, "num_layers": 1, "ffn_hidden_size": 16}
    config = AutoConfig.for_model("longcat_flash", **{**SMALL, **extra, "num_key_value_heads": 2})
    return AutoModelForCausalLM.from_config(config).eval()


def own_moe() -> nn.Module:
    model = nn.Module()
    model.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    return model.eval()


def with_hook() -> nn.Module:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny_model("olmoe")
    add_hook_to_module(experts_modules(model)[1][1], ModelHook())
    return model


def with_own_forward() -> nn.Module:
    model = tiny_model("olmoe")
    experts = experts_modules(model)[0][1]
    experts.forward = lambda *args: experts.__class__.forward(experts, *args)
    return model


def with_extra_scales() -> nn.Module:
    model = tiny_model("olmoe")
    experts_modules(model)[0][1].gate_up_proj_scale_inv = nn.Parameter(torch.ones(8, 1, 1))
    return model


def with_dtype(dtype: torch.dtype) -> nn.Module:
    model = tiny_model("olmoe")
    experts = experts_modules(model)[0][1]
    data = experts.gate_up_proj.data.to(dtype)
    experts.gate_up_proj = nn.Parameter(data, requires_grad=dtype.is_floating_point)
    return model


def quantised_class() -> nn.Module:
    """As transformers leaves fp8 experts: another class, without the common flags."""

    class FP8Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = torch.zeros(4, 8, 8).to(torch.float8_e4m3fn)
            self.gate_up_proj = nn.Parameter(weight, requires_grad=False)

    model = tiny_model("olmoe")
    model.model.layers[0].mlp.experts = FP8Experts()
    model.model.layers[1].mlp.experts = FP8Experts()
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_model("olmoe").config).eval()


def tensor_parallel() -> nn.Module:
    model = tiny_model("olmoe")
    model._device_mesh, model._tp_size = object(), 2
    return model


def expert_parallel() -> nn.Module:
    model = tiny_model("olmoe")
    experts_modules(model)[0][1]._is_expert_parallel = True
    return model


def kernelized() -> nn.Module:
    """As use_kernels=True leaves gpt-oss: a layer class whose forward reads the parameters."""
    model = tiny_model("gpt_oss")
    model._use_kernels = True
    for layer in model.model.layers:
        layer.mlp.kernel_layer_name = "MegaBlocksMoeMLP"
    return model


def wrong_dims() -> nn.Module:
    model = tiny_model("olmoe")
    experts = experts_modules(model)[0][1]
    experts.down_proj = nn.Parameter(experts.down_proj.data[0])
    return model


REFUSED: dict[str, tuple[Any, str]] = {
    "dense": (dense_model, r"LlamaForCausalLM has no routed experts"),
    "longcat": (longcat_model, r"LongcatFlashExperts, which does not use .* common experts inter"),
    "module_list": (own_moe, r"ModuleList, which does not use"),
    "a_path": (lambda: "some/path", r"got str.*from_pretrained"),
    "accelerate_hook": (with_hook, r"layers\.1\.mlp\.experts .*accelerate hook.*from_pretrained"),
    "own_forward": (with_own_forward, r"layers\.0\.mlp\.experts .*replaced forward"),
    "extra_parameters": (with_extra_scales, r"gate_up_proj_scale_inv.*quantised.*dequantize"),
    "int8": (lambda: with_dtype(torch.int8), r"gate_up_proj is a Tensor of torch\.int8"),
    "float64": (lambda: with_dtype(torch.float64), r"torch\.float64; expected plain float32"),
    "quantised_class": (quantised_class, r"quantised, in FP8Experts"),
    "meta": (on_meta, r"must be on the CPU, got meta.*from_pretrained"),
    "tensor_parallel": (tensor_parallel, r"tensor or expert parallel"),
    "expert_parallel": (expert_parallel, r"tensor or expert parallel"),
    "use_kernels": (kernelized, r"use_kernels=True.*use_kernels=False"),
    "wrong_dims": (wrong_dims, r"down_proj must have 3 dimensions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unsupported_model_is_refused_and_unchanged(case: str) -> None:
    make, expected = REFUSED[case]
    model = make()
    is_module = isinstance(model, nn.Module)
    before = {n: id(p) for n, p in model.named_parameters()} if is_module else None
    hooks = dict(model._forward_pre_hooks) if is_module else None
    with pytest.raises(UnsupportedModelError, match=expected) as caught:
        moe_offload.offload(model)
    assert "\n" not in str(caught.value)
    if is_module:
        assert {n: id(p) for n, p in model.named_parameters()} == before
        assert "_moe_offload" not in vars(model)
        assert dict(model._forward_pre_hooks) == hooks


def test_accelerate_disk_offload_is_refused(tmp_path: Path) -> None:
    """The usual state of a model loaded with device_map: it must not half work."""
    tiny_model("olmoe").save_pretrained(tmp_path / "m")
    parts = ["input_layernorm", "post_attention_layernorm", "self_attn", "mlp.gate"]
    names = ["embed_tokens", "norm", "rotary_emb"]
    names += [f"layers.{i}.{part}" for i in (0, 1) for part in parts]
    device_map = {"lm_head": "cpu", **{f"model.{name}": "cpu" for name in names}}
    device_map |= {f"model.layers.{i}.mlp.experts": "disk" for i in (0, 1)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", device_map=device_map, offload_folder=str(tmp_path / "o")
    )
    expected = logits(model)
    with pytest.raises(UnsupportedModelError, match=r"accelerate hook.*from_pretrained"):
        moe_offload.offload(model)
    assert torch.equal(logits(model), expected)


# --- files that change while the model runs ---------------------------------------------------


class Running:
    """A checkpoint model with two slots, so that almost every expert is read when it is used."""

    def __init__(self, folder: Path, **options: Any) -> None:
        tiny_model("qwen3_moe").save_pretrained(folder)
        self.file = folder / "model.safetensors"
        self.content = self.file.read_bytes()
        self.times = (self.file.stat().st_atime_ns, self.file.stat().st_mtime_ns)
        self.model = moe_offload.from_pretrained(folder, **options)
        self.offloader = moe_offload.get_offloader(self.model)
        self.offloader.resize(self.offloader.smallest_budget_bytes)
        self.expected = logits(self.model)

    def put_back(self) -> None:
        with open(self.file, "r+b") as file:
            file.write(self.content)
        os.utime(self.file, ns=self.times)


@pytest.fixture(params=["verbatim", "converted"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Running:
    options = {"dtype": torch.bfloat16} if request.param == "converted" else {}
    return Running(tmp_path / "m", **options)


def test_truncated_file_raises_and_recovers(running: Running) -> None:
    os.truncate(running.file, len(running.content) // 4)
    for _ in range(2):
        with pytest.raises(PageReadError, match=r"layers.*expert.*model.safetensors"):
            logits(running.model)
    running.put_back()
    assert torch.equal(logits(running.model), running.expected)


def test_changed_content_raises_instead_of_wrong_tokens(running: Running) -> None:
    with open(running.file, "r+b") as file:
        file.seek(len(running.content) // 2)
        file.write(b"\xff" * 5000)
    with pytest.raises(PageReadError, match=r"changed while in use"):
        logits(running.model)
    with pytest.raises(PageReadError, match=r"changed while in use"):
        running.model.generate(prompt_ids(), max_new_tokens=3)
    running.put_back()
    assert torch.equal(logits(running.model), running.expected)
    assert running.offloader.stats()["lookups"] > 0


def test_deleted_file_keeps_giving_exact_results(running: Running) -> None:
    running.file.unlink()
    assert torch.equal(logits(running.model), running.expected)
    if running.offloader.stats()["io_mode"] != "converted":
        assert running.offloader.stats()["files_deleted"]


def test_replaced_file_does_not_reach_the_running_model(running: Running) -> None:
    """An update by rename (what downloads do) leaves the open file alone."""
    other = running.file.with_suffix(".new")
    other.write_bytes(bytes(len(running.content)))
    other.replace(running.file)
    assert torch.equal(logits(running.model), running.expected)


def test_deleted_folder_can_still_be_restored_from_the_open_files(running: Running) -> None:
    shutil.rmtree(running.file.parent)
    running.offloader.restore()
    assert torch.equal(logits(running.model), running.expected)


# --- fork ------------------------------------------------------------------------------------


def in_child(work: Any) -> str:
    """Run `work` in a forked child and return what it says; ten seconds, then it is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(10)
        try:
            answer = str(work())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


def test_forked_child_is_refused_and_the_parent_goes_on() -> None:
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    expected = logits(model)
    experts = experts_modules(model)[0][1]
    inputs = (torch.ones(1, 32), torch.tensor([[3, 5]]), torch.ones(1, 2))

    def use() -> Tensor:
        with torch.no_grad():
            return experts(*inputs)

    assert in_child(use).startswith("StateError: ")
    assert "fork" in in_child(use)
    assert in_child(offloader.close) == "None", "closing what the parent owns must not hang"
    assert torch.equal(logits(model), expected)
    offloader.restore()
    assert torch.equal(logits(model), expected)


def test_read_errors_are_state_free_under_injected_failures() -> None:
    """Failing copies reach the caller as PageReadError; afterwards results are exact again."""
    model = tiny_model("olmoe")
    offloader = moe_offload.offload(model)
    expected = logits(model)
    offloader.resize(offloader.smallest_budget_bytes)
    offloader.chaos(seed=1, fail_probability=0.5, max_delay_us=200, reorder=True)
    failures = 0
    for seed in range(10):
        try:
            logits(model, seed)
        except PageReadError:
            failures += 1
    assert failures > 0
    offloader.chaos()
    assert torch.equal(logits(model), expected)
