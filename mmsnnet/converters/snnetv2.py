"""Released SN-Netv2 checkpoints (arXiv 2307.00154) under mmsnnet's names.

Names and shapes tell the structure of a checkpoint. No tensor is skipped: a tensor that is missing, left over or of
another shape is an error that lists it.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmsnnet.apis.config import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.converters.released import Conversion, Renaming, Weights, check_files, read_released, write_converted
from mmsnnet.errors import DataError, SettingError
from mmsnnet.files.reading import describe_mismatch, join_names, tensor_shapes
from mmsnnet.models import check_weights, find_stitched_backbone
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.stitching import StitchSpace
from mmsnnet.stitching.anchors.attention import BIAS_TABLE, position_index
from mmsnnet.stitching.anchors.positions import GRID
from mmsnnet.stitching.features import Grid

Task = Literal["segmentation", "classification"]

# Our names, and the shape of each tensor in symbols. Both anchors share the number of image channels I, the patch size
# P x Q, the number of patches N, of classes K and of rows T of a bias table. Each has its width C, the width F of its
# MLPs and its number of heads A. R is the rank.
STEM = {"cls_token": "1 1 C", "pos_embed": "1 N C", "patch_embed.proj.weight": "C I P Q", "patch_embed.proj.bias": "C"}
BLOCK = {
    "norm1.weight": "C",
    "norm1.bias": "C",
    "attn.qkv.weight": "3C C",
    "attn.qkv.bias": "3C",
    "attn.proj.weight": "C C",
    "attn.proj.bias": "C",
    "ls1.gamma": "C",
    "norm2.weight": "C",
    "norm2.bias": "C",
    "mlp.fc1.weight": "F C",
    "mlp.fc1.bias": "F",
    "mlp.fc2.weight": "C F",
    "mlp.fc2.bias": "C",
    "ls2.gamma": "C",
}
TABLE = {f"attn.{BIAS_TABLE}": "T A"}
CLASSIFIER = {"norm.weight": "C", "norm.bias": "C", "head.weight": "K C", "head.bias": "K"}
LAYER = {"weight": "out in", "bias": "out"}
LOW_RANK = {"lora_A": "R in", "lora_B": "out R"}

# The parts of our names that differ in the released files.
RENAMED: dict[Task, dict[str, str]] = {
    "segmentation": {
        "patch_embed.proj": "patch_embed.projection",
        "blocks": "layers",
        "norm1": "ln1",
        "norm2": "ln2",
        "ls1.gamma": "gamma_1",
        "ls2.gamma": "gamma_2",
        "mlp.fc1": "ffn.layers.0.0",
        "mlp.fc2": "ffn.layers.1",
    },
    "classification": {"ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"},
}
PREFIX: dict[Task, str] = {"segmentation": "backbone.", "classification": ""}
INDEX = "backbone.anchors.{a}.layers.{i}.attn.relative_position_index"
GRIDS = "backbone.network.anchors.{a}." + GRID
HEADS = ("decode_head.", "auxiliary_head.")

RELEASED: dict[Task, re.Pattern[str]] = {
    "segmentation": re.compile(r"backbone\.anchors\.(\d+)\.(?:layers\.(\d+)\.)?"),
    "classification": re.compile(r"anchors\.(\d+)\.(?:blocks\.(\d+)\.)?"),
}


@dataclass(frozen=True)
class Structure:
    """The model of a checkpoint: two anchors, smallest first, and the stitching layers between them.

    Args:
        task: decides the released names.
        depths, widths: of the anchors.
        rank: of the low-rank updates of the stitching layers; 0 without.
        patches: for which there are position embeddings.
        grid: height and width in patches; None if the file does not tell.
        position_bias: whether each block has a table of relative positions.
    """

    task: Task
    depths: tuple[int, int]
    widths: tuple[int, int]
    rank: int
    patches: int
    grid: Grid | None
    position_bias: bool

    def __str__(self) -> str:
        grid = f"{self.patches} patches" if self.grid is None else f"{_product(self.grid)} patches"
        return (
            f"{self.task}, 2 anchors: depths {self.depths[0]} and {self.depths[1]}, widths {self.widths[0]} and "
            f"{self.widths[1]}, rank {self.rank}, {grid}, {'with' if self.position_bias else 'without'} relative "
            "position bias"
        )


@dataclass(frozen=True)
class SNNetV2Conversion(Conversion):
    """A :class:`Conversion` of an SN-Netv2 checkpoint.

    Args:
        structure: of the checkpoint.
        unmerged: the number of stitching layers whose low-rank update was subtracted from their weight.
    """

    structure: Structure
    unmerged: int


@dataclass(frozen=True)
class SymbolicRenaming(Renaming):
    """A renaming with the tensor's shape in symbols."""

    shape: str


