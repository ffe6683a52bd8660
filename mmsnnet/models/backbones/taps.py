"""The taps of a backbone: which it hands out, and how heads receive them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mmsnnet.stitching import Features


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

    @classmethod
    def of(cls, features: Sequence[Features | None]) -> Taps:
        """The taps that features make, None where there are none. At least one is not None."""
        maps = [None if one is None else one.map() for one in features]
        tokens = [None if one is None else one.class_token() for one in features]
        if torch.jit.is_tracing():  # a traced program can return tensors alone
            some = next(one for one in maps if one is not None)
            maps = [some.new_zeros(0) if one is None else one for one in maps]
        return cls(maps, None if all(token is None for token in tokens) else tokens)

    def __getnewargs__(self) -> tuple[Any, ...]:  # for copies and pickles
        return tuple(self), self.class_tokens


@dataclass(frozen=True)
class OutIndices:
    """The blocks of the largest anchor whose output a backbone hands out.

    Attributes:
        places: one for each map that is handed out; None holds the place of a map that is never there.
        train: the taps of training mode.
        test: the taps of evaluation mode, some of ``train``.
    """

    places: tuple[int | None, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]

    @classmethod
    def parse(cls, setting: Any, depth: int) -> OutIndices:
        """Read the setting ``out_indices`` of a backbone whose largest anchor has ``depth`` blocks.

        Raises:
            ValueError: the setting names no block in one of the modes, a block that the anchor lacks, or for
                evaluation mode one that training mode lacks.
        """
        if setting is None:
            setting = (depth - 1,)
        if isinstance(setting, Mapping):
            if set(setting) != {"train", "test"}:
                raise ValueError(f"out_indices per mode is dict(train=..., test=...), got keys {sorted(setting)}")
            places, tested = _as_tuple(setting["train"]), _as_tuple(setting["test"])
        else:
            places = tested = _as_tuple(setting)
        train, test = (tuple(index for index in indices if index is not None) for indices in (places, tested))
        if not train or not test:
            raise ValueError("out_indices names at least one block in each mode")
        wrong = [index for index in train if not isinstance(index, int) or not 0 <= index < depth]
        if wrong:
            raise ValueError(f"out_indices are blocks of the largest anchor, 0 to {depth - 1}; got {wrong}")
        if not set(test) <= set(train):
            raise ValueError(f"the taps of evaluation mode are among those of training mode {train}; got {test}")
        return cls(places, train, test)

    def hand_out(self, features: Mapping[int, Features]) -> Taps:
        """Put features, by the block that they left, into their places."""
        return Taps.of([None if index is None else features.get(index) for index in self.places])


def _as_tuple(indices: int | Sequence[int | None]) -> tuple[int | None, ...]:
    return (indices,) if isinstance(indices, int) else tuple(indices)


def _flatten(taps: Taps) -> tuple[list[Any], None]:
    return [tuple(taps), taps.class_tokens], None


def _unflatten(children: Iterable[Any], context: None) -> Taps:
    maps, class_tokens = children
    return Taps(maps, class_tokens)


pytree.register_pytree_node(Taps, _flatten, _unflatten, serialized_type_name="mmsnnet.models.backbones.taps.Taps")
