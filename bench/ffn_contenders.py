"""The contenders of expert_ffn.py: each computes one layer's routed experts on the same weights.

All take (hidden [T, H], ids [T, A], topk [T, A] fp32) and return [T, H]. What a peer needs besides
(a module, its own copy of the weights) is made once and not timed. A contender that cannot run here
is named with the reason instead.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import harness  # noqa: F401  puts this checkout on the path
import torch
from torch import Tensor

from moe_offload import OffloadedExperts, _core, functional
from moe_offload.activations import Activation
from moe_offload.backends.native import DTYPES
from moe_offload.ops import expert_ffn_cpu

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
BATCHED_LIMIT_BYTES = 2 << 30  # batched_mm gathers a copy of every row's expert


@dataclass(frozen=True)
class Shape:
    """One layer: E experts of H x F, A of them per token.

    `gpt_oss`: its layout and arithmetic, transposed weights, alternating gate and up with a clamp,
    biases. Only transformers computes those besides us.
    """

    name: str
    hidden: int
    inner: int
    top_k: int
    experts: int
    gpt_oss: bool = False

    @property
    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.inner * 2  # bf16


@dataclass
class Contender:
    """`skip(T)` says why it does not run at that size.

    `peer` is somebody else's code, `forced` an instruction set that is not the default.
    """

    name: str
    run: Run
    peer: bool = True
    forced: bool = False
    skip: Callable[[int], str | None] = lambda _: None


def contenders(shape: Shape, gate_up: Tensor, down: Tensor) -> tuple[list[Contender], list[str]]:
    """Everything that runs here, ours first, and why others do not."""
    absent: list[str] = []
    if shape.gpt_oss:
        return gpt_oss_contenders(shape, gate_up, down)
    found = [
        Contender(
            "ours", lambda x, ids, w: functional.expert_ffn(x, gate_up, down, ids, w), peer=False
        )
    ]
    best = functional_isa(gate_up.dtype)
    for isa in _core.cpu_isas(DTYPES[gate_up.dtype]):
        if isa in (best, "amx_emulated"):
            continue
        found.append(
            Contender(f"ours, {isa}", forced_run(gate_up, down, isa), False, True, slow(256))
        )
    if 3 * gate_up.nbytes + 3 * down.nbytes < 3 << 30:  # source, slots, and the tensors above
        layer = OffloadedExperts({"gate_up_proj": gate_up, "down_proj": down}, device_budget="100%")
        found.append(Contender("ours, paged layer, all resident", layer, peer=False))
    module = transformers_module(shape, gate_up, down)
    for name in ("grouped_mm", "eager", "batched_mm"):
        contender = Contender(f"transformers {name}", by_transformers(module, name))
        if name == "batched_mm":
            contender.skip = gathers_too_much(shape)
        found.append(contender)
    if importlib.util.find_spec("kt_kernel") is None:
        absent.append("kt-kernel: not installed (bench/requirements-peers.txt)")
    else:
        from kt_kernel import kt_kernel_ext

        for kind in ("AMXBF16_MOE", "AVX2BF16_MOE"):
            if not hasattr(kt_kernel_ext.moe, kind):
                absent.append(f"kt-kernel {kind}: not in its build for this processor")
                continue
            if kind == "AVX2BF16_MOE" and gate_up.nbytes + down.nbytes > 1 << 30:
                absent.append(f"kt-kernel {kind}: its copy of the weights does not fit in memory")
                continue
            found.append(Contender(f"kt-kernel {kind}", kt_kernel(kind, shape, gate_up, down)))
    return found, absent


def gpt_oss_contenders(
    shape: Shape, gate_up: Tensor, down: Tensor
) -> tuple[list[Contender], list[str]]:
    """transformers' gpt-oss experts on these weights, stored its way, by every implementation.

    Only `gate_up` [E, 2F, H] in halves and `down` [E, H, F] are given; biases are zeros, added all
    the same, and the transposed copy is what everybody reads.
    """
    import moe_offload.huggingface  # noqa: F401  registers "moe_offload"

    module = gpt_oss_module(shape, gate_up, down)
    found = [Contender("ours", by_transformers(module, "moe_offload"), peer=False)]
    for name in ("grouped_mm", "eager", "batched_mm"):
        skip: Callable[[int], str | None] = lambda _: None  # noqa: E731
        if name == "batched_mm":
            skip = gathers_too_much(shape)
        found.append(Contender(f"transformers {name}", by_transformers(module, name), skip=skip))
    return found, ["kt-kernel: its bf16 classes have neither the clamped gate nor biases"]


def gpt_oss_module(shape: Shape, gate_up: Tensor, down: Tensor) -> Any:
    """transformers' gpt-oss experts on a transposed copy of the weights."""
    from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        module = GptOssExperts(config)
    alternating = torch.stack(gate_up.chunk(2, dim=1), dim=2).flatten(1, 2)
    tensors = {
        "gate_up_proj": alternating.transpose(1, 2).contiguous(),
        "down_proj": down.transpose(1, 2).contiguous(),
        "gate_up_proj_bias": gate_up.new_zeros(shape.experts, 2 * shape.inner),
        "down_proj_bias": gate_up.new_zeros(shape.experts, shape.hidden),
    }
    for name, tensor in tensors.items():
        setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def functional_isa(dtype: torch.dtype) -> str:
    ffn = _core.ExpertFfn(
        hidden=1, inner=1, num_experts=1, dtype=DTYPES[dtype], activation="silu", gated=True
    )
    return ffn.isa