def convert_snnetv2(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    merged: bool = False,
    config: str | os.PathLike[str] | None = None,
) -> SNNetV2Conversion:
    """Convert a released segmentation or classification checkpoint to one of ours.

    Args:
        source: the checkpoint to read, its weights at the top or under ``state_dict``, ``model`` or ``module``.
        target: the file to write: ``.safetensors``, or ``.pth`` or ``.pt`` with the weights under ``state_dict``. It
            is written as a whole, and only if nothing fails.
        merged: see :func:`to_mmsnnet`.
        config: a config whose model the weights must fit.

    Raises:
        FileNotFoundError: there is no such source or config.
        OSError: the target cannot be written.
        ValueError: the source cannot be read or is no such checkpoint; tensors are missing, left over or of another
            shape; or the weights do not fit the config's model.
    """
    source, target = os.fspath(source), Path(target)
    check_files(source, target)
    model = None if config is None else build_without_weights(load_config(config))
    weights, meta = read_released(source)
    try:
        conversion = to_mmsnnet(weights, merged, None if model is None else _grid_of(model))
    except ValueError as error:
        raise DataError(f"checkpoint {source!r}: {error}") from error
    if model is not None:
        check_weights(model, conversion.weights, source)
    write_converted(target, conversion.weights, meta)
    return conversion


def to_mmsnnet(weights: Mapping[str, Tensor], merged: bool = False, grid: Grid | None = None) -> SNNetV2Conversion:
    """Rename released weights to our names.

    Args:
        weights: of a segmentation model (``backbone.anchors.0...``, heads under mmseg's names) or of a classification
            model (``anchors.0...``).
        merged: the model was saved in evaluation mode, so that the weight of each stitching layer includes
            ``(alpha / rank) * B A``, which is subtracted. The weights do not tell. alpha is 1, as published.
        grid: the expected height and width in patches.

    Raises:
        ValueError: names are missing or left over, shapes do not match, or indices of relative positions have another
            order than ours; the message lists them.
    """
    task = _task(weights)
    heads = {key: value for key, value in weights.items() if task == "segmentation" and key.startswith(HEADS)}
    depths = _depths(RELEASED[task], weights)
    low_rank = any(key.endswith((".lora_A", ".lora_B")) for key in weights)
    tables = any(key.endswith((BIAS_TABLE, INDEX.rpartition(".")[2])) for key in weights)
    renamings = list(_renamings(task, depths, low_rank, tables and task == "segmentation"))
    indices = [INDEX.format(a=anchor, i=i) for anchor, depth in enumerate(depths) for i in range(depth)]
    if not any(key in weights for key in indices):
        indices = []  # buffers, which a program may leave out of its checkpoints
    symbols = {renaming.released: renaming.shape for renaming in renamings} | dict.fromkeys(indices, "M M")
    saved = {key: shape for key, shape in tensor_shapes(weights).items() if key not in heads}
    saved |= {key: tuple(weights[key].shape) for key in indices if key in weights}
    sizes = _sizes(symbols, saved)
    if wrong := describe_mismatch(saved, {key: _numbers(shape, sizes) for key, shape in symbols.items()}):
        raise DataError(wrong)
    patch_grid = _grid(sizes, {key: weights[key] for key in indices}, grid)
    structure = Structure(
        task, depths, (sizes["C0"], sizes["C1"]), sizes.get("R", 0), sizes["N"], patch_grid, position_bias="T" in sizes
    )
    converted = {renaming.ours: weights[renaming.released] for renaming in renamings}
    unmerged = _subtract_updates(converted, structure.rank) if merged else 0
    converted[f"backbone.{DRAWS}"] = torch.tensor(0)
    added = {f"backbone.{DRAWS}": 1}
    if patch_grid is not None:
        converted |= {GRIDS.format(a=anchor): torch.tensor(patch_grid) for anchor in (0, 1)}
        added[GRIDS] = 2
    mapped = Counter(renaming.patterns for renaming in renamings)
    mapped.update((pattern, pattern) for pattern in (f"{key.partition('.')[0]}.*" for key in heads))
    dropped = {INDEX: len(indices)} if indices else {}
    return SNNetV2Conversion(converted | heads, mapped, dropped, added, structure, unmerged)


