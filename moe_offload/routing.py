"""A model's routers as one native call each, from hidden states to experts and their weights.

Written in PyTorch a router is five to twenty operations on a few hundred numbers, behind a product,
and their code and data are out of the caches when they are wanted: the experts of the layer before
went through them.

As with norms (norms.py) a class is recognised by its source (router_rules.py), and what is no such
text keeps its own.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_offload import _core
from moe_offload.backends.native import DTYPES, PLAIN_TENSORS, dense_kernels
from moe_offload.class_swap import StandIn, stand_in, swap_classes
from moe_offload.router_rules import Form, Rule, form_of

# Tokens up to which this was faster than torch on routers of OLMoE, Qwen3 and DeepSeek-V3 (2048 to
# 64 and to 128, 7168 to 256), caches cold: at the last of them 1.3 to 2.5 x in 16 bits and 1.1 to
# 1.4 in float32, with AVX2 forced 1.2 to 2.2 and 1.1 to 1.2 (two Zen 4 cores, scratch runs; float32
# at 64: 0.87 to 1.12). Nothing is measured without AVX2, where torch keeps them.
MAX_TOKENS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}


def route(
    x: Tensor,
    weight: Tensor,
    rule: Rule,
    *,
    bias: Tensor | None = None,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The experts of each token by a linear router.

    Args:
        x: [..., H]; float32, bfloat16 or float16, contiguous, on the CPU.
        weight: [E, H], x's dtype, contiguous.
        rule: how logits become experts and weights.
        bias: [E] in x's dtype, added to the logits, or None.
        correction: [E], added to the scores for the choice only, in float32; or None.

    Returns:
        Logits [T, E] and weights [T, A], each in x's dtype or float32 (`rule`), and ids [T, A]
        int64. Sums are float32. Of equal choices those are taken that torch.topk takes on a CPU.
        Bits depend on the instruction set and the dtype, not on other tokens or threads.

    Raises:
        ValueError: another device, dtype or shape, or sizes that do not fit the rule.

    Cost: E H weight elements read once, 2 E H floating-point operations a token.
    """
    if not (_fits(x, weight, bias, correction) and rule.fits(len(weight))):
        others = [f"{n} {_said(t)}" for n, t in (("bias", bias), ("correction", correction))]
        raise ValueError(
            "route: expected contiguous x [..., H], weight [E, H] and bias [E] on the CPU, all "
            "float32, bfloat16 or float16, a correction [E] of any of these and a rule for E "
            f"experts, got x {_said(x)}, weight {_said(weight)}, {', '.join(others)} and {rule}"
        )
    return _route(x, weight, (rule, _core.RouterRule(*rule)), bias, correction)


def _said(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


_NativeRule = tuple[Rule, _core.RouterRule]


def _route(
    x: Tensor,
    weight: Tensor,
    native_rule: _NativeRule,
    bias: Tensor | None,
    correction: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rule, native = native_rule
    num_experts, width = weight.shape
    rows, top_k = x.numel() // width, rule.top_k
    dtype = x.dtype
    logits = x.new_empty((rows, num_experts), dtype=torch.float32 if rule.float_logits else dtype)
    weights = x.new_empty((rows, top_k), dtype=torch.float32 if rule.float_weights else dtype)
    ids = x.new_empty((rows, top_k), dtype=torch.int64)
    if correction is not None and correction.dtype is not torch.float32:
        correction = correction.float()
    dense_kernels(dtype).route(
        x.data_ptr(),
        rows,
        width,
        num_experts,
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if correction is None else correction.data_ptr(),
        native,
        logits.data_ptr(),
        weights.data_ptr(),
        ids.data_ptr(),
        torch.get_num_threads(),
    )
    return logits, weights, ids


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None, correction: Tensor | None) -> bool:
    dtype = x.dtype
    return (
        dtype in DTYPES
        and weight.dtype is dtype
        and x.is_cpu
        and weight.is_cpu
        and x.shape[-1:] == weight.shape[1:]
        and weight.dim() == 2
        and x.is_contiguous()
        and weight.is_contiguous()
        and x.numel() > 0
        and (bias is None or (bias.dtype is dtype and _one_each(bias, weight)))
        and (correction is None or (correction.dtype in DTYPES and _one_each(correction, weight)))
    )


def _one_each(values: Tensor, weight: Tensor) -> bool:
    return values.is_cpu and values.shape == weight.shape[:1] and values.is_contiguous()


def use_native_routers(model: nn.Module) -> Callable[[], None]:
    """Let routers that are recognised be computed here; returns what takes that back.

    Calls of many tokens, gradients, autocast, torch.compile and what `route` refuses go to the
    model's own forward.
    """
    return swap_classes(model, _native_class)


class _NativeRouter(StandIn):
    """In front of a model's own router class, by `_native_class`.

    Between two calls experts stream through the caches, and then a call of a function of torch's
    takes 3 to 12 us instead of 0.3 (two Zen 4 cores, scratch run): the fewer the better.
    """

    form: ClassVar[Form]
    values: ClassVar[Callable[[Any], Any]]  # of the form's attributes
    rule_for: ClassVar[Callable[[Any, int], _NativeRule | None]]  # these values, so many experts

    def forward(self, *args: Any, **named: Any) -> Any:
        module: Any = self
        form = self.form
        given = len(args) == (2 if form.correction == "given" else 1)
        if given and not named and not torch.compiler.is_compiling():
            x, weight = args[0], module._parameters.get("weight")  # None: parametrised
            bias = module.bias if form.has_bias else None
            correction = None
            if form.correction == "own":
                correction = module.e_score_correction_bias
            elif form.correction == "given":
                correction = args[1]
            if (
                type(x) is Tensor
                and type(weight) in PLAIN_TENSORS
                and (bias is None or type(bias) in PLAIN_TENSORS)
                and (correction is None or type(correction) in PLAIN_TENSORS)
                and x.numel() <= _max_tokens(x.dtype) * weight.shape[-1]
                and (form.flattens or x.dim() == 2)
                and _fits(x, weight, bias, correction)
                and not (
                    torch.is_grad_enabled() and _any_requires_grad(x, weight, bias, correction)
                )
                and not torch.is_autocast_enabled("cpu")
            ):
                rule = type(self).rule_for(type(self).values(module), weight.shape[0])
                if rule is not None:
                    logits, weights, ids = _route(x, weight, rule, bias, correction)
                    return (ids, weights, logits) if form.ids_first else (logits, weights, ids)
        return module.own.forward(self, *args, **named)


@functools.cache
def _max_tokens(dtype: torch.dtype) -> int:
    if dtype not in DTYPES or dense_kernels(dtype).isa == "plain":
        return 0
    return MAX_TOKENS[dtype]


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


@functools.cache
def _native_class(router: type) -> type | None:
    """The class that computes this one natively; None where its forward is not known."""
    if not issubclass(router, nn.Module) or not router.__name__.lower().endswith("router"):
        return None
    form = form_of(router)
    if form is None:
        return None

    @functools.lru_cache(maxsize=16)
    def rule_for(values: Any, num_experts: int) -> _NativeRule | None:
        rule = form.rule(*values) if len(form.attributes) > 1 else form.rule(values)
        return (rule, _core.RouterRule(*rule)) if rule.fits(num_experts) else None

    return stand_in(
        *(_NativeRouter, router, _native_class),
        form=form,
        values=operator.attrgetter(*form.attributes),
        rule_for=staticmethod(rule_for),
    )
