"""Features: the tensor that passes from block to block, and its layout.

Models differ in how features lie in memory, but a stitching layer is a linear map over the channels in every layout.
Only this file and :mod:`mmsnnet.stitching.windows` rearrange features; the rest of the package passes them on, and
therefore works for every kind of model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching.windows import Grid, from_windows, to_windows


@dataclass(frozen=True, slots=True)
class Layout:
    """The memory layout of a model's features.

    A plain ViT has tokens (B, N, C). The ``prefix`` tokens (class token, registers) come first, then the patches row by
    row. With a ``window``, the patches are ordered window by window, and each window has a copy of the prefix tokens
    (:mod:`mmsnnet.stitching.windows`). Hierarchical models have maps, (B, h, w, C) or (B, C, h, w), or tokens without a
    prefix.

    Attributes:
        prefix: number of prefix tokens.
        has_class_token: whether the first prefix token is a class token.
        window: side of a window in patches; 0 for the whole image.
        format: ``'tokens'``, ``'nhwc'`` or ``'nchw'``.
    """

    prefix: int = 0
    has_class_token: bool = False
    window: int = 0
    format: str = "tokens"


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a batch of images.

    Attributes:
        data: the tensor, arranged by ``layout``.
        layout: the arrangement of ``data``.
        grid: height and width of the map, in patches of a plain ViT.
    """

    data: Tensor
    layout: Layout
    grid: Grid

    @classmethod
    def of_map(cls, data: Tensor, layout: Layout) -> Features:
        """Features of a map, whose shape tells the grid; ``layout`` is no layout of tokens."""
        height, width = data.shape[1:3] if layout.format == "nhwc" else data.shape[2:]
        return cls(data, layout, (height, width))

    @property
    def channels(self) -> int:
        """The number of channels."""
        return self.data.shape[1 if self.layout.format == "nchw" else -1]

    def to(self, layout: Layout) -> Features:
        """Convert the features to another layout; return ``self`` if the layout is the same.

        Raises:
            ValueError: the layouts have different numbers of prefix tokens.
        """
        source = self.layout
        if layout == source:
            return self
        if layout.prefix != source.prefix:
            raise ValueError(
                f"features have {source.prefix} prefix tokens where {layout.prefix} are expected: "
                "choose anchors with the same number of class and register tokens"
            )
        data = self.data
        if layout.format != source.format:
            # By way of (B, h, w, C). Only plain ViTs have prefix tokens and windows, and all of them have tokens.
            if source.format != "nhwc":
                data = data.movedim(1, -1) if source.format == "nchw" else data.unflatten(1, self.grid)
            if layout.format != "nhwc":
                data = data.movedim(-1, 1) if layout.format == "nchw" else data.flatten(1, 2)
            data = data.contiguous()
        if layout.window != source.window:
            if source.window:
                data = from_windows(data, self.grid, source.window, source.prefix)
            if layout.window:
                data = to_windows(data, self.grid, layout.window, layout.prefix)
        return Features(data, layout, self.grid)

    def check_meets(self, other: Features, sites: str) -> None:
        """Check that a stitching layer can map these features to others.

        Raises:
            SettingError: their grids differ; the message names both ``sites``.
        """
        if self.grid != other.grid:
            maps = " and ".join(f"{height} x {width}" for height, width in (self.grid, other.grid))
            raise SettingError(
                f"{sites}, are maps of {maps}: anchors of several classes need sizes that are multiples of their "
                "largest stride (size_divisor or pad_size_divisor of the data preprocessor)"
            )

    def with_data(self, data: Tensor) -> Features:
        """Replace the tensor and keep layout and grid."""
        return Features(data, self.layout, self.grid)

    def project(self, layer: nn.Module) -> Features:
        """Apply a layer of the channels (linear, or a LayerNorm), in the present layout."""
        if self.layout.format == "nchw":
            data = layer(self.data.movedim(1, -1)).movedim(-1, 1)
            # Memory stays as it is: channels last, or not.
            return self.with_data(data.contiguous() if self.data.is_contiguous() else data)
        return self.with_data(layer(self.data))

    def rows(self) -> Tensor:
        """All tokens or places of all images as rows (B * N, C). Rows of two anchors correspond one to one."""
        return self._tokens().data.flatten(0, 1)

    def map(self) -> Tensor:
        """The patches as a contiguous map (B, C, h, w)."""
        if self.layout.format == "nchw":
            return self.data.contiguous()
        patches = self._tokens().data[:, self.layout.prefix :]
        return patches.transpose(1, 2).reshape(patches.shape[0], -1, *self.grid).contiguous()

    def class_token(self) -> Tensor | None:
        """The class token (B, C); None if there is none."""
        # A head may change its input in place, so it gets a copy.
        return self._tokens().data[:, 0].clone() if self.layout.has_class_token else None

    def _tokens(self) -> Features:
        return self.to(replace(self.layout, window=0, format="tokens"))