def _task(weights: Mapping[str, Tensor]) -> Task:
    """The task whose released names most of the weights have."""
    counts = {task: sum(bool(pattern.match(key)) for key in weights) for task, pattern in RELEASED.items()}
    task = max(counts, key=lambda task: counts[task])
    if not counts[task]:
        raise DataError(
            "no stitched model: expected names like backbone.anchors.0.cls_token (segmentation) or anchors.0.cls_token "
            f"(classification); got {join_names(list(weights), 4)}"
        )
    return task


def _depths(pattern: re.Pattern[str], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """The depths of the anchors, from the highest number of a block with more than one tensor."""
    matches = (match for key in weights if (match := pattern.match(key)) and match[2])
    sizes = Counter((int(match[1]), int(match[2])) for match in matches)
    depths = {anchor: block + 1 for anchor, block in sorted(key for key, size in sizes.items() if size > 1)}
    if set(depths) != {0, 1}:
        numbers = ", ".join(map(str, depths)) or "none"
        raise DataError(f"expected blocks of two anchors, 0 and 1; found blocks of {len(depths)}: {numbers}")
    if depths[1] % depths[0]:
        raise DataError(
            f"expected a depth of anchor 1 that is a multiple of anchor 0's; found {depths[1]} and {depths[0]} blocks"
        )
    return depths[0], depths[1]


def _renamings(task: Task, depths: tuple[int, int], low_rank: bool, tables: bool) -> Iterator[SymbolicRenaming]:
    """Every tensor that the released file and our checkpoint both have."""
    prefix, renamed = PREFIX[task], RENAMED[task]
    part = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, renamed))})(?=\.|$)")
    block = BLOCK | (TABLE if tables else {})
    for anchor, depth in enumerate(depths):
        repeated = [(name, shape, 1) for name, shape in STEM.items()]
        repeated += [(f"blocks.{{i}}.{name}", shape, depth) for name, shape in block.items()]
        repeated += [(name, shape, 1) for name, shape in (CLASSIFIER.items() if task == "classification" else ())]
        for name, shape, count in repeated:
            ours = f"backbone.network.anchors.{{a}}.model.{name}"
            released = f"{prefix}anchors.{{a}}." + part.sub(lambda match: renamed[match[0]], name)
            shape = re.sub(r"[CFA]", rf"\g<0>{anchor}", shape)
            for i in range(count):
                yield SymbolicRenaming(
                    released.format(a=anchor, i=i), ours.format(a=anchor, i=i), (released, ours), shape
                )
    parts = LAYER | (LOW_RANK if low_rank else {})
    layers = StitchSpace.two_way(depths).layers
    for source in (0, 1):
        for i, key in enumerate(key for key in layers if key.source == source):
            for name, shape in parts.items():
                released = f"{prefix}stitch_layers.{source}.{{i}}.transform.{name}"
                patterns = (released, f"backbone.network.layers.{source}_{{j}}-{1 - source}_{{k}}.{name}")
                shape = shape.replace("out", f"C{key.target}").replace("in", f"C{key.source}")
                yield SymbolicRenaming(released.format(i=i), f"backbone.network.layers.{key}.{name}", patterns, shape)


