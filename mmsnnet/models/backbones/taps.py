"""What a backbone hands out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Taps(tuple):
    """The maps (B, C, h, w) of a backbone, for any head.

    A head that reads class tokens too finds those leaving the same blocks in ``class_tokens``: one (B, C) for each map,
    or None where the anchors have no class token.

    A map, and its class token, is None where evaluation mode leaves the tap out. A program made by ``torch.jit.trace``
    has an empty tensor in its place. torch's pytrees know the class, so that a backbone can be exported.
    """

    class_tokens: tuple[Tensor | None, ...] | None

    def __new__(cls, maps: Iterable[Tensor | None], class_tokens: Iterable[Tensor | None] | None = None) -> Taps:
        taps = super().__new__(cls, maps)
        taps.class_tokens = None if class_tokens is None else tuple(class_tokens)
        return taps

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copies and pickles
        return tuple(self), self.class_tokens


def _flatten(taps: Taps) -> tuple[list[Any], None]:
    return [tuple(taps), taps.class_tokens], None


def _unflatten(children: Iterable[Any], context: None) -> Taps:
    maps, class_tokens = children
    return Taps(maps, class_tokens)


pytree.register_pytree_node(Taps, _flatten, _unflatten, serialized_type_name="mmsnnet.models.backbones.taps.Taps")
