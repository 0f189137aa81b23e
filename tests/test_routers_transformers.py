"""The routers of transformers' models: which are known, computed as their own forward does."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from moe_offload import routing
from moe_offload.dense import use_dense_kernels
from moe_offload.router_rules import form_of
from moe_offload.routing import MAX_TOKENS, use_native_routers

transformers = pytest.importorskip("transformers")

WIDTH, NUM_EXPERTS = 64, 16
CONFIG = {
    "num_experts_per_tok": 3,
    "num_experts": NUM_EXPERTS,
    "num_local_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "hidden_size": WIDTH,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "router_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "group_limited_greedy",
}
# Model and class (transformers 5.17 has 40 of them), what its config has else, is the correction
# given to forward.
ROUTERS = [
    ("olmoe", "OlmoeTopKRouter", {}, False),
    ("olmoe", "OlmoeTopKRouter", {"norm_topk_prob": False}, False),
    ("qwen3_moe", "Qwen3MoeTopKRouter", {}, False),
    ("qwen3_5_moe", "Qwen3_5MoeTopKRouter", {}, False),
    ("mixtral", "MixtralTopKRouter", {}, False),
    ("deepseek_v3", "DeepseekV3TopkRouter", {}, False),
    ("deepseek_v3", "DeepseekV3TopkRouter", {"norm_topk_prob": False}, False),
    ("deepseek_v3", "DeepseekV3TopkRouter", {"n_group": 1, "topk_group": 1}, False),
    ("glm4_moe", "Glm4MoeTopkRouter", {"n_group": 8, "topk_group": 3}, False),
    ("kimi_linear", "KimiLinearTopkRouter", {}, False),
    ("deepseek_v2", "DeepseekV2TopkRouter", {}, False),
    ("deepseek_v2", "DeepseekV2TopkRouter", {"topk_method": "greedy"}, False),
    ("minimax_m2", "MiniMaxM2TopKRouter", {}, True),
    ("minimax_m3_vl", "MiniMaxM3VLTopKRouter", {}, False),
    ("hy_v3", "HYV3TopKRouter", {}, True),
    ("granitemoe", "GraniteMoeTopKRouter", {}, False),
    ("gpt_oss", "GptOssTopKRouter", {}, False),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KNOWN = {
    "AXK1TopkRouter",
    "DeepseekOcr2TextTopkRouter",
    "DeepseekV2TopkRouter",
    "DeepseekV32TopkRouter",
    "DeepseekV3TopkRouter",
    "Dots1TopkRouter",
    "ExaoneMoeTopkRouter",
    "FlexOlmoTopKRouter",
    "Glm4MoeLiteTopkRouter",
    "Glm4MoeTopkRouter",
    "Glm4vMoeTextTopkRouter",
    "Glm5NextTextTopkRouter",
    "GlmMoeDsaTopkRouter",
    "GptOssTopKRouter",
    "GraniteMoeHybridTopKRouter",
    "GraniteMoeSWATopKRouter",
    "GraniteMoeSharedTopKRouter",
    "GraniteMoeTopKRouter",
    "HYV3TopKRouter",
    "HYV4TopkRouter",
    "KimiLinearTopkRouter",
    "MellumTopKRouter",
    "MiMoV2FlashTopkRouter",
    "MiniMaxM2TopKRouter",
    "MiniMaxM3VLTopKRouter",
    "MiniMaxTopKRouter",
    "MixtralTopKRouter",
    "NemotronHTopkRouter",
    "OlmoeTopKRouter",
    "Qwen2MoeTopKRouter",
    "Qwen3MoeTopKRouter",
    "Qwen3NextTopKRouter",
    "Qwen3OmniMoeTalkerTextTopKRouter",
    "Qwen3OmniMoeTextTopKRouter",
    "Qwen3OmniMoeThinkerTextTopKRouter",
    "Qwen3VLMoeTextTopKRouter",
    "Qwen3_5MoeTopKRouter",
    "Qwen4ExpTextTopKRouter",
    "SolarOpenTopkRouter",
    "Step3p7TopKRouter",
}


def modelling(model: str):
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}")


def made(model: str, name: str, changes: dict, dtype: torch.dtype) -> nn.Module:
    """A router whose logits are exact in every dtype and order, and tie often. None are opposite,
    and groups have the same correction: sums of two choices tie only where their parts do."""
    router = getattr(modelling(model), name)(SimpleNamespace(**{**CONFIG, **changes}))
    router.weight.data = (torch.randint(-2, 3, (NUM_EXPERTS, WIDTH)) / 8).to(dtype)
    router.weight.data[:, 0] = 1 / 32
    if hasattr(router, "bias"):
        router.bias.data = (torch.randint(-2, 3, (NUM_EXPERTS,)) / 8).to(dtype)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.data = corrections()
    return router


def corrections() -> Tensor:
    return (torch.randint(0, 4, (4,)) / 8.0).repeat_interleave(NUM_EXPERTS // 4)


def drawn(num_tokens: int, dtype: torch.dtype) -> Tensor:
    x = torch.randint(-1, 2, (num_tokens, WIDTH)).to(dtype)
    x[:, 0] = 1
    return x


def same(got: tuple, own: tuple) -> None:
    assert len(got) == len(own) == 3
    for mine, theirs in zip(got, own, strict=True):
        # ids and logits are equal, weights within what test_routers.close says
        bound = 0.0
        if mine.is_floating_point() and mine.shape[-1] != NUM_EXPERTS:
            bound = 2.0**-20 + {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(mine.dtype, 0)
        torch.testing.assert_close(mine, theirs, rtol=bound, atol=0.0, equal_nan=True)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def native(monkeypatch) -> list[int]:
    """Counts what is computed natively, on any instruction set."""
    calls: list[int] = []
    route = routing._route

    def counted(x: Tensor, *others):
        calls.append(len(x))
        return route(x, *others)

    monkeypatch.setattr(routing, "_route", counted)
    monkeypatch.setattr(routing, "_max_tokens", lambda dtype: MAX_TOKENS.get(dtype, 0))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("model", "name", "changes", "given"), ROUTERS)
def test_computes_what_its_own_forward_does(model, name, changes, given, dtype, native) -> None:
    router = made(model, name, changes, dtype)
    own = copy.deepcopy(router)
    undo = use_native_routers(router)
    most = MAX_TOKENS[dtype]
    others = (corrections(),) if given else ()
    with torch.no_grad():
        for num_tokens in [*range(1, 9), most, most + 1]:
            x = drawn(num_tokens, dtype)
            same(router(x, *others), own(x, *others))
    assert native == [*range(1, 9), most]
    undo()
    assert type(router) is type(own)


@pytest.mark.parametrize(("model", "name", "changes", "given"), ROUTERS)
def test_nan_is_its_own_too(model, name, changes, given, native) -> None:
    router = made(model, name, changes, torch.float32)
    own = copy.deepcopy(router)
    use_native_routers(router)
    others = (torch.zeros(NUM_EXPERTS),) if given else ()
    x = drawn(1, torch.float32)
    for experts in ([3], [0, 15], range(16)):
        own.weight.data[list(experts), 1] = router.weight.data[list(experts), 1] = torch.nan
        with torch.no_grad():
            same(router(x, *others), own(x, *others))
    assert native == [1, 1, 1]


def test_known_classes() -> None:
    """A change of this list or of a text is a change of transformers: see router_rules.py."""
    known = set()
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        names = re.findall(r"^class (\w*[Rr]outer)\(", path.read_text(), re.MULTILINE)
        for name in names:
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            known |= {name} if form_of(getattr(module, name)) is not None else set()
    assert known == KNOWN


def test_copies_and_pickles_are_native_and_undone() -> None:
    router = made("olmoe", "OlmoeTopKRouter", {}, torch.bfloat16)
    own, x = type(router), drawn(2, torch.bfloat16)
    model = nn.Sequential(router)
    text = repr(model)
    undo = use_native_routers(model)
    use_native_routers(model)  # twice is once
    assert isinstance(router, own)
    assert type(router) is not own
    assert repr(model) == text
    with torch.no_grad():
        wanted = router(x)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(again[0]) is type(router)
            assert all(map(torch.equal, again[0](x), wanted))
    undo()
    assert type(router) is own


def test_a_rule_is_what_its_module_says_now(native) -> None:
    router = made("olmoe", "OlmoeTopKRouter", {}, torch.float32)
    use_native_routers(router)
    x = drawn(1, torch.float32)
    with torch.no_grad():
        for top_k, normalises in [(3, True), (3, False), (5, False), (5, True)]:
            router.top_k, router.norm_topk_prob = top_k, normalises
            same(router(x), type(router).own.forward(router, x))
    assert len(native) == 4


def test_what_is_not_taken_goes_to_the_class_itself(native) -> None:
    router = made("deepseek_v3", "DeepseekV3TopkRouter", {}, torch.float32)
    own = copy.deepcopy(router)
    use_native_routers(router)
    x = drawn(3, torch.float32)

    router(x)[1].sum().backward()  # gradients of the weight
    assert router.weight.grad is not None
    with torch.no_grad():
        same(router(hidden_states=x), own(x))
        assert native == []
        same(router(x[:, None].repeat(1, 2, 1)), own(x.repeat_interleave(2, 0)))
        assert native == [3]
        native.clear()
        same(router(torch.cat((x, -x), -1)[:, :WIDTH]), own(x))
        assert router(x.bfloat16())[0].dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            same(router(x), own(x))
        router.e_score_correction_bias = own.e_score_correction_bias.double()
        same(router(x), own(x))
        router.e_score_correction_bias = own.e_score_correction_bias
        router.topk_group = own.topk_group = 1  # three of four experts
        router.top_k = own.top_k = 5  # of four
        same(router(x), own(x))
    router.top_k, router.topk_group = 3, 2
    with pytest.raises(RuntimeError, match="shape"):
        router(torch.zeros(2, WIDTH + 1))
    assert native == []


def test_the_correction_may_be_in_16_bits(native) -> None:
    router = made("deepseek_v3", "DeepseekV3TopkRouter", {}, torch.bfloat16)
    router.bfloat16()
    own = copy.deepcopy(router)
    assert own.e_score_correction_bias.dtype == torch.bfloat16
    use_native_routers(router)
    with torch.no_grad():
        x = drawn(2, torch.bfloat16)
        same(router(x), own(x))
    assert native == [2]


def test_what_only_looks_like_a_router_is_left_alone() -> None:
    own = type(made("olmoe", "OlmoeTopKRouter", {}, torch.float32))

    class OtherTopKRouter(own):
        def forward(self, hidden_states):
            logits, scores, ids = super().forward(hidden_states)
            return logits, 2 * scores, ids

    router = OtherTopKRouter(SimpleNamespace(**CONFIG))
    use_native_routers(router)
    assert type(router) is OtherTopKRouter


def test_a_model_routes_and_records_its_logits_as_before(native) -> None:
    config = transformers.OlmoeConfig(
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=64,
    )
    model = transformers.OlmoeForCausalLM(config).eval()
    tokens = torch.randint(0, 64, (1, 5))
    with torch.no_grad():
        own = model(tokens, output_router_logits=True)
        undo = use_dense_kernels(model)
        got = model(tokens, output_router_logits=True)
        undo()
    assert native == [5, 5]
    # logits of 32 products here and there, behind layers of other sums of as many
    torch.testing.assert_close(got.router_logits, own.router_logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits, own.logits, rtol=1e-4, atol=1e-5)
    assert type(model.model.layers[0].mlp.gate).__name__ == "OlmoeTopKRouter"