def _sizes(symbols: Mapping[str, str], tensor_shapes: Mapping[str, Any]) -> dict[str, int]:
    """The number for each symbol of the shapes: the one that most of the tensors have."""
    votes: dict[str, Counter[int]] = {}
    for key, named in symbols.items():
        shape = tensor_shapes.get(key, ())
        if isinstance(shape, tuple) and len(named.split()) == len(shape):
            for symbol, size in zip(named.split(), shape, strict=True):
                if not symbol[0].isdigit():
                    votes.setdefault(symbol, Counter())[size] += 1
    return {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}


def _numbers(symbols: str, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """A shape in numbers; a symbol without a number stays."""

    def number(symbol: str) -> int | str:
        name = symbol.lstrip("0123456789")
        factor = int(symbol.removesuffix(name) or 1)
        return factor if not name else factor * sizes[name] if name in sizes else symbol

    return tuple(number(symbol) for symbol in symbols.split())


def _grid(sizes: Mapping[str, int], indices: Mapping[str, Tensor], expected: Grid | None) -> Grid | None:
    """Height and width of the patches, from the tables of relative positions or the expected grid.

    Without either a square number of patches is a square. Of two grids with as many patches and rows of a table, the
    indices tell the right one.
    """
    patches, rows = sizes["N"], sizes.get("T")
    candidates = [(side, patches // side) for side in range(1, patches + 1) if patches % side == 0]
    if rows is not None:
        candidates = [grid for grid in candidates if (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 == rows]
        if not candidates:
            raise DataError(
                f"position embeddings for {patches} patches do not match relative position tables of {rows} rows: a "
                "grid of h x w patches has (2h - 1)(2w - 1) + 3"
            )
        candidates = [g for g in candidates if any(_equal(i, _index(g)) for i in indices.values())] or candidates
    if expected is not None and tuple(expected) not in candidates:
        names = " or ".join(map(_product, candidates)) if rows is not None else str(patches)
        raise SettingError(
            f"the weights are for {names} patches, the config's model for {_product(expected)}: set the backbone's "
            "img_size"
        )
    if rows is None:
        side = math.isqrt(patches)
        return expected or ((side, side) if side * side == patches else None)
    if expected is None and len(candidates) > 1 and not indices:
        raise SettingError(
            f"the weights do not tell whether they are for {' or '.join(map(_product, candidates))} patches: set "
            "--config to the model's config"
        )
    grid = candidates[0] if expected is None else expected
    if disordered := [key for key, index in indices.items() if not _equal(index, _index(grid))]:
        raise DataError("these indices of relative positions have another order than BEiT's: " + join_names(disordered))
    return grid


def _index(grid: Grid) -> Tensor:
    return position_index(grid, 1, torch.device("cpu"))


def _equal(index: Tensor, ours: Tensor) -> bool:
    return index.shape == ours.shape and not index.is_floating_point() and bool((index == ours).all())


def _subtract_updates(weights: Weights, rank: int) -> int:
    """Subtract the low-rank update from the weight of each stitching layer; return their number."""
    layers = [key.removesuffix("lora_A") for key in weights if key.endswith(".lora_A")]
    if not layers:
        raise SettingError("--merged: the weights have no low-rank updates (lora_A, lora_B) to subtract")
    for layer in layers:
        update = weights[f"{layer}lora_B"].double() @ weights[f"{layer}lora_A"].double()
        weight = weights[f"{layer}weight"]
        weights[f"{layer}weight"] = (weight.double() - update / rank).to(weight.dtype)
    return len(layers)


def _grid_of(model: nn.Module) -> Grid:
    backbone = find_stitched_backbone(model)
    return backbone.network.anchor(-1).geometry(backbone.img_size)[0].grid


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
