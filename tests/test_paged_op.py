"""The paged experts under torch.compile: one opaque node, the same numbers."""

from __future__ import annotations

import gc

import pytest
import torch
from experts import random_routing, random_weights

from moe_offload import OffloadedExperts, paged_op
from moe_offload.errors import StateError
from moe_offload.layer import OffloadedMoE

E, H, F, A = 6, 32, 16, 2


@pytest.fixture
def experts() -> OffloadedExperts:
    return OffloadedExperts(random_weights(E, H, F), device_budget="50%")


def test_a_whole_block_compiles_without_a_graph_break(experts: OffloadedExperts) -> None:
    torch.manual_seed(0)
    moe = OffloadedMoE(torch.nn.Linear(H, E, bias=False), experts, top_k=A)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for tokens in (1, 5, 9):
            hidden = torch.randn(tokens, H)
            torch.testing.assert_close(compiled(hidden), moe(hidden), rtol=0, atol=0)
    assert experts.offloader.stats()["lookups"] > 0


def test_the_op_passes_torchs_own_checks(experts: OffloadedExperts) -> None:
    generator = torch.Generator().manual_seed(1)
    ids, weights = random_routing(4, E, A, generator)
    args = (torch.randn(4, H, generator=generator), ids, weights, experts._handle.key)
    op = torch.ops.moe_offload.run_experts.default
    torch.library.opcheck(
        op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )
    assert torch.equal(op(*args), experts(*args[:3]))
    if hasattr(torch.Tag, "cudagraph_unsafe"):
        assert torch.Tag.cudagraph_unsafe in op.tags


def test_code_that_outlives_its_offloader_is_refused(experts: OffloadedExperts) -> None:
    key = experts._handle.key
    args = (torch.zeros(1, H), torch.zeros(1, A, dtype=torch.long), torch.zeros(1, A))
    experts.offloader.close()
    with pytest.raises(StateError, match="after close"):
        torch.ops.moe_offload.run_experts(*args, key)
    del experts
    gc.collect()
    with pytest.raises(StateError, match="no longer exists"):
        paged_op._run_experts(*args, 10**9)
