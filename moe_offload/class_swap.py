"""Modules of a model computed otherwise by swapping their class: they keep their place and weights.

What stands in is a subclass of the module's own class (`stand_in`), so whoever asks for the class
by `isinstance`, by name or in a repr finds what was there. Copies and pickles find it anew.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

Finder = Callable[[type], type | None]  # the class that stands in; None: the module keeps its own


class StandIn:
    """In front of a model's own class, by `stand_in`."""

    own: ClassVar[type]
    found_by: ClassVar[Finder]

    def _get_name(self) -> str:  # for repr
        return self.own.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles find the class by its own
        return _made_anew, (type(self).found_by, self.own), vars(self)


def stand_in(mixin: type[StandIn], own: type, found_by: Finder, **attributes: Any) -> type:
    """A subclass of `own` with what `mixin` does in front; `found_by`: who asks, cached."""
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    attributes |= {"own": own, "found_by": found_by}
    return type(f"Native{own.__name__}", (mixin, own), names | attributes)


def swap_classes(model: nn.Module, found_by: Finder) -> Callable[[], None]:
    """Swap the classes of a model's modules for what is found; returns what takes that back."""
    swapped = []
    for module in model.modules():
        native: Any = found_by(type(module))
        if native is not None:
            swapped.append(module)
            module.__class__ = native
    return functools.partial(_put_back, swapped)


def _put_back(swapped: list[nn.Module]) -> None:
    for module in swapped:
        if isinstance(module, StandIn):
            module.__class__ = module.own


def _made_anew(found_by: Finder, own: Any) -> Any:
    native: Any = found_by(own) or own
    return native.__new__(native)
