"""A KV cache with room behind its last token, so that a decoded token copies nothing but itself.

transformers' `DynamicLayer` concatenates all keys and values for each token: behind 2048 tokens of
a layer with 2048 numbers a token in bfloat16, 17 MB read and written again. Here they lie in
buffers [B, heads, capacity, size] whose tail is free, and what is handed out are views of their
first positions.

A layer appends in place only to the very tensors it handed out last, and only at positions nobody
was ever shown. After whatever else (the first tokens, crop, beam search's reordering, a copied or
assigned cache, gradients, another device) it concatenates as before, without room; the token after
that makes room. So patterns that reorder or crop at every step cost what they did, in memory too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from moe_offload import _core


def room_for(length: int) -> int:
    """Free positions behind `length` tokens when a buffer is made.

    So a token copies eight earlier ones on average, where attention reads all of them, and no
    buffer is more than an eighth (or 64 tokens) larger than what it holds.
    """
    return max(64, length // 8)


class GrowingLayer(DynamicLayer):
    """`DynamicLayer` that appends in place; only ever made by swapping a layer's class.

    `keys` and `values` hold the same bits in the same shapes, [B, heads, S, size], but are not
    contiguous. All other methods are DynamicLayer's: they reassign `keys` and `values`, which
    ends appending in place, or read them.
    """

    keys: Any
    values: Any
    _layer_type = None  # transformers registers subclasses by this
    # The tensors `update` returned last. Weakly: once reassigned, the old buffers are nobody's.
    _last: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] | None = None
    _room: _Room | None = None  # of the buffers `_last` are views of; None when they fill them

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As DynamicLayer's. key_states [B, heads, T, size], value_states alike: the new tokens.

        Returns:
            keys and values of all S + T tokens. Costs T tokens' bytes written when there is room,
            else S + T read and written.
        """
        last, room, self._last, self._room = self._last, self._room, None, None
        as_shown = last is not None and last[0]() is self.keys and last[1]() is self.values
        if (
            not as_shown
            or not _continues(self.keys, key_states)
            or not _continues(self.values, value_states)
            or self.keys.shape[2] != self.values.shape[2]
            or key_states.shape[2] != value_states.shape[2]
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
        ):
            super().update(key_states, value_states, *args, **kwargs)
        else:
            past, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
            if room is not None and room.takes(past, length, self.keys):
                keys, values = _longer(self.keys, length), _longer(self.values, length)
            else:
                room = _Room(length, length + room_for(length))
                keys = _moved(self.keys, room)
                values = _moved(self.values, room)
            _append(keys, past, key_states)
            _append(values, past, value_states)
            self.keys, self.values, self._room = keys, values, room
        self._last = (weakref.ref(self.keys), weakref.ref(self.values))
        return self.keys, self.values

    def reset(self) -> None:
        """Zeros, as DynamicLayer's; in new tensors, because views handed out share the buffer."""
        if self.is_initialized:
            self.keys, self.values = torch.zeros_like(self.keys), torch.zeros_like(self.values)
        super().reset()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are plain DynamicLayers of the tokens alone."""
        state = {name: value for name, value in vars(self).items() if name not in _OWN}
        if self._room is not None:
            state |= {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        return DynamicLayer, (), state


_OWN = ("_last", "_room")


class _Room:
    """Buffers of keys and values with `capacity` positions, `used` of which somebody has seen."""

    def __init__(self, used: int, capacity: int) -> None:
        self.used, self.capacity = used, capacity

    def takes(self, past: int, length: int, buffer: Tensor) -> bool:
        """May positions [past, length) be written? If so they are taken."""
        # `used` differs when an object that shares our attributes has appended; tensors made in
        # inference mode can only be written there.
        if (
            self.used != past
            or length > self.capacity
            or (buffer.is_inference() and not torch.is_inference_mode_enabled())
        ):
            return False
        self.used = length
        return True


def _continues(cached: Tensor, new: Tensor) -> bool:
    """Are these plain CPU tensors of four dimensions that differ in the number of tokens only?"""
    return (
        type(cached) is type(new) is Tensor
        and cached.device.type == new.device.type == "cpu"
        and cached.dtype == new.dtype
        and cached.layout == new.layout == torch.strided
        and cached.dim() == new.dim() == 4
        and cached.numel() > 0
        and (*cached.shape[:2], cached.shape[3]) == (*new.shape[:2], new.shape[3])
    )


def _longer(view: Tensor, length: int) -> Tensor:
    """The first `length` positions of the buffer that `view` shows the first ones of."""
    batch, heads, _, size = view.shape
    return view.as_strided((batch, heads, length, size), view.stride(), 0)


def _append(view: Tensor, past: int, new: Tensor) -> None:
    """Write new tokens [B, heads, T, size] behind the first `past` positions of a view."""
    if not new.is_contiguous():
        view[:, :, past:] = new
        return
    # As one native call: of single tokens, PyTorch's two take longer than all that is copied.
    batch, heads, length, size = new.shape
    item = new.element_size()
    to_sequence, to_head, to_token, _ = (stride * item for stride in view.stride())
    _core.copy_rows(
        new.data_ptr(),
        view.data_ptr() + past * to_token,
        (batch, heads, length * size * item),
        (to_sequence, to_head),
    )


def _moved(cached: Tensor, room: _Room) -> Tensor:
    """Copied to the front of a new buffer; a view of the positions used."""
    batch, heads, past, size = cached.shape
    view = empty(cached, (batch, heads, room.capacity, size))[:, :, : room.used]
    view[:, :, :past] = cached
    return view


def empty(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A new buffer; tests poison it."""
    return like.new_empty(shape)


def use_growing_caches(model: Any) -> Callable[[], None]:
    """Let a transformers model append in place to the caches it is called with.

    Layers that are exactly `DynamicLayer`, of caches that are exactly `DynamicCache` and not
    offloaded, change their class at the model's next call; sliding windows, static, quantised and
    encoder-decoder caches stay as they are. Returns what takes the hook away again; caches that
    were changed remain usable with every model.
    """
    undo: Callable[[], None] = model.register_forward_pre_hook(_grow, with_kwargs=True).remove
    return undo


def _grow(model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    for cache in (kwargs.get("past_key_values"), *args):
        if type(cache) is DynamicCache and not cache.offloading:
            for layer in cache.layers:
                if type(layer) is DynamicLayer:
                    layer.__class__ = GrowingLayer
