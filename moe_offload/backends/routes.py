"""Routes sorted by expert for kernels on a GPU: the one wait of a call, and the one copy back.

The pager's host must know which experts have rows. Having read the ids for that, it sorts them as
well (csrc/expert_gemm/route_sort.h: about 2 ns a route) and sends the maps in a single copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload import _core
from moe_offload.device import read_ids

_LIMIT = 1 << 31  # rows and routes are int32 in the kernels


class SortedRoutes:
    """Where each route's row is. R = T * A routes, route = t * A + a.

    Attributes:
        experts: experts with rows, ascending, on the host.
        ranges: their rows, [first, end), on the host.
        route_of_row: int32 [R] on the device, route of each row; -1 in rows that no route has.
        row_of_route: int32 [R], its inverse; -1 for ids outside [0, E).
        expert_offsets: int32 [E + 1], rows of expert e are [offsets[e], offsets[e + 1]).
        active_experts: int32 [min(R, E)], `experts` on the device; -1 behind them.
        num_active: int32 [1], how many they are.

    Args:
        topk_ids: [T, A], of any integer type; ids outside [0, E) get no row.
        num_experts: E.

    Raises:
        ValueError: 2^31 routes or more.
    """

    def __init__(self, topk_ids: Tensor, num_experts: int) -> None:
        num_routes, device = topk_ids.numel(), topk_ids.device
        if num_routes >= _LIMIT:
            raise ValueError(
                f"experts: expected fewer than 2^31 routes in a call, got {num_routes} (T x A). "
                "Split the tokens into several calls."
            )
        ids = topk_ids if topk_ids.dtype in (torch.int32, torch.int64) else topk_ids.long()
        ids = read_ids(ids).contiguous()
        sizes = [num_routes, num_routes, num_experts + 1, min(num_routes, num_experts), 1]
        host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        parts = host.split(sizes)
        _core.sort_routes(
            ids=ids.data_ptr(),
            ids_are_int64=ids.dtype == torch.int64,
            num_routes=num_routes,
            num_experts=num_experts,
            maps=[part.data_ptr() for part in parts],
        )
        self.experts: list[int] = parts[3][: parts[4].item()].tolist()
        offsets: list[int] = parts[2].tolist()
        self.ranges = [(offsets[expert], offsets[expert + 1]) for expert in self.experts]
        (
            self.route_of_row,
            self.row_of_route,
            self.expert_offsets,
            self.active_experts,
            self.num_active,
        ) = host.to(device, non_blocking=True).split(sizes)
