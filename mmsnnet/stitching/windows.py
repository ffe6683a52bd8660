"""Windows of tokens, kept from one windowed block to the next.

In ViTDet (arXiv 2203.16527), most blocks of a plain ViT attend within windows, and a few attend over the whole image.
Here the sequence holds one window after the other, (B, n * (P + w * w), C), each with a copy of the P prefix tokens.
Norms, MLPs, stochastic depth and stitching layers therefore see an ordinary sequence. Consecutive windowed blocks need
no rearrangement between them; ViTDet's own code rearranges twice in every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]
TensorOrNone = TypeVar("TensorOrNone", Tensor, Tensor | None)


def to_windows(tokens: Tensor, grid: Grid, window: int, prefix: int) -> Tensor:
    """Rearrange tokens (B, P + h * w, C) into windows (B, n * (P + window**2), C).

    The ``P = prefix`` tokens come first, then the patches of the grid (h, w). Each window gets a copy of the prefix
    tokens. Windows beyond the right and lower edge are padded with zeros, which :func:`window_mask` masks.
    """
    batch, _, width = tokens.shape
    rows, columns = (-(-side // window) for side in grid)
    patches = tokens[:, prefix:].reshape(batch, *grid, width)
    if (rows * window, columns * window) != tuple(grid):
        patches = F.pad(patches, (0, 0, 0, columns * window - grid[1], 0, rows * window - grid[0]))
    patches = patches.reshape(batch, rows, window, columns, window, width).transpose(2, 3)
    patches = patches.reshape(batch, rows * columns, window * window, width)
    copies = tokens[:, None, :prefix].expand(batch, rows * columns, prefix, width)
    return torch.cat([copies, patches], dim=2).flatten(1, 2)


def from_windows(tokens: Tensor, grid: Grid, window: int, prefix: int) -> Tensor:
    """Rearrange windows (B, n * (P + window**2), C) into tokens (B, P + h * w, C).

    Padding is dropped. A prefix token becomes the mean of its copies.
    """
    batch, _, width = tokens.shape
    rows, columns = (-(-side // window) for side in grid)
    windows = tokens.reshape(batch, rows * columns, prefix + window * window, width)
    patches = windows[:, :, prefix:].reshape(batch, rows, columns, window, window, width).transpose(2, 3)
    patches = patches.reshape(batch, rows * window, columns * window, width)[:, : grid[0], : grid[1]]
    return torch.cat([windows[:, :, :prefix].mean(dim=1), patches.flatten(1, 2)], dim=1)


def cached_tensor(maxsize: int) -> Callable[[Callable[..., TensorOrNone]], Callable[..., TensorOrNone]]:
    """An ``lru_cache`` of tensors that does not keep those of ``torch.export``, which have no values."""

    def decorate(function: Callable[..., TensorOrNone]) -> Callable[..., TensorOrNone]:
        cached = lru_cache(maxsize)(function)

        @wraps(function)
        def call(*arguments: Hashable) -> TensorOrNone:
            result = cached(*arguments)
            if result is not None and type(result) is not Tensor:
                cached.cache_clear()
            return result

        call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return call

    return decorate


@cached_tensor(maxsize=32)
def window_mask(grid: Grid, window: int, prefix: int, device: torch.device) -> Tensor | None:
    """A mask of the tokens that are not padding, (n, 1, 1, P + window**2).

    It broadcasts over queries and heads. None if no window is padded.
    """
    if all(side % window == 0 for side in grid):
        return None
    with torch.inference_mode(False):  # training reads the cached tensor too
        inside = torch.ones(1, math.prod(grid), 1, dtype=torch.bool, device=device)
        padded = to_windows(inside, grid, window, 0).reshape(-1, 1, 1, window * window)
        return F.pad(padded, (prefix, 0), value=True)
