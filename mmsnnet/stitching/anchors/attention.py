"""timm's attention, extended by windows and a relative position bias."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from mmsnnet.stitching.windows import Grid, cached_tensor, window_mask

BIAS_TABLE = "relative_position_bias_table"


class AnchorAttention(Attention):
    """timm's attention, with optional windows and a learned relative position bias.

    The fused kernel gets the bias as its mask, (1, heads, N, N), one for all images and windows: the kernel was twice
    as fast as materialised attention on a CPU. The table of the bias starts at zero. It has one row for each offset
    between two patches, then three rows for pairs with a prefix token: prefix to patch, patch to prefix, prefix to
    prefix. This is the order of BEiT (arXiv 2106.08254).
    """

    relative_position_bias_table: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window = 0
        self.prefix = 0
        self.bias_grid: Grid | None = None

    def set_window(self, window: int, prefix: int) -> None:
        """Attend within windows of ``window`` x ``window`` patches and a copy of the prefix tokens.

        0 attends over the whole image.
        """
        self.window, self.prefix = window, prefix

    def add_position_bias(self, grid: Grid, prefix: int) -> None:
        """Add the bias, with a table for ``grid`` (height, width in patches), or for the window."""
        self.bias_grid, self.prefix = ((self.window, self.window) if self.window else grid), prefix
        table = torch.zeros(table_rows(self.bias_grid, prefix), self.num_heads)
        self.register_parameter(BIAS_TABLE, nn.Parameter(table.to(self.qkv.weight.device)))

    def mask(self, grid: Grid) -> Tensor | None:
        """The attention mask for images of ``grid`` (height, width in patches).

        It is a float bias, or a boolean mask of padding: (1 or n windows, 1 or heads, 1 or N, N). None if there is
        neither. Padded windows with a bias need one mask for each window, and :meth:`forward` copies it for each image;
        an ``img_size`` of whole windows avoids that.
        """
        device = self.qkv.weight.device
        padding = window_mask(grid, self.window, self.prefix, device) if self.window else None
        if self.bias_grid is None:
            return padding
        attended = (self.window, self.window) if self.window else grid
        # Not cached: the masks of all blocks would take as much memory as the attention weights.
        table = resize_table(self.relative_position_bias_table, self.bias_grid, attended)
        index = position_index(attended, self.prefix, device)
        bias = table.T.index_select(1, index.flatten()).reshape(1, -1, *index.shape)
        return bias if padding is None else bias.masked_fill(~padding, float("-inf"))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens (B, N, C), or windows of tokens (B, n * N, C); the shape stays.

        Raises:
            ValueError: ``is_causal`` is True, which anchors do not support.
        """
        if is_causal:
            raise ValueError("an anchor's attention is not causal")
        if not self.window:
            return super().forward(x, attn_mask=attn_mask)
        windows = x.reshape(-1, self.prefix + self.window**2, x.shape[-1])
        if attn_mask is not None and attn_mask.shape[0] > 1:
            attn_mask = attn_mask.repeat(x.shape[0], 1, 1, 1)
        return super().forward(windows, attn_mask=attn_mask).reshape(x.shape)


def modules_without_bias(block: nn.Module) -> list[nn.Module]:
    """A block's modules without a relative position bias, which :meth:`AnchorAttention.mask` reads before it runs.

    The block itself if it has none.
    """
    attention = getattr(block, "attn", None)
    if isinstance(attention, AnchorAttention) and attention.bias_grid is not None:
        return [attention.qkv, attention.proj, block.get_submodule("mlp")]
    return [block]


def table_rows(grid: Grid, prefix: int) -> int:
    """The number of rows of a bias table for ``grid`` (h, w).

    They are (2h - 1)(2w - 1) offsets, and three for pairs with a prefix token if there are prefix tokens.
    """
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + (3 if prefix else 0)


@cached_tensor(maxsize=4)
def position_index(grid: Grid, prefix: int, device: torch.device) -> Tensor:
    """The row of the bias table for each query and key, int32 (N, N) with N = prefix + h * w."""
    height, width = grid
    offsets = (2 * height - 1) * (2 * width - 1)
    with torch.inference_mode(False):  # training reads the cached tensor too
        y = torch.arange(height, dtype=torch.int32, device=device).repeat_interleave(width)
        x = torch.arange(width, dtype=torch.int32, device=device).repeat(height)
        down, right = y[:, None] - y + height - 1, x[:, None] - x + width - 1
        index = F.pad(down * (2 * width - 1) + right, (prefix, 0, prefix, 0))
        index[:prefix, prefix:] = offsets
        index[prefix:, :prefix] = offsets + 1
        index[:prefix, :prefix] = offsets + 2
    return index


def resize_table(table: Tensor, grid: Grid, new_grid: Grid) -> Tensor:
    """Interpolate a bias table (rows, heads) bicubically from ``grid`` to ``new_grid``.

    The largest offsets and the centre keep their values, and so do the rows of prefix tokens.
    """
    if tuple(grid) == tuple(new_grid):
        return table
    sides, new_sides = ([2 * side - 1 for side in g] for g in (grid, new_grid))
    offsets, rest = table.split([sides[0] * sides[1], len(table) - sides[0] * sides[1]])
    resized = F.interpolate(
        offsets.T.reshape(1, -1, *sides).float(), size=new_sides, mode="bicubic", align_corners=True
    )
    return torch.cat([resized[0].flatten(1).T.to(table.dtype), rest])
