"""The checkpoints that SN-Netv2 (arXiv 2307.00154) released, from their names to ours and back.

What a checkpoint holds is read off its names and shapes alone. Nothing is skipped: a tensor that is missing, left over
or of another shape than the others imply is an error that lists it.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from mmsnnet.apis.config import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.files.reading import describe_mismatch, extract_weights, join_names, tensor_shapes
from mmsnnet.files.writing import write_atomically
from mmsnnet.models import check_weights, find_stitched_backbone, read_model_checkpoint
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.stitching import StitchSpace
from mmsnnet.stitching.anchors.attention import BIAS_TABLE, position_index
from mmsnnet.stitching.anchors.base import GRID, recorded_grid
from mmsnnet.stitching.windows import Grid
from mmsnnet.version import __version__

Kind = Literal["segmentation", "classification"]
Weights = dict[str, Tensor]

# Our names, with the shape of each tensor in symbols. Both anchors have the same I channels, P x Q patches, N of them,
# K classes and T rows of a bias table, but each has a width C, a width F of its MLPs and A heads; R is the rank.
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

# The parts of those names that the released files call otherwise.
RENAMED: dict[Kind, dict[str, str]] = {
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
PREFIX: dict[Kind, str] = {"segmentation": "backbone.", "classification": ""}
INDEX = "attn.relative_position_index"
GRIDS = "backbone.network.anchors.{a}." + GRID
HEADS = ("decode_head.", "auxiliary_head.")

OURS = re.compile(r"backbone\.network\.anchors\.(\d+)\.model\.(?:blocks\.(\d+)\.|(?:norm|head)\.|)")
RELEASED: dict[Kind, re.Pattern[str]] = {
    "segmentation": re.compile(r"backbone\.anchors\.(\d+)\.(?:layers\.(\d+)\.)?"),
    "classification": re.compile(r"anchors\.(\d+)\.(?:blocks\.(\d+)\.)?"),
}
SUFFIXES = (".pth", ".pt", ".safetensors")


@dataclass(frozen=True)
class Structure:
    """What a checkpoint holds: two anchors of these ``depths`` and ``widths``, smallest first, joined by stitching
    layers of this ``rank`` (0: without low-rank updates), with position embeddings for so many ``patches``.

    ``grid`` is their height and width, None where the file does not tell; ``position_bias`` whether each block has a
    table of relative positions.
    """

    kind: Kind
    depths: tuple[int, int]
    widths: tuple[int, int]
    rank: int
    patches: int
    grid: Grid | None
    position_bias: bool

    def __str__(self) -> str:
        grid = f"{self.patches} patches" if self.grid is None else f"{self.grid[0]} x {self.grid[1]} patches"
        return (
            f"{self.kind}, 2 anchors: depths {self.depths[0]} and {self.depths[1]}, widths {self.widths[0]} and "
            f"{self.widths[1]}, rank {self.rank}, {grid}, {'with' if self.position_bias else 'without'} relative "
            "position bias"
        )


@dataclass(frozen=True)
class Conversion:
    """Converted ``weights``, and how they came about.

    ``mapped`` has the number of tensors for each pair of patterns (name in the source, name in the result); ``dropped``
    those of the source, ``made`` those of the result that the other side has no place for; ``unmerged`` the number of
    stitching layers whose update was taken out of their weight.
    """

    structure: Structure
    weights: Weights
    mapped: Mapping[tuple[str, str], int]
    dropped: Mapping[str, int]
    made: Mapping[str, int]
    unmerged: int = 0


@dataclass(frozen=True)
class _Name:
    """One tensor: its name on either side, the patterns that these follow, and its shape in symbols."""

    ours: str
    released: str
    patterns: tuple[str, str]
    shape: str


def convert_snnetv2(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    reverse: bool = False,
    merged: bool = False,
    config: str | os.PathLike[str] | None = None,
) -> Conversion:
    """Converts a released segmentation or classification checkpoint into one of ours, or back.

    Args:
        source: the checkpoint to read, its weights bare or under ``state_dict``, ``model`` or ``module``.
        target: the file to write: ``.safetensors``, or ``.pth`` or ``.pt`` with the weights under ``state_dict``
            (``model`` for the released classification models). Written only after everything else went well, as a
            whole.
        reverse: from our names to the released ones.
        merged: the released file was saved in evaluation mode; see :func:`to_mmsnnet`.
        config: a config whose model the weights must fit, name by name and shape by shape.

    Raises:
        FileNotFoundError: there is no such source or config.
        ValueError: the source cannot be read or is no such checkpoint, tensors are missing, left over or of another
            shape, or the weights do not fit the config's model.
    """
    source, target = os.fspath(source), Path(target)
    if reverse and merged:
        raise ValueError("--merged says how the released file that is read was saved; with --reverse one is written")
    if target.suffix not in SUFFIXES:
        raise ValueError(f"{str(target)!r} ends in none of {', '.join(SUFFIXES)}: give the file to write such a name")
    if target.is_dir():
        raise ValueError(f"{str(target)!r} is a folder: give the file to write")
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ValueError(f"{str(target)!r} is the source itself: give another file to write")
    model = None if config is None else build_without_weights(load_config(config))
    grid = None if model is None else _grid_of(model)
    weights, meta = _read(source)
    try:
        conversion = to_released(weights, grid) if reverse else to_mmsnnet(weights, merged, grid)
    except ValueError as error:
        raise ValueError(f"checkpoint {source!r}: {error}") from error
    if model is not None:
        check_weights(model, weights if reverse else conversion.weights, source)
    _write(target, conversion, meta, reverse)
    return conversion


def to_mmsnnet(weights: Mapping[str, Tensor], merged: bool = False, grid: Grid | None = None) -> Conversion:
    """Weights under the released names as weights of ours.

    Args:
        weights: of a segmentation model (``backbone.anchors.0...``, heads under mmseg's names) or of a classification
            model (``anchors.0...``).
        merged: they were saved in evaluation mode, so that the weight of each stitching layer already includes
            ``(alpha / rank) * B A``: it is taken out again. Weights do not tell; alpha is 1, as published.
        grid: height and width in patches, to be checked.

    Raises:
        ValueError: names are missing or left over, shapes do not go together, or indices of relative positions are in
            another order than ours; the message lists them.
    """
    naming = _naming(weights)
    if naming == "ours":
        raise ValueError("these names are mmsnnet's already; --reverse leads from them to the released ones")
    names, indices, structure, heads = _resolve(naming, weights, released=True, grid=grid)
    converted = {name.ours: weights[name.released] for name in names}
    unmerged = 0
    if merged:
        if not structure.rank:
            raise ValueError("--merged: there are no low-rank updates (lora_A, lora_B) to take out of the weights")
        for name in names:
            if name.released.endswith(".lora_A"):
                layer = name.ours.removesuffix("lora_A")
                converted[f"{layer}weight"] = _unmerged(converted, layer, structure.rank)
                unmerged += 1
    converted[f"backbone.{DRAWS}"] = torch.tensor(0)
    made = {f"backbone.{DRAWS}": 1}
    if structure.grid is not None:
        converted |= {GRIDS.format(a=anchor): torch.tensor(structure.grid) for anchor in (0, 1)}
        made[GRIDS] = 2
    return Conversion(
        structure,
        converted | heads,
        _counted([name.patterns[::-1] for name in names], heads),
        Counter(pattern for _, pattern in indices),
        made,
        unmerged,
    )


def to_released(weights: Mapping[str, Tensor], grid: Grid | None = None) -> Conversion:
    """Weights of ours under the released names. :func:`to_mmsnnet` gives them back to the bit, but for the number of
    draws so far and a grid that nothing else tells, for which the released files have no place.

    Args:
        weights: of a segmentor or of a :class:`~mmsnnet.models.StitchedClassifier` around a backbone of two anchors.
        grid: height and width in patches, to be checked; weights with relative position bias for a grid that is not
            square need it if they do not record it.

    Raises:
        ValueError: names are missing or left over, shapes do not go together, or the weights have no released form;
            the message lists or says it.
    """
    if _naming(weights) != "ours":
        raise ValueError("these are the released names already; without --reverse they are converted to mmsnnet's")
    inside = [match[0] for key in weights if (match := OURS.match(key))]
    kind: Kind = "classification" if any(part.endswith((".norm.", ".head.")) for part in inside) else "segmentation"
    records = {key: recorded_grid(weights.get(key)) for key in (GRIDS.format(a=anchor) for anchor in (0, 1))}
    grids = {one for one in records.values() if one is not None}
    if len(grids) > 1:
        raise ValueError(f"its anchors are for {' and '.join(map(_shape, sorted(grids)))} patches, which differ")
    recorded = next(iter(grids), None)
    if recorded is not None and grid is not None and tuple(grid) != recorded:
        raise ValueError(_of_another_grid(_shape(recorded), grid))
    dropped = {key: GRIDS for key, one in records.items() if one is not None}
    dropped |= {key: key for key in weights if key == f"backbone.{DRAWS}"}
    own = {key: value for key, value in weights.items() if key not in dropped}
    names, indices, structure, heads = _resolve(kind, own, released=False, grid=recorded or grid)
    converted = {name.released: weights[name.ours] for name in names}
    if structure.grid is not None and indices:
        index = _own_index(structure.grid).long()
        converted |= {key: index for key, _ in indices}
    return Conversion(
        structure,
        converted | heads,
        _counted([name.patterns for name in names], heads),
        Counter(dropped.values()),
        Counter(pattern for _, pattern in indices),
    )


def _resolve(
    kind: Kind, weights: Mapping[str, Tensor], released: bool, grid: Grid | None
) -> tuple[list[_Name], list[tuple[str, str]], Structure, Weights]:
    """The names that weights of one side must have, those of released index buffers with their pattern, what the
    weights make up, and the heads' weights. Raises ValueError where they are not what they must be."""
    heads = {key: value for key, value in weights.items() if kind == "segmentation" and key.startswith(HEADS)}
    depths = _depths(RELEASED[kind] if released else OURS, weights)
    low_rank = any(key.endswith((".lora_A", ".lora_B")) for key in weights)
    tables = kind == "segmentation" and any(key.endswith((BIAS_TABLE, INDEX)) for key in weights)
    names = list(_names(kind, depths, low_rank, tables))
    indices = list(_indices(depths)) if tables else []
    side = {name.released if released else name.ours: name.shape for name in names}
    in_file = [key for key, _ in indices if released and key in weights]
    if released and not in_file:
        indices = []  # buffers, which a program may have left out of what it saved
    side |= {key: "M M" for key, _ in indices if released}
    given = {key: shape for key, shape in tensor_shapes(weights).items() if key not in heads}
    sizes = _sizes(side, given)
    if wrong := describe_mismatch(given, {key: _implied(shape, sizes) for key, shape in side.items()}):
        raise ValueError(wrong)
    if tables:
        found = _grid_of_table(sizes["N"], sizes["T"], [weights[key] for key in in_file], grid)
        if disordered := [key for key in in_file if not _same(weights[key], _own_index(found))]:
            raise ValueError(
                "these index relative positions in another order than BEiT's, in which ours are: "
                + join_names(disordered)
            )
    elif grid is not None and math.prod(grid) != sizes["N"]:
        raise ValueError(_of_another_grid(str(sizes["N"]), grid))
    else:
        found = grid or _square(sizes["N"])
    structure = Structure(
        kind, depths, (sizes["C0"], sizes["C1"]), sizes.get("R", 0), sizes["N"], found, position_bias=tables
    )
    return names, indices, structure, heads


def _naming(weights: Mapping[str, Tensor]) -> Kind | Literal["ours"]:
    """Whose names most of the weights have."""
    counts = {naming: sum(bool(p.match(key)) for key in weights) for naming, p in (("ours", OURS), *RELEASED.items())}
    naming = max(counts, key=lambda name: counts[name])
    if not counts[naming]:
        raise ValueError(
            "no stitched model: expected names like backbone.anchors.0.cls_token (released, segmentation), "
            "anchors.0.cls_token (released, classification) or backbone.network.anchors.0.model.cls_token (mmsnnet); "
            f"got {join_names(list(weights), 4)}"
        )
    return naming


def _depths(pattern: re.Pattern[str], weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """The depths of the anchors, by the highest number of a block; a single tensor with a higher one is no block."""
    matches = (match for key in weights if (match := pattern.match(key)) and match[2])
    sizes = Counter((int(match[1]), int(match[2])) for match in matches)
    blocks = sorted(block for block, size in sizes.items() if size > 1)
    depths = {anchor: block + 1 for anchor, block in blocks}
    if set(depths) != {0, 1}:
        found = ", ".join(map(str, depths)) or "none"
        raise ValueError(f"the released models stitch two anchors, 0 and 1; here are blocks of {len(depths)}: {found}")
    if depths[1] % depths[0]:
        raise ValueError(
            f"the depth of anchor 1 is a multiple of that of anchor 0 in the released models; here are {depths[1]} "
            f"blocks and {depths[0]}"
        )
    return depths[0], depths[1]


def _names(kind: Kind, depths: tuple[int, int], low_rank: bool, tables: bool) -> Iterator[_Name]:
    """Every tensor that both sides have."""
    prefix, renamed = PREFIX[kind], RENAMED[kind]
    part = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(map(re.escape, renamed))})(?=\.|$)")
    block = BLOCK | (TABLE if tables else {})
    for anchor, depth in enumerate(depths):
        repeated = [(name, shape, 1) for name, shape in STEM.items()]
        repeated += [(f"blocks.{{i}}.{name}", shape, depth) for name, shape in block.items()]
        repeated += [(name, shape, 1) for name, shape in (CLASSIFIER.items() if kind == "classification" else ())]
        for name, shape, count in repeated:
            ours = f"backbone.network.anchors.{{a}}.model.{name}"
            theirs = f"{prefix}anchors.{{a}}." + part.sub(lambda match: renamed[match[0]], name)
            shape = re.sub(r"[CFA]", rf"\g<0>{anchor}", shape)
            for i in range(count):
                yield _Name(ours.format(a=anchor, i=i), theirs.format(a=anchor, i=i), (ours, theirs), shape)
    parts = LAYER | (LOW_RANK if low_rank else {})
    layers = StitchSpace.two_way(depths).layers
    for source in (0, 1):
        for i, key in enumerate(key for key in layers if key.source == source):
            for name, shape in parts.items():
                theirs = f"{prefix}stitch_layers.{source}.{{i}}.transform.{name}"
                patterns = (f"backbone.network.layers.{source}_{{j}}-{1 - source}_{{k}}.{name}", theirs)
                shape = shape.replace("out", f"C{key.target}").replace("in", f"C{key.source}")
                yield _Name(f"backbone.network.layers.{key}.{name}", theirs.format(i=i), patterns, shape)


