"""Page layouts: alignment, and that a slot's bytes are seen as the parameters they are."""

import pytest
import torch

from moe_offload.pages import PageLayout, allocate_slab


def make_layout() -> PageLayout:
    return PageLayout.build(
        {
            "gate_up_proj": ((6, 5), torch.bfloat16),
            "down_proj": ((5, 3), torch.float32),
            "down_proj_bias": ((5,), torch.float32),
        }
    )


def test_sections_and_slots_are_aligned():
    layout = make_layout()
    assert [section.offset for section in layout.sections] == [0, 256, 512]
    assert [section.nbytes for section in layout.sections] == [60, 60, 20]
    assert layout.page_bytes == 532
    assert layout.payload_bytes == 140
    assert layout.slot_stride == 4096
    assert allocate_slab(3, layout.slot_stride).data_ptr() % 4096 == 0


def test_views_show_each_slots_bytes_as_parameters():
    layout = make_layout()
    slab = allocate_slab(3, layout.slot_stride)
    assert not slab.any()
    views = layout.views(slab)
    weights = {name: torch.randn(view.shape).to(view.dtype) for name, view in views.items()}
    for slot in range(3):
        for section in layout.sections:
            raw = weights[section.name][slot].contiguous().view(torch.uint8).flatten()
            start = slot * layout.slot_stride + section.offset
            slab[start : start + section.nbytes] = raw
    for name, view in views.items():
        assert torch.equal(view, weights[name]), name


def test_equal_layouts_are_one_pool():
    assert make_layout() == make_layout()
    assert hash(make_layout()) == hash(make_layout())


def test_empty_layouts_are_refused():
    with pytest.raises(ValueError, match="at least one expert parameter"):
        PageLayout.build({})
    with pytest.raises(ValueError, match=r"'down_proj' of shape .* has no bytes"):
        PageLayout.build({"down_proj": ((0, 4), torch.float32)})
    with pytest.raises(KeyError, match="no section 'x'; it has gate_up_proj"):
        make_layout().section("x")
