"""The stitched network: anchors and the stitching layers between them, run along one stitch at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.compilation import compile_blocks
from mmsnnet.stitching.space import LayerKey, Stitch, StitchSpace
from mmsnnet.stitching.stitching_layer import StitchingLayer

LayerPath = tuple[LayerKey, ...]


class Leaving(NamedTuple):
    """Tokens that leave ``block`` of ``anchor``, arranged in windows of side ``window``; ``projected`` has them under
    the empty path, and what stitching layers make of them."""

    anchor: int
    block: int
    window: int
    projected: dict[LayerPath, Tensor]


class StitchedNetwork(nn.Module):
    """Anchors joined by stitching layers.

    Args:
        anchors: from the smallest to the largest, of the same patch size, prefix tokens and channels of images.
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
        grid = self._grid(images)
        return tuple(self.anchor(-1).to_map(tokens, grid) for tokens in self.tokens(images, stitch, out_indices))

    def tokens(
        self, images: Tensor, stitch: Stitch, out_indices: Sequence[int], walk: Iterable[Leaving] | None = None
    ) -> tuple[Tensor, ...]:
        """The taps of a route as tokens (B, N, C), prefix tokens first; otherwise as :meth:`forward`. ``walk`` gives
        what leaves the route's blocks where somebody else runs them."""
        grid = self._grid(images)
        taps = self.space.taps(stitch, out_indices)
        found: dict[object, Tensor] = {}
        for leaving in self.walk(images, stitch) if walk is None else walk:
            for tap in taps:
                if (tap.anchor, tap.block) == (leaving.anchor, leaving.block) and tap not in found:
                    tokens = self._project(leaving.projected, tap.layers)
                    found[tap] = self.anchor(-1).arrange(tokens, grid, leaving.window, 0)
            if len(found) == len(set(taps)):
                break
        return tuple(found[tap] for tap in taps)

    def classify(self, images: Tensor, stitch: Stitch, walk: Iterable[Leaving] | None = None) -> Tensor:
        """Logits (B, classes) of a route over images (B, 3, H, W), by the classifier of the anchor that it ends in.
        ``walk`` as of :meth:`tokens`."""
        for leaving in self.walk(images, stitch) if walk is None else walk:
            last = leaving
        anchor = self.anchor(last.anchor)
        return anchor.classify(anchor.arrange(last.projected[()], self._grid(images), last.window, 0))

    def compile_blocks(self, **options: Any) -> None:
        """Compiles every block for training mode, in place; names in the state dict stay. Blocks of one anchor (with
        windows of one size) share what is compiled, whatever their rates of stochastic depth, whose draws are others
        than without.

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

    def _grid(self, images: Tensor) -> tuple[int, int]:
        return self.anchor(-1).grid((images.shape[-2], images.shape[-1]))

    def walk(
        self, images: Tensor, stitch: Stitch, start: Leaving | None = None, position: int = 0
    ) -> Iterator[Leaving]:
        """Runs a route block by block and gives what leaves each of them; from the stem, or from ``start``, what left
        the block before ``position``, counted along the route.

        A crossing uses what a tap has already projected. Tokens are rearranged where a block's windows differ from
        those of the block before it, in whichever anchor.
        """
        recompute = self.with_cp and self.training and torch.is_grad_enabled()
        grid = self._grid(images)
        if start is None:
            tokens, window = self.anchor(stitch.segments[0].anchor).stem(images), 0
        else:
            leaving, tokens, window = start, start.projected[()], start.window
        for crossing, segment in zip((None, *stitch.layers), stitch.segments, strict=True):
            run = min(position, len(segment))
            position -= run
            if run == len(segment):
                continue
            if crossing is not None and run == 0:
                tokens = self._project(leaving.projected, (crossing,))
            anchor = self.anchor(segment.anchor)
            running = anchor.run(tokens, grid, segment.start + run, segment.stop, window, recompute)
            for block, tokens, window in running:
                leaving = Leaving(segment.anchor, block, window, {(): tokens})
                yield leaving

    def _project(self, projected: dict[LayerPath, Tensor], path: LayerPath) -> Tensor:
        if path not in projected:
            projected[path] = self.layer(path[-1])(self._project(projected, path[:-1]))
        return projected[path]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module into evaluation mode, and each of its submodules back into the mode that it was in."""
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
    for what in ("patch_size", "num_prefix_tokens", "img_size"):
        values = [getattr(anchor, what) for anchor in anchors]
        if len(set(values)) > 1:
            raise SettingError(
                f"anchors must agree in {what}, so that their tokens correspond one to one; got "
                + " and ".join(map(str, values))
                + ": choose models of one family"
            )
    channels = [anchor.in_chans for anchor in anchors]
    if len(set(channels)) > 1:
        raise SettingError(
            "anchors must agree in in_chans, the channels of their images; got "
            + " and ".join(map(str, channels))
            + ": set in_chans to one number in every anchor"
        )
    for index, (first, second) in enumerate(pairwise(anchors)):
        if first.width > second.width:
            raise SettingError(
                f"anchors go from the smallest to the largest: anchor {index} is {first.width} wide and anchor "
                f"{index + 1} {second.width}"
            )
