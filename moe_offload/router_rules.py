"""What the routers of transformers' MoE models compute, told from their source.

transformers 5.17 has 40 router classes whose `forward` is one of the texts below, under names that
do not tell what they compute. `triton_kernels/scoring.py` says how the families differ; a `Rule`
has besides what is rounded when, and in which order equal and unsorted choices come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from moe_offload import _core
from moe_offload.source_text import statements


class Rule(NamedTuple):
    """How a token's logits become its experts and their weights.

    Attributes:
        score: softmax over all experts, sigmoid, or softmax over the chosen ("softmax_topk").
        top_k: A, experts of a token.
        rounds_logits: to x's dtype before they are used, as F.linear does; else they stay float32.
        sorted: experts in falling order of choice; else in the order torch.topk leaves them in.
        normalises: a token's weights over (their sum + `epsilon`).
        scale: multiplies the weights at the end.
        groups: (of how many equal groups of consecutive experts, how many may be chosen from, how
            many of a group's best choices are added up to compare them).
        masked: what the choices of experts in other groups become.
        float_logits, float_weights: returned in float32; else in x's dtype.
    """

    score: Literal["softmax", "softmax_topk", "sigmoid"]
    top_k: int
    rounds_logits: bool = True
    sorted: bool = True
    normalises: bool = False
    epsilon: float = 0.0
    scale: float = 1.0
    groups: tuple[int, int, int] = (1, 1, 1)
    masked: float = -torch.inf
    float_logits: bool = False
    float_weights: bool = False

    def fits(self, num_experts: int) -> bool:
        """Can so many experts be routed by it, without choosing a masked one?"""
        return None not in self.groups and _core.RouterRule(*self).fits(num_experts)


@dataclass(frozen=True, eq=False)
class Form:
    """A text of `forward` and what it computes.

    Attributes:
        text: as `source_text.statements` writes it, but for empty lines.
        attributes: of a module of such a class, what its rule depends on.
        rule: from their values.
        flattens: takes x of any number of dimensions.
        has_bias: `bias` is added to the logits.
        correction: the module's `e_score_correction_bias`, none, or given as a second argument.
        ids_first: returns (ids, weights, logits), else (logits, weights, ids).
    """

    text: str
    attributes: tuple[str, ...]
    rule: Callable[..., Rule]
    flattens: bool = True
    has_bias: bool = False
    correction: Literal["none", "own", "given"] = "none"
    ids_first: bool = False


_FLAT = "hidden_states = hidden_states.reshape(-1, self.hidden_dim)"
_LOGITS = "router_logits = F.linear(hidden_states, self.weight)"
_FLOAT_LOGITS = """
hidden_states = hidden_states.view(-1, self.hidden_dim)
router_logits = F.linear(hidden_states.type(torch.float32), self.weight.type(torch.float32))
"""
_SOFTMAX = f"""
{_FLAT}
{_LOGITS}
router_probs = torch.nn.functional.softmax(router_logits, dtype=torch.float, dim=-1)
router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
"""
_SUM = "router_top_value /= router_top_value.sum(dim=-1, keepdim=True)"
_ROUNDED = """
router_top_value = router_top_value.to(router_logits.dtype)
router_scores = router_top_value
return (router_logits, router_scores, router_indices)
"""
_GROUP_MASK = """
    group_idx = torch.topk(group_scores, k=self.topk_group, dim=-1, sorted=False)[1]
    group_mask = torch.zeros_like(group_scores)
    group_mask.scatter_(1, group_idx, 1)
    score_mask = group_mask.unsqueeze(-1).expand(-1, self.num_group, self.num_experts //\
 self.num_group).reshape(-1, self.num_experts)
"""
_GRANITE = """
router_logits = F.linear(hidden_states, self.weight).float()
top_k_logits, top_k_index = router_logits.topk(self.top_k, dim=-1)
top_k_weights = torch.softmax(top_k_logits, dim=-1).type_as(hidden_states)
"""
_SIGMOID = f"""
{_FLAT}
router_logits = F.linear(hidden_states.to(self.weight.dtype), self.weight)
routing_weights = {{}}sigmoid(router_logits.float())
scores_for_choice = routing_weights + {{}}e_score_correction_bias
_, top_k_index = torch.topk(scores_for_choice, self.top_k, dim=-1, sorted=False)
top_k_weights = routing_weights.gather(1, top_k_index)
top_k_weights /= top_k_weights.sum(dim=-1, keepdim=True)
"""


def _softmax(top_k: int, normalises: bool = True) -> Rule:
    return Rule("softmax", top_k, normalises=bool(normalises))


def _mixtral(top_k: int) -> Rule:
    return Rule("softmax", top_k, normalises=True, float_weights=True)


def _granite(top_k: int) -> Rule:
    return Rule("softmax_topk", top_k, float_logits=True)


def _gpt_oss(top_k: int) -> Rule:
    return Rule("softmax_topk", top_k)


def _minimax(top_k: int) -> Rule:
    return Rule("sigmoid", top_k, sorted=False, normalises=True, float_weights=True)


_IN_FLOAT = Rule(
    *("sigmoid", 0), rounds_logits=False, sorted=False, float_logits=True, float_weights=True
)


def _hunyuan(top_k: int, scale: float) -> Rule:
    return _IN_FLOAT._replace(top_k=top_k, normalises=True, epsilon=1e-20, scale=scale)


def _deepseek_v3(
    top_k: int, normalises: bool, scale: float, num_groups: int, top_groups: int
) -> Rule:
    groups = (num_groups, top_groups, 2)
    return _hunyuan(top_k, scale)._replace(normalises=bool(normalises), groups=groups)


def _deepseek_v2(top_k: int, method: str, scale: float, num_groups: int, top_groups: int) -> Rule:
    rule = _IN_FLOAT._replace(score="softmax", top_k=top_k, scale=scale, masked=0.0)
    if method == "group_limited_greedy":
        return rule._replace(groups=(num_groups, top_groups, 1))
    return rule if method == "greedy" else rule._replace(top_k=0)  # which fits nothing


_FORMS: list[Form] = [
    # OLMoE, Qwen2-MoE, Qwen3-MoE and six more
    Form(
        f"{_SOFTMAX}if self.norm_topk_prob:\n    {_SUM}{_ROUNDED}",
        ("top_k", "norm_topk_prob"),
        _softmax,
    ),
    # Qwen3.5-MoE, Qwen3-VL-MoE, Qwen3-Omni-MoE
    Form(f"{_SOFTMAX}{_SUM}{_ROUNDED}", ("top_k",), _softmax),
    Form(  # Mixtral, MiniMax
        f"""
{_FLAT}
{_LOGITS}
router_probs = torch.nn.functional.softmax(router_logits.float(), dim=-1)
router_top_value, router_indices = torch.topk(router_probs, self.top_k, dim=-1)
{_SUM}
router_scores = router_top_value
return (router_logits, router_scores, router_indices)
""",
        ("top_k",),
        _mixtral,
    ),
    Form(  # DeepSeek-V3, GLM-4-MoE, dots.llm1, Kimi and eleven more
        f"""
{_FLOAT_LOGITS}
scores = router_logits.sigmoid()
scores_for_choice = scores + self.e_score_correction_bias
group_scores = scores_for_choice.view(-1, self.num_group, self.num_experts //\
 self.num_group).topk(2, dim=-1)[0].sum(dim=-1)
{_GROUP_MASK.replace("    ", "")}
scores_for_choice = scores_for_choice.masked_fill(~score_mask.bool(), float('-inf'))
topk_indices = torch.topk(scores_for_choice, k=self.top_k, dim=-1, sorted=False)[1]
topk_weights = scores.gather(1, topk_indices)
if self.norm_topk_prob:
    denominator = topk_weights.sum(dim=-1, keepdim=True) + 1e-20
    topk_weights /= denominator
topk_weights = topk_weights * self.routed_scaling_factor
return (router_logits, topk_weights, topk_indices)
""",
        ("top_k", "norm_topk_prob", "routed_scaling_factor", "num_group", "topk_group"),
        _deepseek_v3,
        correction="own",
    ),
    Form(  # DeepSeek-V2
        f"""
{_FLOAT_LOGITS}
scores = router_logits.softmax(dim=-1, dtype=torch.float32)
if self.topk_method == 'greedy':
    topk_weights, topk_indices = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
elif self.topk_method == 'group_limited_greedy':
    group_scores = scores.view(-1, self.num_group, self.num_experts //\
 self.num_group).max(dim=-1).values
    {_GROUP_MASK}
    scores = scores.masked_fill(~score_mask.bool(), 0.0)
    topk_weights, topk_indices = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
topk_weights = topk_weights * self.routed_scaling_factor
return (router_logits, topk_weights, topk_indices)
""",
        ("top_k", "topk_method", "routed_scaling_factor", "num_group", "topk_group"),
        _deepseek_v2,
    ),
    Form(  # MiniMax-M3, Step-3.7
        f"{_SIGMOID.format('F.', 'self.')}return (router_logits, top_k_weights, top_k_index)",
        ("top_k",),
        _minimax,
        correction="own",
    ),
    Form(  # MiniMax-M2
        f"{_SIGMOID.format('nn.functional.', '')}router_scores = top_k_weights\n"
        "return (router_logits, router_scores, top_k_index)",
        ("top_k",),
        _minimax,
        correction="given",
    ),
    Form(  # Hunyuan-V3
        f"""
{_FLAT}
router_logits = F.linear(hidden_states.float(), self.weight.float())
routing_weights = torch.sigmoid(router_logits)
scores_for_choice = routing_weights + e_score_correction_bias
_, top_k_index = torch.topk(scores_for_choice, self.top_k, dim=-1, sorted=False)
top_k_weights = routing_weights.gather(1, top_k_index)
top_k_weights = top_k_weights / (top_k_weights.sum(dim=-1, keepdim=True) + 1e-20)
top_k_weights = top_k_weights * self.router_scaling_factor
return (router_logits, top_k_weights, top_k_index)
""",
        ("top_k", "router_scaling_factor"),
        _hunyuan,
        correction="given",
    ),
    Form(  # Granite-MoE, shared and hybrid
        f"{_GRANITE}return (top_k_index, top_k_weights, router_logits)",
        ("top_k",),
        _granite,
        flattens=False,
        ids_first=True,
    ),
    Form(  # Granite-MoE with sliding windows
        f"{_GRANITE}return (router_logits, top_k_weights, top_k_index)",
        ("top_k",),
        _granite,
        flattens=False,
    ),
    Form(  # gpt-oss
        """
router_logits = F.linear(hidden_states, self.weight, self.bias)
router_top_value, router_indices = torch.topk(router_logits, self.top_k, dim=-1)
router_scores = torch.nn.functional.softmax(router_top_value, dim=1, dtype=router_top_value.dtype)
return (router_logits, router_scores, router_indices)
""",
        ("top_k",),
        _gpt_oss,
        flattens=False,
        has_bias=True,
    ),
]


def _lines(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip())


def form_of(router: type) -> Form | None:
    """What a router class computes; None where its `forward` is none of the texts above."""
    for form in _FORMS:
        num_arguments = 3 if form.correction == "given" else 2  # with self
        text = statements(getattr(router, "forward", None), num_arguments)
        if text is not None and _lines(text) == _lines(form.text):
            return form
    return None
