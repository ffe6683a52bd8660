"""The stitched network: anchors and the stitching layers between them, run along one stitch at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.compilation import compile_blocks
from mmsnnet.stitching.features import Features
from mmsnnet.stitching.space import LayerKey, Stitch, StitchSpace
from mmsnnet.stitching.stitching_layer import StitchingLayer

LayerPath = tuple[LayerKey, ...]


class Leaving(NamedTuple):
    """What leaves ``block`` of ``anchor``: under the empty path as it is, under others what stitching layers make of
    it."""

    anchor: int
    block: int
    projected: dict[LayerPath, Features]


class Walker(Protocol):
    """An object that runs the blocks of a route: a :class:`StitchedNetwork`, or one with prefix reuse."""

    def walk(self, images: Tensor, stitch: Stitch) -> Iterator[Leaving]:
        """What leaves the blocks of a route, in their order; at least of those that are tapped."""


class StitchedNetwork(nn.Module):
    """Anchors joined by stitching layers.

    Args:
        anchors: from the smallest to the largest, of one family.
        space: the stitches over anchors of these depths.
        rank: of the low-rank updates of the stitching layers; 0 trains the layers' full weights.
        with_cp: recompute the activations of each block in the backward pass instead of keeping them.

    Raises:
        SettingError: the anchors do not fit each other or the space; the message says in what.
    """

    def __init__(self, anchors: Sequence[Anchor], space: StitchSpace, rank: int = 16, with_cp: bool = False) -> None:
        super().__init__()
        _check_fit(anchors, space)
        self.anchors = nn.ModuleList(anchors)
        self.space = space
        self.with_cp = with_cp
        self.layers = nn.ModuleDict(
            {
                str(key): StitchingLayer(
                    anchors[key.source].widths[key.source_block],
                    anchors[key.target].widths[key.target_block - 1],
                    rank=rank,
                )
                for key in space.layers
            }
        )

    def anchor(self, index: int) -> Anchor:
        """The anchor with this index, -1 for the largest."""
        anchor = self.anchors[index]
        assert isinstance(anchor, Anchor)
        return anchor

    def layer(self, key: LayerKey) -> StitchingLayer:
        """The stitching layer with this key."""
        layer = self.layers[str(key)]
        assert isinstance(layer, StitchingLayer)
        return layer

    @property
    def initialized(self) -> bool:
        """Whether every stitching layer has been initialised or loaded."""
        return all(self.layer(key).initialized for key in self.space.layers)

    def forward(self, images: Tensor, stitch: Stitch, out_indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The taps of a route: for images (B, 3, H, W) one map (B, C, h, w) for each of ``out_indices``, in the width C
        of the largest anchor. Nothing is run beyond the last tap.

        Raises:
            ValueError: an index is not a block of the largest anchor.
        """
        return tuple(tap.map() for tap in self.taps(images, stitch, out_indices))

    def taps(
        self, images: Tensor, stitch: Stitch, out_indices: Sequence[int], walker: Walker | None = None
    ) -> tuple[Features, ...]:
        """The taps of a route as features in the layout of the largest anchor's stem; otherwise as :meth:`forward`.

        Args:
            walker: runs the blocks; the network itself by default.
        """
        taps = self.space.taps(stitch, out_indices)
        layout = self.anchor(-1).layout()
        found: dict[object, Features] = {}
        for leaving in (walker or self).walk(images, stitch):
            for tap in taps:
                if (tap.anchor, tap.block) == (leaving.anchor, leaving.block) and tap not in found:
                    found[tap] = self._project(leaving.projected, tap.layers).to(layout)
            if len(found) == len(set(taps)):
                break
        return tuple(found[tap] for tap in taps)

    def classify(self, images: Tensor, stitch: Stitch, walker: Walker | None = None) -> Tensor:
        """Logits (B, classes) of a route over images (B, 3, H, W), by the classifier of the anchor that it ends in;
        ``walker`` as of :meth:`taps`."""
        for leaving in (walker or self).walk(images, stitch):
            last = leaving
        return self.anchor(last.anchor).classify(last.projected[()])

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block for training mode, in place; names in the state dict stay. Blocks of one kind share
        compiled code, whatever their rates of stochastic depth. The draws of stochastic depth differ from those of
        blocks that are not compiled.

        Evaluation mode runs as before, so that what is measured does not depend on a compiler. Copies, merged ones and
        pickled ones included, are not compiled.

        Args:
            options: of ``torch.compile``; ``fullgraph`` is True by default, so that a block which cannot be compiled,
                or is compiled anew too often, raises an error instead of running as it is.

        Raises:
            TypeError: ``torch.compile`` has no such option.
            ValueError: it has no such backend.
        """
        compile_blocks([self.anchor(index) for index in range(len(self.anchors))], **options)

    @torch.no_grad()
    def merged(self) -> StitchedNetwork:
        """A copy with every low-rank update merged into its layer: what is deployed."""
        merged = copy.deepcopy(self)
        for key in self.space.layers:
            merged.layers[str(key)] = self.layer(key).merged().train(self.training)
        return merged

    def walk(self, images: Tensor, stitch: Stitch, start: Leaving | None = None, done: int = 0) -> Iterator[Leaving]:
        """Run a route block by block and give what leaves each of them.

        A crossing uses what a tap has already projected.

        Args:
            start: what left block number ``done`` of the route, counted from 1; None to begin with the stem.
        """
        recompute = self.with_cp and self.training and torch.is_grad_enabled()
        if start is None:
            features = self.anchor(stitch.segments[0].anchor).stem(images)
        else:
            leaving, features = start, start.projected[()]
        for crossing, segment in zip((None, *stitch.layers), stitch.segments, strict=True):
            skipped = min(done, len(segment))
            done -= skipped
            if skipped == len(segment):
                continue
            if crossing is not None and skipped == 0:
                features = self._project(leaving.projected, (crossing,))
            anchor = self.anchor(segment.anchor)
            running = anchor.run(features, segment.start + skipped, segment.stop, recompute)
            for block, features in running:
                leaving = Leaving(segment.anchor, block, {(): features})
                yield leaving

    def _project(self, projected: dict[LayerPath, Features], path: LayerPath) -> Features:
        if path not in projected:
            projected[path] = self._project(projected, path[:-1]).project(self.layer(path[-1]))
        return projected[path]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and each of its submodules back into the mode that it was in."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _check_fit(anchors: Sequence[Anchor], space: StitchSpace) -> None:
    depths = tuple(anchor.depth for anchor in anchors)
    if depths != space.depths:
        raise SettingError(f"the space is over anchors of depths {space.depths}, the anchors have {depths}")
    for name in dict.fromkeys(name for anchor in anchors for name in anchor.agreement):
        values = [anchor.agreement.get(name) for anchor in anchors]
        if len(set(values)) > 1:
            raise SettingError(
                f"anchors must agree in {name}, so that their features correspond one to one; got {_joined(values)}: "
                "choose models of one family"
            )
    channels = [anchor.in_chans for anchor in anchors]
    if len(set(channels)) > 1:
        raise SettingError(
            f"anchors must agree in in_chans, the channels of their images; got {_joined(channels)}: set in_chans to "
            "one number in every anchor"
        )
    for index, (first, second) in enumerate(pairwise(anchors)):
        if first.widths[-1] > second.widths[-1]:
            raise SettingError(
                f"anchors go from the smallest to the largest: anchor {index} is {first.widths[-1]} wide and anchor "
                f"{index + 1} {second.widths[-1]}"
            )


def _joined(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))
