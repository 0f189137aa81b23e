"""Attention layers of decoded tokens in two native calls: the bits of the same steps one by one."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.olmoe.modeling_olmoe import apply_rotary_pos_emb

import moe_offload
from moe_offload import _core, attention, dense
from moe_offload.backends.native import DTYPES
from moe_offload.huggingface import attention_layers
from moe_offload.huggingface.attention_layers import _native_class, _TokenAttention

# Norms of heads, of rows (and clamped where a config says so), none, and rotation of a part.
FAMILIES = ("qwen3_moe", "olmoe", "qwen2_moe", "mixtral", "minimax_m2")
KERNELS = [(dtype, isa) for dtype, name in DTYPES.items() for isa in _core.cpu_isas(name)]


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used does not depend on what pays on this machine."""
    monkeypatch.setattr(dense, "_pays", lambda dtype: (1, 1000 if dtype in DTYPES else 0))
    monkeypatch.setattr(attention, "_pays", lambda dtype: 0 if dtype in DTYPES else 1 << 62)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes whose tokens went through the native call, one entry a call."""
    calls: list[str] = []
    project = attention_layers._project

    def counting(module, *args):
        calls.append(module.own.__name__)
        return project(module, *args)

    monkeypatch.setattr(attention_layers, "_project", counting)
    return calls


def plain_model(name: str, dtype: torch.dtype, **config: object) -> nn.Module:
    """A model of transformers alone."""
    if name == "minimax_m2":  # not one of the families that the other tests go through
        config = {"num_local_experts": 8, "rotary_dim": 6, **tiny_models._COMMON, **config}
        torch.manual_seed(0)
        built = AutoConfig.for_model(name, **config)
        return AutoModelForCausalLM.from_config(built, dtype=dtype).eval()
    return tiny_models.tiny_model(name, dtype, implementation="grouped_mm", **config)


def tiny(name: str, dtype: torch.dtype = torch.bfloat16, **config: object) -> nn.Module:
    """A model on native kernels with norms and biases that do something."""
    model = plain_model(name, dtype, **config)
    torch.manual_seed(7)
    for key, parameter in model.named_parameters():
        if "norm" in key or "bias" in key:
            parameter.data += 0.3 * torch.randn_like(parameter)
    moe_offload.use_dense_kernels(model)
    return model


def step_by_step(model: nn.Module) -> nn.Module:
    """The same model with the attention layers' own forward."""
    for module in model.modules():
        if isinstance(module, _TokenAttention):
            module.__class__ = module.own
    return model


@torch.no_grad()
def decoded(model: nn.Module, tokens: Tensor, mask: Tensor | None, steps: int = 5) -> Tensor:
    """Logits [steps, B, V] of greedy tokens behind a prompt [B, T]."""
    cache, logits = None, []
    for _ in range(steps + 1):
        out = model(tokens, past_key_values=cache, attention_mask=mask, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1]
        tokens = last.argmax(-1, keepdim=True)
        logits.append(last)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
    return torch.stack(logits[1:])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("name", FAMILIES)
def test_bits_are_those_of_the_same_steps(
    name: str, dtype: torch.dtype, batch: int, projected: list[str]
) -> None:
    model = tiny(name, dtype)
    prompt, mask = tiny_models.prompt_ids(9, batch), None
    if batch > 1:  # two sequences padded on the left
        mask = torch.ones_like(prompt)
        mask[0, :4] = mask[1, :1] = 0
    got = decoded(model, prompt, mask)
    layers = model.config.num_hidden_layers
    assert len(projected) == 5 * layers, "prompts go to the class's own forward"
    expected = decoded(step_by_step(model), prompt, mask)
    assert len(projected) == 5 * layers
    assert not got.isnan().any()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_it_is_transformers_own_layer(name: str, projected: list[str]) -> None:
    """Against a model that nothing was done to: the bits of torch's products differ, not more."""
    model = tiny(name, torch.float32)
    plain = plain_model(name, torch.float32)
    plain.load_state_dict(model.state_dict())
    prompt = tiny_models.prompt_ids(9)
    torch.testing.assert_close(
        decoded(model, prompt, None), decoded(plain, prompt, None), rtol=1e-4, atol=1e-4
    )
    assert projected


