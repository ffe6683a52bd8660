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
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mmsnnet.stitching.anchors import CLASSIFIER_MODULES, Anchor
from mmsnnet.stitching.attention import BIAS_TABLE, resize_table
from mmsnnet.stitching.checkpoint import SafeGlobal, listed, misfits, read_checkpoint, shapes, unwrapped

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

    A position embedding, like the tables of a relative position bias, is taken for one of a square grid, unless it is
    of a one-anchor checkpoint and has the anchor's number of tokens. Where the file has no such tables, the anchor's
    stay at zero. A head for another number of classes than the anchor's is left out; where the file has no head, or no
    norm of pooled tokens, an anchor with a classifier keeps its own.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        ValueError: the file cannot be read, or holds another architecture (missing, unexpected and mismatching keys
            are listed), or timm publishes no weights for the model. The anchor is then left as it was.
    """
    if source is True:
        source = _timm_source(anchor.model)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    source = os.fspath(source)
    state_dict, same_grid = _unwrap(read_checkpoint(source, safe_globals), source)
    named = _in_timm_names(anchor, state_dict, source)
    filtered = _in_anchors_size(anchor, named, same_grid)
    wanted = anchor.model.state_dict()
    kept = _kept(filtered, wanted)
    wanted = {key: value for key, value in wanted.items() if key not in kept}
    given = {key: value for key, value in filtered.items() if key in wanted or not _of_no_use(key)}
    if wrong := misfits(shapes(given), shapes(wanted)):
        raise ValueError(
            f"pretrained={source!r} does not fit this anchor ({anchor.depth} blocks, width {anchor.width}). {wrong}"
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


def _unwrap(file: Mapping[str, Any], source: str) -> tuple[dict[str, Tensor], bool]:
    """The weights out of their wrapper, and out of a stitched network with one anchor. Also whether they come from such
    a network: then the position embedding is for the grid that the anchor has, if the numbers agree."""
    weights = clean_state_dict(_apart(unwrapped(file, f"pretrained={source!r}")))
    inside = {key: match for key in weights if (match := re.match(r"(?:.*\.)?anchors\.(\d+)\.model\.", key))}
    indices = {match[1] for match in inside.values()}
    if len(indices) > 1:
        raise ValueError(
            f"pretrained={source!r} holds {len(indices)} anchors: an anchor's weights come from a checkpoint of one"
        )
    if inside:
        return {key[match.end() :]: weights[key] for key, match in inside.items()}, True
    return weights, False


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


def _in_anchors_size(anchor: Anchor, named: Mapping[str, Tensor], same_grid: bool) -> dict[str, Tensor]:
    """The weights with position embedding and bias tables resampled to the anchor's input size."""
    sized = dict(named)
    if anchor.model.pos_embed is not None and "pos_embed" in named:
        sized["pos_embed"] = _in_anchors_grid(anchor.model, named["pos_embed"], same_grid)
    for key in named:
        if key.endswith(BIAS_TABLE):
            sized[key] = _table_in_anchors_grid(anchor.model, key, named[key], same_grid)
    return sized


def _in_anchors_grid(model: VisionTransformer | Eva, position: Tensor, same_grid: bool) -> Tensor:
    """A position embedding (1, N, C), resampled from a square grid to that of the model."""
    own, grid = model.pos_embed, model.patch_embed.grid_size
    if not isinstance(position, Tensor) or position.shape[::2] != own.shape[::2]:
        return position
    if same_grid and position.shape == own.shape:
        return position
    prefix = own.shape[1] - math.prod(grid)
    side = math.isqrt(max(position.shape[1] - prefix, 0))
    if not side or side**2 != position.shape[1] - prefix:
        return position
    return resample_abs_pos_embed(position, new_size=list(grid), old_size=[side, side], num_prefix_tokens=prefix)


def _table_in_anchors_grid(model: VisionTransformer | Eva, key: str, table: Tensor, same_grid: bool) -> Tensor:
    """A table of a relative position bias, resized from a square grid to that of the anchor's own table."""
    own = model.state_dict().get(key)
    if own is None or table.ndim != 2 or (same_grid and table.shape == own.shape):
        return table
    extra = 3 if model.num_prefix_tokens else 0
    odd = math.isqrt(max(len(table) - extra, 0))
    if odd % 2 == 0 or odd**2 != len(table) - extra:
        return table
    side = (odd + 1) // 2
    return resize_table(table, (side, side), model.get_submodule(key.removesuffix(f".{BIAS_TABLE}")).bias_grid)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
