"""Pretrained weights of anchors: read from wherever they are, resampled to the anchor's sizes, and reported."""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from mmsnnet.stitching.anchors import CLASSIFIER_MODULES, Anchor
from mmsnnet.stitching.attention import BIAS_TABLE, resize_table


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did: where the weights came from, which keys were resized to the anchor's patch and
    input size, which of the file's keys an anchor has no use for (its classifier, or one for another number of
    classes), and which parts of the anchor the file has nothing for and which stay as they were (the tables of a
    relative position bias; a head for another number of classes)."""

    source: str
    loaded: int
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"{self.source}: {self.loaded} tensors loaded"
        if self.resized:
            text += f", resized: {', '.join(self.resized)}"
        if self.left_out:
            text += f", left out: {', '.join(self.left_out)}"
        if self.kept:
            text += f", not in the file and kept as initialised: {_listed(list(self.kept))}"
        return text


def load_pretrained(anchor: Anchor, source: str | os.PathLike[str] | bool) -> LoadReport:
    """Loads pretrained weights into an anchor, its position embedding resampled to the anchor's input size.

    Args:
        anchor: the anchor to fill.
        source: a path (``.safetensors`` or what ``torch.save`` wrote), a URL, ``hf-hub:owner/name``, or True for the
            weights that timm publishes for the model. A checkpoint of a :class:`StitchedNetwork` with one anchor works
            too. Files are read with ``weights_only=True``.

    A position embedding, like the tables of a relative position bias, is taken for one of a square grid, unless it is
    of a one-anchor checkpoint and has the anchor's number of tokens. Where the file has no such tables, the anchor's
    stay at zero. A head for another number of classes than the anchor's is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or holds another architecture (missing, unexpected and mismatching keys
            are listed). The anchor is then left as it was.
    """
    if isinstance(source, os.PathLike):
        source = os.fspath(source)
    state_dict, same_grid = _unwrap(_read(anchor, source), source)
    filtered = _in_timm_names(anchor, state_dict, same_grid, source)
    wanted = anchor.model.state_dict()
    kept = _kept(filtered, wanted)
    left_out = [
        key for key in filtered if key.split(".")[0] in CLASSIFIER_MODULES and (key not in wanted or key in kept)
    ]
    wanted = {key: value for key, value in wanted.items() if key not in kept}
    missing = [key for key in wanted if key not in filtered]
    unexpected = [key for key in filtered if key not in wanted and key not in left_out]
    mismatched = [
        f"{key} ({_shape(filtered[key])} in the file, {_shape(wanted[key])} in the anchor)"
        for key in wanted
        if key in filtered and _shape(filtered[key]) != _shape(wanted[key])
    ]
    problems = dict(missing=missing, unexpected=unexpected, mismatched=mismatched)
    if any(problems.values()):
        listing = "; ".join(f"{what}: {_listed(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(
            f"pretrained={source!r} does not fit this anchor ({anchor.depth} blocks, width {anchor.width}). {listing}"
        )
    resized = [key for key in wanted if key in state_dict and not torch.equal(state_dict[key], filtered[key])]
    anchor.model.load_state_dict({key: filtered[key] for key in wanted}, strict=False)
    return LoadReport(str(source), len(wanted), tuple(resized), tuple(left_out), tuple(kept))


def _kept(filtered: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What of an anchor stays as it is initialised: bias tables, where the file has none at all, and a head whose
    number of classes is not the file's."""
    tables = [key for key in wanted if key.endswith(BIAS_TABLE)]
    kept = [] if any(key in filtered for key in tables) else tables
    for head in ("head", "head_dist"):
        weight = f"{head}.weight"
        if weight in wanted and weight in filtered and len(wanted[weight]) != len(filtered[weight]):
            kept += [key for key in wanted if key.startswith(f"{head}.")]
    return kept


