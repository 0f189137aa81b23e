"""Muon for every matrix inside the layers, Adam for embedding, router and norms.

Muon replaces a matrix's momentum by the nearest orthogonal matrix (five Newton-Schulz steps,
Jordan et al. 2024). With thousands of small expert matrices the trick is batching: matrices of one
shape, over all layers and experts, go through one bf16 `bmm`, which costs about a tenth of a
training step. The fused gate_up tensor is cut into gate and up first, because they are two maps
that only share storage. Embedding and routers stay on Adam, as is usual for maps into logits.
"""

from collections import defaultdict

import torch
from torch import Tensor

_NS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor) -> Tensor:
    """[N, r, c] with r <= c: pushes all singular values to about 1."""
    a, b, c = _NS
    x = matrices.bfloat16()
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x


class Muon:
    """`lr` of a step is the size of the singular values of the update; equal shapes go together."""

    def __init__(self, params: dict[str, Tensor], momentum: float = 0.95):
        self.params, self.momentum = params, momentum
        self.buffers = {name: torch.zeros_like(p) for name, p in params.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, Tensor], lr: float) -> None:
        groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for name, param in self.params.items():
            grad = grads[name].float()
            buffer = self.buffers[name].lerp_(grad, 1 - self.momentum)
            update = _as_matrices(name, grad.lerp_(buffer, self.momentum))  # Nesterov
            target = _as_matrices(name, param)
            if update.shape[1] > update.shape[2]:
                update, target = update.mT, target.mT
            groups[update.shape[1], update.shape[2]].append((update, target))
        for members in groups.values():
            steps = orthogonalise(torch.cat([update for update, _ in members]))
            sizes = [target.shape[0] for _, target in members]
            for (_, target), step in zip(members, steps.split(sizes), strict=True):
                target.add_(step, alpha=-lr)


def _as_matrices(name: str, tensor: Tensor) -> Tensor:
    """A view [N, rows, columns]; fused gate_up [E, 2F, H] becomes [2E, F, H]."""
    if tensor.ndim == 2:
        return tensor[None]
    if name.endswith("gate_up_proj"):
        return tensor.view(2 * tensor.shape[0], tensor.shape[1] // 2, tensor.shape[2])
    return tensor
