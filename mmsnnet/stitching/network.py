"""The stitched network: anchors, and stitching layers between them. It runs one stitch at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching.anchors.base import NORM, Anchor
from mmsnnet.stitching.compilation import compile_blocks
from mmsnnet.stitching.features import Features
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import LayerKey, Stitch, as_blocks
from mmsnnet.stitching.stitching_layer import StitchingLayer

LayerPath = tuple[LayerKey, ...]


class BlockOutput(NamedTuple):
    """The features that leave ``block`` of ``anchor``.

    ``projected`` holds them by path: unchanged under the empty path, and mapped by stitching layers under the path of
    those layers. Taps and crossings of one block share its entries, so that each layer is applied once.
    """

    anchor: int
    block: int
    projected: dict[LayerPath, Features]


class Walker(Protocol):
    """Runs the blocks of a route: a :class:`StitchedNetwork`, possibly with prefix reuse."""

    def walk(self, images: Tensor, stitch: Stitch) -> Iterator[BlockOutput]:
        """Yield outputs of the route's blocks, in order; at least those of tapped blocks."""


class StitchedNetwork(nn.Module):
    """Anchors joined by stitching layers (SN-Netv2, arXiv 2307.00154).

    Args:
        anchors: models of one family, from the smallest to the largest.
        space: the stitches over anchors of these depths.
        rank: rank of the low-rank updates of the stitching layers; 0 trains the layers' full weights.
        with_cp: recompute the activations of each block in the backward pass instead of keeping them.

    Raises:
        SettingError: the anchors do not fit each other or the space; the message names the difference.
    """

    def __init__(self, anchors: Sequence[Anchor], space: StitchSpace, rank: int = 16, with_cp: bool = False) -> None:
        super().__init__()
        _check_fit(anchors, space)
        self.anchors = nn.ModuleList(anchors)
        self.space = space
        self.with_cp = with_cp
        self._checked_sizes: set[tuple[int, int]] = set()
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
        """The anchor with this index; -1 is the largest."""
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
        """Whether every stitching layer is initialised or loaded."""
        return all(self.layer(key).initialized for key in self.space.layers)

    def forward(self, images: Tensor, stitch: Stitch, out_indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Run a route and return its taps as maps.

        Args:
            images: (B, 3, H, W).
            stitch: the route; blocks after its last tap are not run.
            out_indices: blocks of the largest anchor.

        Returns:
            One map (B, C, h, w) for each of ``out_indices``, with the width C of the largest anchor.

        Raises:
            ValueError: an index is not a block of the largest anchor.
        """
        return tuple(tap.map() for tap in self.taps(images, stitch, out_indices))

    def taps(
        self, images: Tensor, stitch: Stitch, out_indices: Sequence[int], walker: Walker | None = None
    ) -> tuple[Features, ...]:
        """Run a route and return its taps as features; otherwise as :meth:`forward`.

        The features have the layout of the largest anchor's stem.

        Args:
            walker: runs the blocks; the network itself by default.
        """
        taps = self.space.taps(stitch, out_indices)
        layout = self.anchor(-1).layout()
        tapped: dict[object, Features] = {}
        for output in (self if walker is None else walker).walk(images, stitch):
            for tap in taps:
                if (tap.anchor, tap.block) == (output.anchor, output.block) and tap not in tapped:
                    tapped[tap] = self._project(output.projected, tap.layers).to(layout)
            if len(tapped) == len(set(taps)):
                break
        return tuple(tapped[tap] for tap in taps)

    def classify(self, images: Tensor, stitch: Stitch, walker: Walker | None = None) -> Tensor:
        """Run a route and the classifier of its last anchor.

        Args:
            images: (B, 3, H, W).
            walker: as for :meth:`taps`.

        Returns:
            Logits (B, classes).

        Raises:
            ValueError: the anchors were created without a classifier.
        """
        for output in (self if walker is None else walker).walk(images, stitch):
            last = output
        return self.anchor(last.anchor).classify(last.projected[()], stitch.skips_final_norm)

    def compile_blocks(self, **options: Any) -> None:
        """Compile every block for training mode, in place.

        Blocks are compiled because the graph of a whole step changes with the stitch. Blocks of one kind share compiled
        code, for all rates of stochastic depth; its draws differ from those of uncompiled blocks. Names in the state
        dict stay. Evaluation mode runs uncompiled code, so that measured figures do not depend on a compiler. Copies
        are not compiled, including merged and pickled ones.

        Args:
            options: options of ``torch.compile``. ``fullgraph`` is True by default: a block that cannot be compiled, or
                that exceeds torch's recompile limit, raises an error instead of running uncompiled.

        Raises:
            TypeError: ``torch.compile`` has no such option.
            ValueError: ``torch.compile`` has no such backend.
        """
        compile_blocks([self.anchor(index) for index in range(len(self.anchors))], **options)

    @torch.no_grad()
    def merged(self) -> StitchedNetwork:
        """A copy for deployment, with every low-rank update merged into its layer."""
        merged = copy.deepcopy(self)
        for key in self.space.layers:
            merged.layers[str(key)] = self.layer(key).merged().train(self.training)
        return merged

    def walk(
        self, images: Tensor, stitch: Stitch, start: BlockOutput | None = None, done: int = 0
    ) -> Iterator[BlockOutput]:
        """Run a route block by block and yield the output of each block.

        A crossing reuses the projection that a tap of the same block has computed.

        Args:
            images: (B, 3, H, W).
            start: the output of block number ``done`` of the route, counted from 1; None starts at the stem.
            done: the number of blocks to skip.

        Raises:
            SettingError: anchors of several classes have other maps for images of this size.
        """
        recompute = self.with_cp and self.training and torch.is_grad_enabled()
        self.check_size((images.shape[-2], images.shape[-1]))
        if start is None:
            features = self.anchor(stitch.segments[0].anchor).stem(images)
        else:
            output, features = start, start.projected[()]
        for crossing, segment in zip((None, *stitch.layers), stitch.segments, strict=True):
            skipped = min(done, len(segment))
            done -= skipped
            if skipped == len(segment):
                continue
            if crossing is not None and skipped == 0:
                features = self._project(output.projected, (crossing,))
            anchor = self.anchor(segment.anchor)
            for block, computed in anchor.run(features, segment.start + skipped, segment.stop, recompute):
                output = BlockOutput(segment.anchor, block, {(): computed})
                yield output

    def check_size(self, image_size: tuple[int, int]) -> None:
        """Check that maps of anchors of several classes agree where layers join them: at odd sizes some round down.

        Raises:
            SettingError: they do not, for images of this size (height, width).
        """
        if len({type(anchor) for anchor in self.anchors}) == 1:
            return
        image_size = int(image_size[0]), int(image_size[1])  # a traced program has tensors as sizes
        if image_size in self._checked_sizes:
            return
        for key in self.space.layers:
            leaving = self.anchor(key.source).geometry(image_size)[key.source_block + 1]
            entering = self.anchor(key.target).geometry(image_size)[key.target_block]
            leaving.check_meets(
                entering,
                f"images of {image_size[0]} x {image_size[1]}: what leaves block {key.source_block} of anchor "
                f"{key.source}, and what enters block {key.target_block} of anchor {key.target}",
            )
        self._checked_sizes.add(image_size)

    def _project(self, projected: dict[LayerPath, Features], path: LayerPath) -> Features:
        if path not in projected:
            projected[path] = self._project(projected, path[:-1]).project(self.layer(path[-1]))
        return projected[path]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the mode of each submodule afterwards."""
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes.items():
            submodule.training = training


def _check_fit(anchors: Sequence[Anchor], space: StitchSpace) -> None:
    stages = tuple(anchor.stages for anchor in anchors)
    if stages != space.stages:
        wanted, given = as_blocks(space.stages), as_blocks(stages)
        raise SettingError(f"the space is for anchors of depths {wanted}, but the anchors have depths {given}")
    for name in dict.fromkeys(name for anchor in anchors for name in anchor.agreement):
        values = [anchor.agreement.get(name) for anchor in anchors]
        if len(set(values)) > 1:
            raise SettingError(
                f"anchors must agree in {name}, so that their features correspond one to one; got {_joined(values)}: "
                "choose models of one family"
            )
    for last in {stitch.segments[-1].anchor for stitch in space if stitch.skips_final_norm}:
        if not anchors[last].outline().parameters_of(NORM):
            raise SettingError(
                f"skip_final_norm=True needs plain ViTs with a classifier, whose tokens get a norm after the last "
                f"block; anchor {last} is none: leave out skip_final_norm"
            )
    channels = [anchor.in_chans for anchor in anchors]
    if len(set(channels)) > 1:
        raise SettingError(
            f"anchors must agree in in_chans, the channels of their images; got {_joined(channels)}: set the same "
            "in_chans in every anchor"
        )
    for index, (first, second) in enumerate(pairwise(anchors)):
        if first.widths[-1] > second.widths[-1]:
            raise SettingError(
                f"order the anchors from the smallest to the largest: anchor {index} is {first.widths[-1]} wide and "
                f"anchor {index + 1} {second.widths[-1]}"
            )


def _joined(values: Iterable[object]) -> str:
    return " and ".join(map(str, values))
