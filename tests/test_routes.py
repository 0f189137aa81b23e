"""Routes sorted by expert on the host, against torch's stable sort."""

from __future__ import annotations

import pytest
import torch

from moe_offload.backends.routes import SortedRoutes


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_routes_are_sorted_as_torch_sorts_them(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for tokens, top_k, num_experts in ((0, 2, 1), (1, 1, 1), (7, 1, 3), (200, 3, 5), (1, 5, 300)):
        shape = (tokens, top_k)
        ids = torch.randint(-1, num_experts + 2, shape, generator=generator).to(dtype)
        routes = SortedRoutes(ids, num_experts)
        flat = ids.reshape(-1)
        ours = (flat >= 0) & (flat < num_experts)
        order = torch.argsort(torch.where(ours, flat, num_experts), stable=True)
        num_rows = int(ours.sum())
        order = order[:num_rows]
        assert torch.equal(routes.route_of_row[:num_rows].long(), order)
        assert (routes.route_of_row[num_rows:] == -1).all()
        assert torch.equal(routes.row_of_route >= 0, ours)
        assert torch.equal(routes.row_of_route[order], torch.arange(num_rows, dtype=torch.int32))
        experts, counts = flat[ours].unique(return_counts=True)
        ends = counts.cumsum(0)
        assert routes.experts == experts.tolist()
        assert routes.ranges == list(zip((ends - counts).tolist(), ends.tolist(), strict=True))
        per_expert = torch.bincount(flat[ours].long(), minlength=num_experts)
        assert torch.equal(routes.expert_offsets[1:].long(), per_expert.cumsum(0))
        assert routes.expert_offsets[0] == 0
        assert routes.num_active.tolist() == [len(experts)]
        assert routes.active_experts[: len(experts)].tolist() == experts.tolist()
        assert (routes.active_experts[len(experts) :] == -1).all()
    many = torch.zeros(1, dtype=torch.int16).expand(1 << 21, 1 << 10)
    with pytest.raises(ValueError, match=r"fewer than 2\^31 routes in a call, got 2147483648"):
        SortedRoutes(many, 4)