def _indices(depths: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """The released index buffers, with their pattern."""
    pattern = f"backbone.anchors.{{a}}.layers.{{i}}.{INDEX}"
    for anchor, depth in enumerate(depths):
        for i in range(depth):
            yield pattern.format(a=anchor, i=i), pattern


def _sizes(symbols: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, int]:
    """What the symbols of shapes stand for, by what most of the tensors say that there are."""
    votes: dict[str, Counter[int]] = {}
    for key, named in symbols.items():
        shape = given.get(key, ())
        if len(named.split()) == len(shape):
            for symbol, size in zip(named.split(), shape, strict=True):
                if not symbol[0].isdigit():
                    votes.setdefault(symbol, Counter())[size] += 1
    return {symbol: counter.most_common(1)[0][0] for symbol, counter in votes.items()}


def _implied(symbols: str, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """A shape in numbers; a symbol that no tensor tells the size of stays."""

    def size(symbol: str) -> int | str:
        name = symbol.lstrip("0123456789")
        factor = int(symbol.removesuffix(name) or 1)
        return factor if not name else factor * sizes[name] if name in sizes else symbol

    return tuple(size(symbol) for symbol in symbols.split())


def _grid_of_table(patches: int, rows: int, indices: list[Tensor], given: Grid | None) -> Grid:
    """The height and width of which there are so many patches, and so many rows in a table of relative positions; which
    is which, the indices tell, or else who gives it."""
    fitting = [
        (side, patches // side)
        for side in range(1, patches + 1)
        if patches % side == 0 and (2 * side - 1) * (2 * patches // side - 1) + 3 == rows
    ]
    if not fitting:
        raise ValueError(
            f"position embeddings for {patches} patches do not go with relative position tables of {rows} rows: a grid "
            "of h x w patches has (2h - 1)(2w - 1) + 3"
        )
    told = [grid for grid in fitting if any(_same(index, _own_index(grid)) for index in indices)]
    fitting = told or fitting
    if given is not None and tuple(given) not in fitting:
        raise ValueError(_of_another_grid(" or ".join(map(_shape, fitting)), given))
    if given is not None:
        return given
    if len(fitting) > 1 and not indices:
        raise ValueError(
            f"the weights do not tell whether they are for {' or '.join(map(_shape, fitting))} patches: give the "
            "model's config with --config"
        )
    return fitting[0]


def _of_another_grid(patches: str, given: Grid) -> str:
    return f"the weights are for {patches} patches, the config's model for {_shape(given)}: set the backbone's img_size"


def _square(patches: int) -> Grid | None:
    side = math.isqrt(patches)
    return (side, side) if side * side == patches else None


def _own_index(grid: Grid) -> Tensor:
    return position_index(grid, 1, torch.device("cpu"))


def _same(index: Tensor, own: Tensor) -> bool:
    return index.shape == own.shape and not index.is_floating_point() and bool((index == own).all())


def _unmerged(weights: Weights, layer: str, rank: int) -> Tensor:
    weight, update = weights[f"{layer}weight"], weights[f"{layer}lora_B"].double() @ weights[f"{layer}lora_A"].double()
    return (weight.double() - update / rank).to(weight.dtype)


def _counted(patterns: list[tuple[str, str]], heads: Weights) -> dict[tuple[str, str], int]:
    passed = Counter(f"{key.split('.')[0]}.*" for key in heads)
    return {**Counter(patterns), **{(pattern, pattern): count for pattern, count in passed.items()}}


def _grid_of(model: nn.Module) -> Grid:
    backbone = find_stitched_backbone(model)
    return backbone.network.anchor(-1).grid(backbone.img_size)


def _read(source: str) -> tuple[Weights, dict[str, Any]]:
    """The weights of a checkpoint, and what it says of the data set."""
    file = read_model_checkpoint(source)
    weights = clean_state_dict(extract_weights(file, f"checkpoint {source!r}"))
    if others := [key for key, value in weights.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"checkpoint {source!r} has entries that are no tensors: {join_names(others)}")
    meta = file.get("meta")
    kept = ("dataset_meta", "CLASSES", "PALETTE")  # where mmseg looks for the classes' names and colours
    return weights, {key: meta[key] for key in kept if key in meta} if isinstance(meta, Mapping) else {}


def _write(path: Path, conversion: Conversion, meta: dict[str, Any], reverse: bool) -> None:
    if path.suffix == ".safetensors":
        # A copy of each: the format takes no two tensors that share memory, as the index of all blocks does.
        apart = {key: value.clone(memory_format=torch.contiguous_format) for key, value in conversion.weights.items()}
        write_atomically(path, safetensors.torch.save(apart, {"format": "pt"}))
        return
    file: dict[str, Any]
    if reverse and conversion.structure.kind == "classification":
        file = {"model": conversion.weights}
    else:
        file = {"state_dict": conversion.weights, "meta": meta if reverse else meta | {"mmsnnet_version": __version__}}
    buffer = io.BytesIO()
    torch.save(file, buffer)
    write_atomically(path, buffer.getbuffer())


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes)) or "a number"
