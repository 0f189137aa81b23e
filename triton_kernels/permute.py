"""Rows sorted by expert: a counting sort of the T x A routes, stable in token order.

A token chooses an expert at most once, so the sort is columns of ones: with taken[t, e] = 1 where
token t chose expert e, a route's row is (routes of experts before e) + (earlier tokens that chose
e). Both are cumulative sums, no atomics, so the order is the same in every run. Only maps are
written; the GEMM gathers token rows itself.

Example, T = 3, A = 2, ids [[1, 3], [3, 0], [1, 3]]:
    expert_offsets = [0, 1, 3, 3, 6]      expert 0 has row 0, 1 has rows 1-2, 3 has rows 3-5
    row_route      = [3, 0, 4, 1, 2, 5]   row 0 is route 3 = token 1, choice 1
    route_row      = [[1, 3], [4, 0], [2, 5]]

One program does up to 64 tokens. More take three launches: count per block of tokens, prefix sums
down the blocks, place. Ids outside [0, E) ("not mine" in expert parallelism) get no row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.triton_kernels.launch import IDS, block, check_count, check_tensor, require_device

SMALL_T = 64  # tokens that one program sorts
MAX_EXPERTS = 4096
MAX_TOP_K = 64


class Permutation(NamedTuple):
    """Where each route's row is. R = T * A; V <= R routes have valid ids.

    Attributes:
        row_route: int32 [R], route t * A + a of each row; -1 for rows V and up.
        route_row: int32 [T, A], its inverse; -1 for ids outside [0, E).
        expert_offsets: int32 [E + 1], rows of expert e are [offsets[e], offsets[e + 1]).
        active_experts: int32 [min(R, E)], experts with rows, ascending; -1 behind them.
        num_active: int32 [1].
    """

    row_route: Tensor
    route_row: Tensor
    expert_offsets: Tensor
    active_experts: Tensor
    num_active: Tensor

    @classmethod
    def empty(
        cls, num_tokens: int, top_k: int, num_experts: int, device: torch.device
    ) -> Permutation:
        """Uninitialised maps; the kernels write every element."""

        def ints(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        routes = num_tokens * top_k
        active = ints(min(routes, num_experts))
        return cls(ints(routes), ints(num_tokens, top_k), ints(num_experts + 1), active, ints(1))


class SortSizes(NamedTuple):
    """Compile-time sizes: A, the powers of two that cover A and E, tokens of a tile and of all."""

    TOP_K: int
    BLOCK_A: int
    BLOCK_E: int
    BLOCK_T: int
    MAX_T: int

    @classmethod
    def of(cls, num_tokens: int, num_experts: int, top_k: int) -> SortSizes:
        """A tile [BLOCK_T, BLOCK_E] has at most 4096 elements: 32 registers a thread."""
        block_e, max_t = block(num_experts), block(num_tokens)
        block_t = max(1, min(max_t, 32, 4096 // block_e))
        # MAX_T matters to one program that sorts everything; a chain need not be compiled for it.
        return cls(top_k, block(top_k), block_e, block_t, max_t if num_tokens <= SMALL_T else 0)


@triton.jit
def _taken(ids_ptr, tokens, num_tokens, num_experts, Z: tl.constexpr):
    """Rank of the choice with which each token took each expert, [tokens, experts]; -1 if none."""
    TOP_K: tl.constexpr = Z.TOP_K
    experts = tl.arange(0, Z.BLOCK_E)
    BLOCK_T: tl.constexpr = Z.BLOCK_T
    BLOCK_E: tl.constexpr = Z.BLOCK_E
    rank_of = tl.full([BLOCK_T, BLOCK_E], -1, dtype=tl.int32)
    for rank in range(TOP_K):
        # .cg: other programs of this launch may have written the ids, and L1 is not coherent.
        ids = tl.load(
            ids_ptr + tokens.to(tl.int64) * TOP_K + rank,
            mask=tokens < num_tokens,
            other=-1,
            cache_modifier=".cg",
        )
        rank_of = tl.where(ids[:, None] == experts[None, :], rank, rank_of)
    return tl.where(experts[None, :] < num_experts, rank_of, -1)


@triton.jit
def _place(ids_ptr, rank_of, tokens, first_row, rows, num_tokens, num_experts, Z: tl.constexpr):
    """Write both maps for a tile of tokens; first_row [BLOCK_E] counts all rows before them."""
    taken = (rank_of >= 0).to(tl.int32)
    row = first_row[None, :] + tl.cumsum(taken, axis=0) - taken
    route = tokens[:, None] * Z.TOP_K + rank_of
    tl.store(rows.row_route + row, route, mask=rank_of >= 0)
    tl.store(rows.route_row + route, row, mask=rank_of >= 0)

    column = tl.arange(0, Z.BLOCK_A)
    route = tokens[:, None].to(tl.int64) * Z.TOP_K + column[None, :]
    exists = (tokens[:, None] < num_tokens) & (column[None, :] < Z.TOP_K)
    ids = tl.load(ids_ptr + route, mask=exists, other=0, cache_modifier=".cg")
    tl.store(rows.route_row + route, -1, mask=exists & ((ids < 0) | (ids >= num_experts)))


@triton.jit
def _write_experts(counts, rows, num_experts, num_routes, BLOCK_E: tl.constexpr):
    """From rows per expert: offsets, experts with rows, and -1 in rows that no route has."""
    expert = tl.arange(0, BLOCK_E)
    tl.store(rows.expert_offsets, 0)
    ends = tl.cumsum(counts, axis=0)
    tl.store(rows.expert_offsets + 1 + expert, ends, mask=expert < num_experts)

    is_active = (counts > 0).to(tl.int32)
    num_active = tl.sum(is_active, axis=0)
    tl.store(rows.num_active, num_active)
    position = tl.cumsum(is_active, axis=0) - is_active
    tl.store(rows.active_experts + position, expert, mask=is_active > 0)
    length = tl.minimum(num_routes, num_experts)
    tl.store(rows.active_experts + expert, -1, mask=(expert >= num_active) & (expert < length))

    # "while": with numpy >= 2.4 the interpreter of triton 3.6 cannot run a range() over tensors.
    start = tl.sum(counts, axis=0)
    while start < num_routes:
        tl.store(rows.row_route + start + expert, -1, mask=start + expert < num_routes)
        start += BLOCK_E


@triton.jit
def permute_tokens(ids_ptr, rows, num_tokens, num_experts, Z: tl.constexpr):
    """The whole sort in one program, tokens in tiles to bound registers."""
    MAX_T: tl.constexpr = Z.MAX_T
    BLOCK_T: tl.constexpr = Z.BLOCK_T
    BLOCK_E: tl.constexpr = Z.BLOCK_E
    counts = tl.zeros([BLOCK_E], dtype=tl.int32)
    for start in range(0, MAX_T, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        rank_of = _taken(ids_ptr, tokens, num_tokens, num_experts, Z)
        counts += tl.sum((rank_of >= 0).to(tl.int32), axis=0)
    first_row = tl.cumsum(counts, axis=0) - counts
    for start in range(0, MAX_T, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        rank_of = _taken(ids_ptr, tokens, num_tokens, num_experts, Z)
        _place(ids_ptr, rank_of, tokens, first_row, rows, num_tokens, num_experts, Z)
        first_row += tl.sum((rank_of >= 0).to(tl.int32), axis=0)
    _write_experts(counts, rows, num_experts, num_tokens * Z.TOP_K, BLOCK_E)


@triton.jit
def permute_tile(
    pid, ids_ptr, bases_ptr, totals_ptr, rows, num_tokens, num_experts, Z: tl.constexpr
):
    """The sort's last step for one tile of tokens, from routes per expert before it."""
    expert = tl.arange(0, Z.BLOCK_E)
    exists = expert < num_experts
    totals = tl.load(totals_ptr + expert, mask=exists, other=0)
    base = tl.load(bases_ptr + pid.to(tl.int64) * num_experts + expert, mask=exists, other=0)
    tokens = pid * Z.BLOCK_T + tl.arange(0, Z.BLOCK_T)
    rank_of = _taken(ids_ptr, tokens, num_tokens, num_experts, Z)
    first_row = tl.cumsum(totals, axis=0) - totals + base
    _place(ids_ptr, rank_of, tokens, first_row, rows, num_tokens, num_experts, Z)
    if pid == 0:
        _write_experts(totals, rows, num_experts, num_tokens * Z.TOP_K, Z.BLOCK_E)