def _read(anchor: Anchor, source: str | bool) -> Mapping[str, Any]:
    if source is True:
        cfg = anchor.model.pretrained_cfg
        source = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get("hf_hub_id") else cfg.get("url") or ""
        if not source:
            raise ValueError("timm publishes no weights for this anchor: give pretrained a path or a URL")
    if not isinstance(source, str):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    path = Path(source).expanduser()
    remote = re.match(r"hf-hub:|https?://", source)
    if not remote and not path.is_file():
        raise FileNotFoundError(f"pretrained={source!r}: there is no such file (working folder {Path.cwd()})")
    try:
        if remote and remote[0] == "hf-hub:":
            return load_state_dict_from_hf(source.removeprefix("hf-hub:"), weights_only=True)
        if remote:
            return torch.hub.load_state_dict_from_url(source, map_location="cpu", weights_only=True)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"pretrained={source!r} is refused: it is cut short, or holds Python objects beside weights, and those "
            f"could run code ({_first_line(error)})"
        ) from error
    except Exception as error:  # a damaged file, like a failed download, makes the readers raise almost anything
        cause = "it cannot be fetched, is cut short" if remote else "it is cut short"
        raise ValueError(
            f"pretrained={source!r} cannot be read: {cause} or no checkpoint ({_first_line(error)})"
        ) from error


def _unwrap(file: Any, source: str | bool) -> tuple[dict[str, Tensor], bool]:
    """The weights out of their wrapper, and out of a stitched network with one anchor. Also whether they come from such
    a network: then the position embedding is for the grid that the anchor has, if the numbers agree."""
    for wrapper in ("state_dict", "model"):
        if isinstance(file, Mapping) and isinstance(file.get(wrapper), Mapping):
            file = file[wrapper]
    if not isinstance(file, Mapping) or not file or not all(isinstance(key, str) for key in file):
        raise ValueError(f"pretrained={source!r} holds no state dict")
    inside = {key: match for key in file if (match := re.match(r"(?:.*\.)?anchors\.(\d+)\.model\.", key))}
    indices = {match[1] for match in inside.values()}
    if len(indices) > 1:
        raise ValueError(
            f"pretrained={source!r} holds {len(indices)} anchors: an anchor's weights come from a checkpoint of one"
        )
    if inside:
        return {key[match.end() :]: file[key] for key, match in inside.items()}, True
    return dict(file), False


def _in_timm_names(
    anchor: Anchor, state_dict: dict[str, Tensor], same_grid: bool, source: str | bool
) -> dict[str, Tensor]:
    """The weights under timm's names, those that depend on patch or input size resampled to the anchor's.

    timm's filter does it but for a position embedding of as many tokens on another grid, which it cannot tell apart.
    """
    model = anchor.model
    # Files of DINOv2, known by their mask token, are renamed by the filter as a whole.
    position = None if "mask_token" in state_dict else state_dict.get("pos_embed")
    apart = {key: value for key, value in state_dict.items() if key.endswith(BIAS_TABLE)}
    others = {
        key: value for key, value in state_dict.items() if key not in apart and (position is None or key != "pos_embed")
    }
    try:
        filtered = checkpoint_filter_fn(others, model, adapt_layer_scale=True)
    except (RuntimeError, AttributeError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"pretrained={source!r} is of another architecture ({_first_line(error)})") from error
    if isinstance(position, Tensor) and model.pos_embed is not None and position.ndim == 3:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        side = math.isqrt(max(position.shape[1] - prefix, 0))
        known = same_grid and position.shape == model.pos_embed.shape
        if not known and side and side**2 == position.shape[1] - prefix:
            grid = list(model.patch_embed.grid_size)
            position = resample_abs_pos_embed(position, new_size=grid, old_size=[side, side], num_prefix_tokens=prefix)
    if position is not None:
        filtered["pos_embed"] = position
    return filtered | {key: _in_anchors_grid(model, key, table, same_grid) for key, table in apart.items()}


def _in_anchors_grid(model: VisionTransformer, key: str, table: Tensor, same_grid: bool) -> Tensor:
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


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _listed(keys: list[str], most: int = 8) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more
