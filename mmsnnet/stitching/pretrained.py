"""Pretrained weights of anchors: read from wherever they are, resampled to the anchor's sizes, and reported."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import clean_state_dict
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mmsnnet.stitching.anchors import CLASSIFIER_MODULES, GRID, POSITION, Anchor, recorded_grid
from mmsnnet.stitching.attention import BIAS_TABLE
from mmsnnet.stitching.checkpoint import SafeGlobal, listed, misfits, read_checkpoint, shapes, unwrapped
from mmsnnet.stitching.windows import Grid

PATCH_WEIGHT = "patch_embed.proj.weight"
# The parts of a masked autoencoder beside its encoder, which timm's filters let pass.
DECODER = "decoder_"
# What a classifier has anew when it is fine-tuned.
FINE_TUNED = ("head", "head_dist", "fc_norm")


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did: where the weights came from, which of the anchor's tensors were resized to its
    patch and input size, which keys of the file an anchor has no use for (its classifier, or one for another number of
    classes; a text tower, a decoder, a mask token), and which parts of the anchor the file has nothing for and which
    stay as they were (the tables of a relative position bias; a head)."""

    source: str
    loaded: int
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.source}: {self.loaded} tensors loaded"
        if self.resized:
            text += f", resized: {listed(self.resized)}"
        if self.left_out:
            text += f", left out: {listed(self.left_out)}"
        if self.kept:
            text += f", not in the file and kept as initialised: {listed(self.kept)}"
        return text


def load_pretrained(
    anchor: Anchor, source: str | os.PathLike[str] | bool, safe_globals: Iterable[SafeGlobal] = ()
) -> LoadReport:
    """Loads pretrained weights into an anchor, its position embedding resampled to the anchor's input size.

    Args:
        anchor: the anchor to fill.
        source: what :func:`read_checkpoint` reads (a path, a URL, ``hf-hub:owner/name``), or True for the weights that
            timm publishes for the model. The weights have timm's names or those that timm's filter for the class of
            the model knows (OpenCLIP's, DINOv2's and DINOv3's, EVA-02's, DeiT-III's, ...). A checkpoint of a
            :class:`StitchedNetwork` with one anchor works too.
        safe_globals: as of :func:`read_checkpoint`.

    A position embedding, like the tables of a relative position bias, is for the grid that a one-anchor checkpoint
    records. Where none is recorded, it is taken for one of a square grid if its size allows, else for one of the
    anchor's grid. Where the file has no such tables, the anchor's stay at zero. A head for another number of classes
    than the anchor's is left out; where the file has no head, or no norm of pooled tokens, an anchor with a classifier
    keeps its own.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        ValueError: the file cannot be read, or holds another architecture (missing, unexpected and mismatching keys
            are listed), or does not tell its grid, or timm publishes no weights for the model. The anchor is then left
            as it was.
    """
    if source is True:
        source = _timm_source(anchor.model)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    source = os.fspath(source)
    state_dict, grid = _unwrap(read_checkpoint(source, safe_globals), source)
    named = _in_timm_names(anchor, state_dict, source)
    filtered, unknown = _in_anchors_size(anchor, named, grid)
    wanted = anchor.model.state_dict()
    kept = _kept(filtered, wanted)
    wanted = {key: value for key, value in wanted.items() if key not in kept}
    given = {key: value for key, value in filtered.items() if key in wanted or not _of_no_use(key)}
    if wrong := misfits(shapes(given), shapes(wanted)):
        rest = ({key: value for key, value in weights.items() if key not in unknown} for weights in (given, wanted))
        if grid is None and not misfits(*map(shapes, rest)):
            wrong += (
                ". The file does not tell of what grid of patches these are, which is neither a square nor this "
                f"anchor's {' x '.join(map(str, anchor.stored_grid))}: load it into a model at the img_size that it "
                "was made at, and give the checkpoint of that model, which records the grid"
            )
        raise ValueError(
            f"pretrained={source!r} does not fit this anchor ({anchor.depth} blocks, width {anchor.width}). {wrong}"
        )
    if grid is not None and POSITION in unknown:
        raise ValueError(
            f"pretrained={source!r} says that it is for {grid[0]} x {grid[1]} patches, which is not the size of its "
            f"{POSITION}, {tuple(named[POSITION].shape)}"
        )
    in_file = dict(_tensors(state_dict))
    left_out = _left_out(in_file, {key: named[key] for key in wanted})
    if lost := [key for key in left_out if key.endswith("attn.qkv.bias") and _of_queries_and_values(in_file[key])]:
        raise ValueError(
            f"pretrained={source!r} does not fit this anchor, whose attention has no bias on queries and values: "
            f"{listed(lost)}. Set qkv_bias=True for it, or choose its model whose name ends with _qkvb"
        )
    resized = [key for key in wanted if filtered[key] is not named[key]]
    if PATCH_WEIGHT in wanted and _memory(named[PATCH_WEIGHT]) not in {_memory(tensor) for tensor in in_file.values()}:
        resized.append(PATCH_WEIGHT)
    loaded = {key: filtered[key] for key in wanted}
    anchor.model.load_state_dict(loaded, strict=False)
    return LoadReport(source, len(loaded), tuple(resized), tuple(left_out), tuple(kept))