@triton.jit
def permute_small_kernel(
    ids_ptr,  # int32 or int64 [T, A]
    rows,  # out: Permutation
    num_tokens,
    num_experts,
    Z: tl.constexpr,
):
    permute_tokens(ids_ptr, rows, num_tokens, num_experts, Z)


@triton.jit
def count_routes_kernel(
    ids_ptr,  # int32 or int64 [T, A]
    counts_ptr,  # out: int32 [num_tiles, E]
    num_tokens,
    num_experts,
    Z: tl.constexpr,
):
    pid = tl.program_id(0)
    expert = tl.arange(0, Z.BLOCK_E)
    tokens = pid * Z.BLOCK_T + tl.arange(0, Z.BLOCK_T)
    counts = tl.sum((_taken(ids_ptr, tokens, num_tokens, num_experts, Z) >= 0).to(tl.int32), axis=0)
    at = counts_ptr + pid.to(tl.int64) * num_experts + expert
    tl.store(at, counts, mask=expert < num_experts)


@triton.jit
def sum_tiles_kernel(
    counts_ptr,  # in: counts; out: routes of the same expert in earlier tiles; [num_tiles, E]
    totals_ptr,  # out: int32 [E]
    num_tiles,
    num_experts,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    start = 0
    while start < num_tiles:
        row = start + tl.arange(0, BLOCK_N)
        mask = (row[:, None] < num_tiles) & (expert[None, :] < num_experts)
        at = counts_ptr + row[:, None].to(tl.int64) * num_experts + expert[None, :]
        counts = tl.load(at, mask=mask, other=0)
        tl.store(at, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=mask)
        total += tl.sum(counts, axis=0)
        start += BLOCK_N
    tl.store(totals_ptr + expert, total, mask=expert < num_experts)


@triton.jit
def place_routes_kernel(
    ids_ptr,  # int32 or int64 [T, A]
    bases_ptr,  # int32 [num_tiles, E], from sum_tiles_kernel
    totals_ptr,  # int32 [E]
    rows,  # out: Permutation
    num_tokens,
    num_experts,
    Z: tl.constexpr,
):
    permute_tile(tl.program_id(0), ids_ptr, bases_ptr, totals_ptr, rows, num_tokens, num_experts, Z)


def sum_tiles(counts: Tensor) -> Tensor:
    """Counts [num_tiles, E] become bases, in place; returns routes per expert, int32 [E]."""
    num_tiles, num_experts = counts.shape
    totals = counts.new_empty(num_experts)
    columns = 8
    grid = (triton.cdiv(num_experts, columns),)
    rows = min(block(num_tiles), 256)
    sum_tiles_kernel[grid](counts, totals, num_tiles, num_experts, BLOCK_N=rows, BLOCK_E=columns)
    return totals


def empty_permutation(top_k: int, num_experts: int, device: torch.device) -> Permutation:
    """The permutation of no tokens."""
    rows = Permutation.empty(0, top_k, num_experts, device)
    rows.expert_offsets.zero_()
    rows.num_active.zero_()
    return rows


def permute(topk_ids: Tensor, num_experts: int) -> Permutation:
    """Sort a layer's routes by expert, stably; see the example at the top of the file.

    Args:
        topk_ids: int32 or int64 [T, A], contiguous, on a CUDA device. A token's ids are distinct;
            ids outside [0, num_experts) get no row.
        num_experts: E, 1 to 4096. Slot ids may be sorted instead of expert ids, with S for E.

    Returns:
        Permutation, on the device of topk_ids. Does not block the host: everything runs on the
        current stream, and the launches depend on shapes only, so they can be captured.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or layout.
        RuntimeError: tensors on the CPU without the interpreter.

    Cost: reads and writes 4 T A bytes a few times; for T > 64 also 8 E bytes per tile of tokens.
    Twin: reference.permute.

    Example:
        >>> order = permute(topk_ids, num_experts=128)
        >>> rows = hidden[order.row_route // topk_ids.shape[1]]
    """
    check_tensor("permute", "topk_ids", topk_ids, (None, None), IDS)
    check_count("permute", "num_experts", num_experts, 1, MAX_EXPERTS)
    num_tokens, top_k = topk_ids.shape
    check_count("permute", "top_k", top_k, 1, MAX_TOP_K)
    with require_device("permute", topk_ids):
        if num_tokens == 0:
            return empty_permutation(top_k, num_experts, topk_ids.device)
        rows = Permutation.empty(num_tokens, top_k, num_experts, topk_ids.device)
        sizes = SortSizes.of(num_tokens, num_experts, top_k)
        if num_tokens <= SMALL_T:
            warps = 4 if num_experts * num_tokens <= 1024 else 8
            permute_small_kernel[(1,)](
                topk_ids, rows, num_tokens, num_experts, sizes, num_warps=warps
            )
            return rows
        num_tiles = triton.cdiv(num_tokens, sizes.BLOCK_T)
        counts = topk_ids.new_empty(num_tiles, num_experts, dtype=torch.int32)
        grid = (num_tiles,)
        count_routes_kernel[grid](topk_ids, counts, num_tokens, num_experts, sizes)
        totals = sum_tiles(counts)
        place_routes_kernel[grid](topk_ids, counts, totals, rows, num_tokens, num_experts, sizes)
        return rows
