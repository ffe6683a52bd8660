"""Attention of anchors that have a relative position bias or windows: timm's, with a mask and a change of shape."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from mmsnnet.stitching.windows import Grid, window_mask

BIAS_TABLE = "relative_position_bias_table"


class AnchorAttention(Attention):
    """timm's attention over the whole image or within windows, with or without a learned relative position bias.

    The bias reaches the fused kernel as its mask, (1, heads, N, N): one for all images and windows. Its table has a row
    for each offset between two patches, and three for pairs with a prefix token: prefix to patch, patch to prefix, and
    among prefix tokens (BEiT, arXiv 2106.08254, whose order this is). It starts at zero.
    """

    relative_position_bias_table: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = 0
        self.prefix = 0
        self.bias_grid: Grid | None = None

    def set_window(self, window: int, prefix: int) -> None:
        """Attends within windows of ``window`` x ``window`` patches, each with its copy of the prefix tokens; 0 attends
        over the whole image."""
        self.window, self.prefix = window, prefix

    def add_position_bias(self, grid: Grid, prefix: int) -> None:
        """Adds the bias, its table stored for ``grid`` (height, width in patches); in windows, for the window."""
        self.bias_grid, self.prefix = ((self.window, self.window) if self.window else grid), prefix
        table = torch.zeros(table_rows(self.bias_grid, prefix), self.num_heads)
        self.register_parameter(BIAS_TABLE, nn.Parameter(table.to(self.qkv.weight.device)))

    def mask(self, grid: Grid) -> Tensor | None:
        """What attention over an image of ``grid`` (height, width in patches) adds to its logits, or which keys it
        sees: (1 or n windows, 1 or heads, 1 or N, N), None for neither bias nor padding.

        Where windows are padded and have a bias, the two make one mask for each window, and :meth:`forward` one for
        each window and image; an ``img_size`` of whole windows avoids that.
        """
        device = self.qkv.weight.device
        seen = window_mask(grid, self.window, self.prefix, device) if self.window else None
        if self.bias_grid is None:
            return seen
        attended = (self.window, self.window) if self.window else grid
        table = resize_table(self.relative_position_bias_table, self.bias_grid, attended)
        index = position_index(attended, self.prefix, device)
        bias = table.T.index_select(1, index.flatten()).reshape(1, -1, *index.shape)
        return bias if seen is None else bias.masked_fill(~seen, float("-inf"))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Tokens (B, N, C), or windows of tokens (B, n * N, C), to the same shape.

        Raises:
            ValueError: causal attention is asked for, which an anchor's blocks have no use of.
        """
        if is_causal:
            raise ValueError("an anchor's attention is not causal")
        if not self.window:
            return super().forward(x, attn_mask=attn_mask)
        windows = x.reshape(-1, self.prefix + self.window**2, x.shape[-1])
        if attn_mask is not None and attn_mask.shape[0] > 1:
            attn_mask = attn_mask.repeat(x.shape[0], 1, 1, 1)
        return super().forward(windows, attn_mask=attn_mask).reshape(x.shape)


def table_rows(grid: Grid, prefix: int) -> int:
    """The rows of a bias table for ``grid``: (2h - 1)(2w - 1) offsets, and three for prefix tokens if there are any."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if prefix else 0)


@lru_cache(maxsize=4)
def position_index(grid: Grid, prefix: int, device: torch.device) -> Tensor:
    """The table's row for each query and key, int32 (N, N) with N = prefix + h * w."""
    height, width = grid
    offsets = (2 * height - 1) * (2 * width - 1)
    with torch.inference_mode(False):  # what is kept must serve training too
        y = torch.arange(height, dtype=torch.int32, device=device).repeat_interleave(width)
        x = torch.arange(width, dtype=torch.int32, device=device).repeat(height)
        down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
        index = F.pad(down * (2 * width - 1) + right, (prefix, 0, prefix, 0))
        index[:prefix, prefix:] = offsets
        index[prefix:, :prefix] = offsets + 1
        index[:prefix, :prefix] = offsets + 2
    return index


def resize_table(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """A bias table (rows, heads) for ``grid``, interpolated bicubically to ``new_grid``: its ends and its centre stay,
    so do the rows of prefix tokens."""
    if tuple(grid) == tuple(new_grid):
        return table
    sides, new_sides = ([2 * side - 1 for side in g] for g in (grid, new_grid))
    offsets, rest = table.split([sides[0] * sides[1], len(table) - sides[0] * sides[1]])
    resized = F.interpolate(
        offsets.T.reshape(1, -1, *sides).float(), size=new_sides, mode="bicubic", align_corners=True
    )
    return torch.cat([resized[0].flatten(1).T.to(table.dtype), rest])