def _timm_source(model: VisionTransformer | Eva) -> str:
    """Where timm loads the weights of a model from."""
    config = model.pretrained_cfg
    if config.get("file"):
        return config["file"]
    if config.get("hf_hub_id"):
        repository, _, revision = config["hf_hub_id"].partition("@")
        parts = (repository, config.get("hf_hub_filename"))
        return f"hf-hub:{'/'.join(filter(None, parts))}" + (f"@{revision}" if revision else "")
    if config.get("url"):
        return config["url"]
    name = config.get("architecture", type(model).__name__)
    tagged = timm.list_pretrained(f"{name}.*")
    raise ValueError(
        f"pretrained=True: timm publishes no weights for {'.'.join(filter(None, (name, config.get('tag'))))}; give a "
        "path or a URL" + (f", or choose the model with a tag that has some: {', '.join(tagged)}" if tagged else "")
    )


def _of_no_use(key: str) -> bool:
    return key.split(".")[0] in CLASSIFIER_MODULES or key.startswith(DECODER)


def _tensors(state_dict: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for key, value in state_dict.items():
        if isinstance(value, Tensor):
            yield key, value
        elif isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", tensor) for inner, tensor in _tensors(value))


def _left_out(in_file: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> list[str]:
    """The keys of a file nothing of which is loaded. timm's filters rename: a tensor is known by its memory, and where
    it was computed with, by its name; the patch embedding is never left out."""
    used = {_memory(tensor) for tensor in loaded.values()}
    return [
        key
        for key, tensor in in_file.items()
        if key not in loaded and _memory(tensor) not in used and not key.endswith((PATCH_WEIGHT, "conv1.weight"))
    ]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_queries_and_values(bias: Tensor) -> bool:
    """Whether a joint bias moves queries or values; DINOv3 keeps that of keys in its files, but masks it."""
    return bias.ndim != 1 or len(bias) % 3 != 0 or bool(bias.view(3, -1)[[0, 2]].any())


def _kept(filtered: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What of an anchor stays as it is initialised: bias tables, and what is new in fine-tuning, where the file has
    none at all, and a head whose number of classes is not the file's."""
    tables = [key for key in wanted if key.endswith(BIAS_TABLE)]
    kept = [] if any(key in filtered for key in tables) else tables
    for module in FINE_TUNED:
        own, weight = [key for key in wanted if key.startswith(f"{module}.")], f"{module}.weight"
        absent = not any(key.startswith(f"{module}.") for key in filtered)
        if absent or (weight in wanted and weight in filtered and len(wanted[weight]) != len(filtered[weight])):
            kept += own
    return kept


def _unwrap(file: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], Grid | None]:
    """The weights out of their wrapper, and out of a stitched network with one anchor, with the grid that it
    records."""
    weights = clean_state_dict(_apart(unwrapped(file, f"pretrained={source!r}")))
    inside = {key: match for key in weights if (match := re.match(r"(?:.*\.)?anchors\.(\d+)\.model\.", key))}
    indices = {match[1] for match in inside.values()}
    if len(indices) > 1:
        raise ValueError(
            f"pretrained={source!r} holds {len(indices)} anchors: an anchor's weights come from a checkpoint of one"
        )
    if not inside:
        return weights, None
    record = f"{next(iter(inside.values()))[0].removesuffix('model.')}{GRID}"
    grid = recorded_grid(weights.get(record))
    if grid is None and record in weights:
        raise ValueError(
            f"pretrained={source!r} has {record} that is no grid: the height and width in patches, two whole numbers"
        )
    return {key[match.end() :]: weights[key] for key, match in inside.items()}, grid


def _apart(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights of which no two have their memory in common, by which they are known when they have other names."""

    def apart(value: Any) -> Any:
        if isinstance(value, Mapping):
            return _apart(value)
        shares = isinstance(value, Tensor) and value.untyped_storage().nbytes() != value.nbytes
        return value.clone() if shares else value

    return {key: apart(value) for key, value in weights.items()}


def _in_timm_names(anchor: Anchor, state_dict: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights under timm's names, the patch embedding resampled to the anchor's patches."""
    model = anchor.model
    # From a model without a position embedding, timm's filter lets the file's pass as it is: it cannot tell apart two
    # grids of as many tokens, and takes the grid of a one-anchor checkpoint for a square.
    position, model.pos_embed = model.pos_embed, None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the filter for Eva prints what it tries in vain
            return anchor.checkpoint_filter(state_dict)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"pretrained={source!r} is of another architecture ({_first_line(error)})") from error
    finally:
        model.pos_embed = position


def _in_anchors_size(
    anchor: Anchor, named: Mapping[str, Tensor], grid: Grid | None
) -> tuple[dict[str, Tensor], set[str]]:
    """The weights with position embedding and bias tables resampled to the anchor's input size, and the names of those
    that are of no known grid; ``grid`` is the recorded one."""
    sized, unknown = dict(named), set()
    for name, own in anchor.grids().items():
        if name not in named:
            continue
        found = [one for one in _grids(name, named[name], grid, own) if anchor.is_for(name, named[name], one)]
        if found:
            sized[name] = anchor.resample(name, named[name], found[0])
        else:
            unknown.add(name)
    return sized, unknown


def _grids(name: str, tensor: Any, recorded: Grid | None, own: Grid) -> Iterator[Grid]:
    """The grids that a tensor may be for, the likeliest first; that of a table within windows is not recorded."""
    if recorded is not None:
        yield recorded
    if recorded is None or name != POSITION:
        rows = tensor.shape[-2] if isinstance(tensor, Tensor) and tensor.ndim > 1 else 0
        yield from ((side, side) for side in range(1, math.isqrt(rows) + 1))
        yield own


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
