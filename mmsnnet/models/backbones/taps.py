"""The taps of a backbone: their setting, their norms, and the tuple of maps that heads get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from mmsnnet.models.torch_private import register_pytree_node
from mmsnnet.stitching import Anchor, Cost, Features, count_flops


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

    def zeros(self, anchor: Anchor, images: Tensor) -> Taps:
        """Zeros in the shapes of evaluation mode's maps for images (B, 3, H, W), with ``anchor`` the largest."""
        # A trace has tensors as sizes. For a size whose cost was counted before, the geometry is cached, so the trace
        # records no block.
        outlines = tap_outlines(anchor, self.test, (int(images.shape[-2]), int(images.shape[-1])))
        zeros = {i: one.with_data(images.new_zeros(len(images), *one.data.shape[1:])) for i, one in outlines.items()}
        return self.hand_out(zeros)


def tap_outlines(anchor: Anchor, blocks: Iterable[int], image_size: tuple[int, int]) -> dict[int, Features]:
    """The features of taps for one image, without values, by block of the largest ``anchor``."""
    geometry = anchor.geometry(image_size)
    return {block: geometry[block + 1].to(anchor.layout()) for block in blocks}


class TapNorms(nn.ModuleDict):
    """A LayerNorm over the channels of each tap, which all routes share; or no norms.

    The keys are the indices of the setting ``out_indices``, as in mmseg's ``norm0`` to ``norm3`` of a Swin. A class
    token is normalised with its map.

    Args:
        taps: the taps.
        widths: the number of output channels of each block of the largest anchor; empty for no norms.
    """

    def __init__(self, taps: OutIndices, widths: Sequence[int] = ()) -> None:
        super().__init__()
        self._blocks = {block: str(index) for block, index in zip(taps.train, taps.as_setting(taps.train), strict=True)}
        if widths:
            self.update({key: nn.LayerNorm(widths[block]) for block, key in self._blocks.items()})

    def forward(self, features: Mapping[int, Features]) -> Mapping[int, Features]:
        """Normalise features, keyed by block."""
        if not self:
            return features
        return {block: one.project(self[self._blocks[block]]) for block, one in features.items()}

    def cost(self, features: Mapping[int, Features]) -> Cost:
        """The cost for taps in the shapes of ``features``, keyed by block."""
        total = Cost()
        for one in features.values() if self else ():
            with torch.device("meta"):
                norm, rows = nn.LayerNorm(one.channels), torch.empty(one.data.numel() // one.channels, one.channels)
            total += Cost(count_flops(norm, rows), 2 * one.channels)
        return total


def _as_tuple(indices: int | Sequence[int | None]) -> tuple[int | None, ...]:
    return (indices,) if isinstance(indices, int) else tuple(indices)


register_pytree_node(
    Taps,
    lambda taps: ([tuple(taps), taps.class_tokens], None),
    lambda children, _: Taps(*children),
    serialized_type_name="mmsnnet.models.backbones.taps.Taps",
)
