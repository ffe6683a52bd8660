"""Features: what passes from block to block, together with how it lies in memory.

Everything that rearranges features is here and in :mod:`mmsnnet.stitching.windows`. The rest of the package hands
``Features`` from block to block and does not ask what is in them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from mmsnnet.stitching.windows import Grid, from_windows, to_windows


@dataclass(frozen=True, slots=True)
class Layout:
    """How the features of a plain ViT lie in memory: as tokens (B, N, C).

    The ``prefix`` tokens (class token, registers) come first, then the patches row by row. With a ``window``, the
    patches stand window by window, and each window has a copy of the prefix tokens (:mod:`mmsnnet.stitching.windows`).

    Attributes:
        prefix: number of prefix tokens.
        has_class_token: whether the first of them is a class token.
        window: side of a window in patches; 0 for the whole image.
    """

    prefix: int = 0
    has_class_token: bool = False
    window: int = 0


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a batch of images.

    Attributes:
        data: the numbers, arranged by ``layout``.
        layout: how ``data`` is arranged.
        grid: height and width of the images in patches.
    """

    data: Tensor
    layout: Layout
    grid: Grid

    def to(self, layout: Layout) -> Features:
        """The same features in another layout; this very object if the layout is the same.

        Raises:
            ValueError: the layouts have different numbers of prefix tokens.
        """
        source = self.layout
        if layout == source:
            return self
        if layout.prefix != source.prefix:
            raise ValueError(
                f"features with {source.prefix} prefix tokens cannot be used where {layout.prefix} are expected: "
                "choose anchors with the same number of class and register tokens"
            )
        data = self.data
        if layout.window != source.window:
            if source.window:
                data = from_windows(data, self.grid, source.window, source.prefix)
            if layout.window:
                data = to_windows(data, self.grid, layout.window, layout.prefix)
        return Features(data, layout, self.grid)

    def with_data(self, data: Tensor) -> Features:
        """Other numbers in the same layout."""
        return Features(data, self.layout, self.grid)

    def project(self, layer: nn.Module) -> Features:
        """A linear map over the channels, in whatever layout; windows need not be undone for it."""
        return self.with_data(layer(self.data))

    def rows(self) -> Tensor:
        """One row for each token of each image, (B * N, C): the rows of two anchors correspond one to one."""
        return self._whole().data.flatten(0, 1)

    def map(self) -> Tensor:
        """The patches as a contiguous map (B, C, h, w)."""
        patches = self._whole().data[:, self.layout.prefix :]
        return patches.transpose(1, 2).reshape(len(patches), -1, *self.grid).contiguous()

    def class_token(self) -> Tensor | None:
        """A copy of the class token, (B, C), or None where there is none. A copy, because a head may work in place."""
        return self._whole().data[:, 0].clone() if self.layout.has_class_token else None

    def _whole(self) -> Features:
        return self.to(replace(self.layout, window=0))
