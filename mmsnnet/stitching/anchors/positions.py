"""Stored positions: the weights of a plain ViT that depend on its image size."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mmsnnet.stitching.anchors.attention import BIAS_TABLE, AnchorAttention, resize_table, table_rows
from mmsnnet.stitching.features import Grid

POSITION = "pos_embed"
# An anchor's state dict records the grid of its stored positions, (height, width) in patches, under this name.
GRID = "grid"


class StoredPositions:
    """The position embedding and the relative position tables of a plain ViT.

    They are stored for one grid of patches and resampled to other grids. An anchor's state dict records the grid,
    because the shape of a position embedding does not determine it: two grids may have the same number of patches.

    Args:
        model: a timm model.
        prefix: number of prefix tokens.
    """

    def __init__(self, model: Any, prefix: int) -> None:
        self.model = model
        self.prefix = prefix

    @property
    def grid(self) -> Grid:
        """The height and width in patches of the model's image size."""
        height, width = self.model.patch_embed.grid_size
        return height, width

    def grids(self) -> dict[str, Grid]:
        """The grid of each stored tensor, by its name in the model's state dict.

        A table of windowed attention has the grid of its window.
        """
        grids = {} if self.model.pos_embed is None else {POSITION: self.grid}
        for index, attention in self._attentions():
            if attention.bias_grid is not None:
                grids[_table_name(index)] = attention.bias_grid
        return grids

    def fits(self, name: str, tensor: Any, grid: Grid) -> bool:
        """Whether a tensor has the shape that the stored tensor ``name`` would have for ``grid``."""
        stored = self._stored(name)
        if not isinstance(tensor, Tensor) or tensor.ndim != stored.ndim or tensor.shape[-1] != stored.shape[-1]:
            return False
        if name != POSITION:
            return len(tensor) == table_rows(grid, self.prefix)
        return tensor.shape[:2] == (1, stored.shape[1] - math.prod(self.grid) + math.prod(grid))

    def resample(self, name: str, tensor: Tensor, grid: Grid) -> Tensor:
        """Resample a tensor from ``grid`` to the grid of the stored tensor ``name``.

        If the grids are equal, the tensor itself is returned.
        """
        new_grid = self.grids()[name]
        if new_grid == grid:
            return tensor
        if name != POSITION:
            return resize_table(tensor, grid, new_grid)
        prefix = tensor.shape[1] - math.prod(grid)
        return resample_abs_pos_embed(tensor, new_size=list(new_grid), old_size=list(grid), num_prefix_tokens=prefix)

    def take_grid(self, state_dict: MutableMapping[str, Any], prefix: str) -> tuple[Grid, list[str]] | None:
        """Remove the recorded grid from a state dict, and resample its positions to the model's grid.

        Tables of windowed attention are not resampled: their grid is the window.

        Args:
            state_dict: the state dict, changed in place; the anchor's names start with ``prefix``.

        Returns:
            The recorded grid, and the names of the resampled tensors in the model's state dict. None if there is no
            record.
        """
        grid = recorded_grid(state_dict.get(prefix + GRID))
        if grid is None:
            return None
        del state_dict[prefix + GRID]
        windowed = {_table_name(index) for index, attention in self._attentions() if attention.window}
        resampled = []
        for name, stored_for in self.grids().items():
            key = f"{prefix}model.{name}"
            if stored_for != grid and name not in windowed and self.fits(name, state_dict.get(key), grid):
                state_dict[key] = self.resample(name, state_dict[key], grid)
                resampled.append(name)
        return grid, resampled

    def _attentions(self) -> list[tuple[int, AnchorAttention]]:
        attentions = ((index, getattr(block, "attn", None)) for index, block in enumerate(self.model.blocks))
        return [(index, attention) for index, attention in attentions if isinstance(attention, AnchorAttention)]

    def _stored(self, name: str) -> Tensor:
        owner, _, leaf = name.rpartition(".")
        return getattr(self.model.get_submodule(owner), leaf)


def _table_name(block: int) -> str:
    return f"blocks.{block}.attn.{BIAS_TABLE}"


def recorded_grid(record: Any) -> Grid | None:
    """Read the value that a state dict has under ``GRID``; None if it is no grid."""
    if not isinstance(record, Tensor) or record.shape != (2,) or record.is_floating_point():
        return None
    height, width = record.tolist()
    return (height, width) if height > 0 and width > 0 else None
