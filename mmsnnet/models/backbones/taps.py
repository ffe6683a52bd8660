"""The taps of a backbone: their setting, and the tuple of maps that heads get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from mmsnnet.models.torch_private import register_pytree_node
from mmsnnet.stitching import Features


class Taps(tuple):
    """A tuple of a backbone's maps (B, C, h, w), for any head.

    For heads that also read class tokens, ``class_tokens`` has the class token (B, C) of the same block for each map;
    it is None if the anchors have no class token.

    If evaluation mode skips a tap, its map and its class token are None. A program traced by ``torch.jit.trace`` has an
    empty tensor instead. The class is registered as a pytree, so that ``torch.export`` accepts a backbone.
    """

    class_tokens: tuple[Tensor | None, ...] | None

    def __new__(cls, maps: Iterable[Tensor | None], class_tokens: Iterable[Tensor | None] | None = None) -> Taps:
        taps = super().__new__(cls, maps)
        taps.class_tokens = None if class_tokens is None else tuple(class_tokens)
        return taps

    @classmethod
    def of(cls, features: Sequence[Features | None]) -> Taps:
        """Convert features to taps. None stays None; at least one element must be features."""
        maps = [None if one is None else one.map() for one in features]
        tokens = [None if one is None else one.class_token() for one in features]
        if torch.jit.is_tracing():  # a traced program can return tensors only
            some = next(one for one in maps if one is not None)
            maps = [some.new_zeros(0) if one is None else one for one in maps]
        return cls(maps, None if all(token is None for token in tokens) else tokens)

    def __getnewargs__(self) -> tuple[Any, ...]:  # copy and pickle call this
        return tuple(self), self.class_tokens


@dataclass(frozen=True)
class OutIndices:
    """The blocks of the largest anchor that a backbone taps.

    The setting counts the blocks of a plain ViT, and the stages of a hierarchical model, whose last blocks are tapped.

    Attributes:
        places: the tapped block of each map; None stands for a map that is None in both modes.
        train: the taps of training mode.
        test: the taps of evaluation mode, a subset of ``train``. Auxiliary heads do not run in evaluation mode, so
            their taps can be skipped there.
        ends: the last block of each stage of a hierarchical model.
    """

    places: tuple[int | None, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]
    ends: tuple[int, ...] = ()

    @classmethod
    def parse(cls, setting: Any, stages: Sequence[int]) -> OutIndices:
        """Read the setting ``out_indices``.

        Args:
            setting: see :class:`StitchedBackbone`.
            stages: the number of blocks in each stage of the largest anchor.

        Raises:
            ValueError: a mode has no index, an index is out of range, or evaluation mode has one that training mode
                lacks.
        """
        unit, number = ("stages", len(stages)) if len(stages) > 1 else ("blocks", stages[0])
        if setting is None:
            setting = tuple(range(number)) if unit == "stages" else (number - 1,)
        if isinstance(setting, Mapping):
            if set(setting) != {"train", "test"}:
                raise ValueError(f"out_indices per mode is dict(train=..., test=...), got keys {sorted(setting)}")
            places, evaluated = _as_tuple(setting["train"]), _as_tuple(setting["test"])
        else:
            places = evaluated = _as_tuple(setting)
        train, test = (tuple(index for index in indices if index is not None) for indices in (places, evaluated))
        if not train or not test:
            raise ValueError(f"out_indices needs at least one {unit[:-1]} in each mode")
        wrong = [index for index in train if not isinstance(index, int) or not 0 <= index < number]
        if wrong:
            raise ValueError(f"out_indices are {unit} of the largest anchor, 0 to {number - 1}; got {wrong}")
        if not set(test) <= set(train):
            raise ValueError(f"the {unit} of out_indices['test'] must be among those of 'train', {train}; got {test}")
        if unit == "blocks":
            return cls(places, train, test)
        ends = tuple(end - 1 for end in accumulate(stages))
        blocks = tuple(None if index is None else ends[index] for index in places)
        return cls(blocks, tuple(ends[index] for index in train), tuple(ends[index] for index in test), ends)

    def as_setting(self, indices: Iterable[int | None]) -> tuple[int | None, ...]:
        """Blocks as the setting counts them."""
        return tuple(self.ends.index(block) if self.ends and block is not None else block for block in indices)

    def hand_out(self, features: Mapping[int, Features]) -> Taps:
        """Order features, keyed by block, as the setting orders its maps."""
        return Taps.of([None if index is None else features.get(index) for index in self.places])


def _as_tuple(indices: int | Sequence[int | None]) -> tuple[int | None, ...]:
    return (indices,) if isinstance(indices, int) else tuple(indices)


register_pytree_node(
    Taps,
    lambda taps: ([tuple(taps), taps.class_tokens], None),
    lambda children, _: Taps(*children),
    serialized_type_name="mmsnnet.models.backbones.taps.Taps",
)