def forced_run(gate_up: Tensor, down: Tensor, isa: str) -> Run:
    silu = Activation("silu")
    return lambda x, ids, w: expert_ffn_cpu(x, gate_up, down, ids, w, silu, isa=isa)


def slow(largest: int) -> Callable[[int], str | None]:
    return lambda tokens: (
        f"forced paths are timed up to T = {largest}" if tokens > largest else None
    )


def gathers_too_much(shape: Shape) -> Callable[[int], str | None]:
    def reason(tokens: int) -> str | None:
        needed = tokens * shape.top_k * shape.expert_bytes
        if needed <= BATCHED_LIMIT_BYTES:
            return None
        return f"it would gather {needed / 1e9:.1f} GB of weights"

    return reason


def transformers_module(shape: Shape, gate_up: Tensor, down: Tensor) -> Any:
    """transformers' experts module of this shape on these weights."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(down, requires_grad=False)
    return module.eval()


def by_transformers(module: Any, implementation: str) -> Run:
    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        module.config._experts_implementation_internal = implementation
        return module(x, ids, w.to(x.dtype))

    return run


def kt_kernel(kind: str, shape: Shape, gate_up: Tensor, down: Tensor) -> Run:
    """kt-kernel 0.7.2: AMXBF16_MOE falls back to AVX-512-BF16 by itself where there is no AMX."""
    from kt_kernel import kt_kernel_ext as ext

    gate, up = gate_up[:, : shape.inner].contiguous(), gate_up[:, shape.inner :].contiguous()
    pool = ext.WorkerPoolConfig()
    pool.subpool_count, pool.subpool_numa_map = 1, [0]
    pool.subpool_thread_count = [torch.get_num_threads()]
    cpu = ext.CPUInfer(pool)
    mask = torch.zeros(shape.experts, dtype=torch.bool)
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.inner)
    config = ext.moe.MOEConfig(*sizes, mask.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, 4096
    for name, tensor in (("gate", gate), ("up", up), ("down", down)):
        setattr(config, f"{name}_projs", [[tensor[e].data_ptr() for e in range(shape.experts)]])
        setattr(config, f"{name}_scales", [[0] * shape.experts])
    moe = getattr(ext.moe, kind)(config)
    order = torch.arange(shape.experts, dtype=torch.int64)
    cpu.submit(moe.load_weights_task(order.data_ptr()))
    cpu.sync()
    del gate, up

    def run(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
        assert mask is not None  # it must outlive the calls
        out, rows = torch.empty_like(x), torch.tensor([len(x)], dtype=torch.int32)
        pointers = (ids.data_ptr(), w.data_ptr(), x.data_ptr(), out.data_ptr())
        cpu.submit(moe.forward_task(rows.data_ptr(), shape.top_k, *pointers, False))
        cpu.sync(0)
        return out

    return run