@pytest.mark.parametrize("rotated", [8, 6, 128, 64, 20])
@pytest.mark.parametrize(("dtype", "isa"), KERNELS)
def test_rotation_is_torchs_bit_for_bit(dtype: torch.dtype, isa: str, rotated: int) -> None:
    batch, size, width = 3, max(rotated, 24), 16
    x = torch.randn(batch, 1, width).to(dtype)
    angles = torch.randn(batch, 1, rotated // 2).repeat(1, 1, 2) * 3
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    weights = [torch.randn(heads * size, width).to(dtype) for heads in (4, 2, 2)]
    kernels = _core.DenseKernels(DTYPES[dtype], isa)
    got, plain = [], []
    for weight in weights:
        got.append(torch.full((batch, len(weight) // size, 1, size), math.nan, dtype=dtype))
        plain.append(torch.full_like(got[-1], math.nan))
        kernels.multiply(
            *(x.data_ptr(), batch, width, len(weight), weight.data_ptr()),
            *(width * dtype.itemsize, 0, plain[-1].data_ptr(), 2),
        )
    kernels.project(
        *(x.data_ptr(), batch, width),
        *(
            (w.data_ptr(), width * dtype.itemsize, 0, len(w), out.data_ptr())
            for w, out in zip(weights, got, strict=True)
        ),
        *(size, None, None),
        (cos.data_ptr(), sin.data_ptr(), rotated * dtype.itemsize, rotated),
        2,
    )
    query, key, value = plain
    turned = apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], cos, sin)
    for mine, own, part in zip(got, (query, key), turned, strict=False):
        assert torch.equal(mine[..., :rotated], part)
        assert torch.equal(mine[..., rotated:], own[..., rotated:])
    assert torch.equal(got[2], value)


def forward_once(model: nn.Module, **changes: object) -> None:
    """One decoded token behind a prompt, with something changed before it."""
    cache = model(tiny_models.prompt_ids(6), use_cache=True).past_key_values
    model(torch.tensor([[5]]), past_key_values=cache, use_cache=True, **changes)


def test_what_goes_to_the_class_itself(projected: list[str]) -> None:
    model = tiny("qwen3_moe")
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        forward_once(model)
        assert len(projected) == 2
        projected.clear()

        model(torch.tensor([[5]]), use_cache=False)
        assert not projected, "no cache"
        seen: list[Tensor] = []
        for part in (layer.q_proj, layer.k_norm):
            hook = part.register_forward_hook(lambda module, args, out: seen.append(out))
            forward_once(model)
            hook.remove()
            assert len(projected) == 1, "a hook is called; the other layer has none"
            assert len(seen) == 2, "prompt and token"
            projected.clear()
            seen.clear()
        layer.v_proj.forward = lambda x: seen.append(x) or nn.Linear.forward(layer.v_proj, x)
        forward_once(model)
        del layer.v_proj.forward
        assert len(projected) == 1, "somebody's own forward"
        assert len(seen) == 2
        projected.clear()
        weight = layer.k_norm.weight.data
        layer.k_norm.weight.data = weight.repeat_interleave(2)[::2]
        forward_once(model)
        assert len(projected) == 1, "strides"
        layer.k_norm.weight.data = weight
        projected.clear()
        model.set_attn_implementation("eager")
        forward_once(model)
        assert not projected, "another attention"
        model.set_attn_implementation("moe_offload_sdpa")
        forward_once(model)
        assert len(projected) == 2
        projected.clear()
    layer.train()
    with torch.no_grad():
        forward_once(model)
    assert len(projected) == 1, "training"


def test_gradients_go_to_the_class_itself(projected: list[str]) -> None:
    model = tiny("qwen3_moe", torch.float32)
    cache = model(tiny_models.prompt_ids(6), use_cache=True).past_key_values
    hidden = torch.randn(1, 1, 32, requires_grad=True)
    layer = model.model.layers[0].self_attn
    angles = model.model.rotary_emb(hidden, torch.tensor([[6]]))
    out, _ = layer(hidden, position_embeddings=angles, past_key_values=cache, attention_mask=None)
    out.sum().backward()
    assert hidden.grad is not None
    assert not projected


def test_olmoes_clamp_is_not_forgotten(projected: list[str]) -> None:
    model = tiny("olmoe")
    prompt = tiny_models.prompt_ids(9)
    free = decoded(model, prompt, None)
    assert projected
    projected.clear()
    model.config.clip_qkv = 0.05
    clamped = decoded(model, prompt, None)
    assert not projected
    assert not torch.equal(free, clamped)


def test_copies_pickles_and_undo(projected: list[str]) -> None:
    model = plain_model("qwen3_moe", torch.bfloat16)
    text, own = repr(model), type(model.model.layers[0].self_attn)
    undo = moe_offload.use_dense_kernels(model)
    layer = model.model.layers[0].self_attn
    assert isinstance(layer, own)
    assert type(layer) is not own
    assert repr(model) == text
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(again) is type(layer)
        assert torch.equal(again.q_proj.weight, layer.q_proj.weight)
    undo()
    assert type(layer) is own
    with torch.no_grad():
        forward_once(model)
    assert not projected


def test_layers_of_another_kernel_keep_their_own_forward(projected: list[str]) -> None:
    """Only attention is swapped: projections are torch's, so are the tokens."""
    model = plain_model("qwen3_moe", torch.bfloat16)
    attention_layers.use_token_projections(model)
    with torch.no_grad():
        forward_once(model)
    assert not projected


def test_recognised_classes_of_transformers() -> None:
    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        if "Experts(" not in path.read_text():
            continue
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        try:
            module = importlib.import_module(name)
        except ImportError:  # wants a package that is not here
            continue
        for key, value in vars(module).items():
            if key.endswith("Attention") and getattr(value, "__module__", "") == name:
                native = _native_class(value)
                if native is not None:
                    found[key] = native.normed
    expected = {
        "OlmoeAttention": "rows",
        "MiniMaxM2Attention": "rows",
        "Qwen3MoeAttention": "heads",
        "Qwen3VLMoeTextAttention": "heads",
        "Dots1Attention": "heads",
        "MixtralAttention": "nothing",
        "Qwen2MoeAttention": "nothing",
        "PhimoeAttention": "nothing",
        "GraniteMoeAttention": "nothing",
    }
    assert expected.items() <= found.items()
    # sinks, gates, latent attention, other rotations
    assert not found.keys() & {"GptOssAttention", "DeepseekV3Attention", "Qwen3NextAttention"}


def test_a_text_that_differs_is_not_recognised() -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    class OtherAttention(Qwen3MoeAttention):
        def forward(self, hidden_states, position_embeddings, attention_mask, **kwargs):
            return super().forward(-hidden_states, position_embeddings, attention_mask, **kwargs)

    assert _native_class(Qwen3MoeAttention) is not None
    assert _native_class(OtherAttention) is None
