"""Load pretrained weights into an anchor, and report what was loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from mmsnnet.errors import DataError, SettingError
from mmsnnet.files.reading import SafeGlobal, extract_weights, join_names, nonfinite_names, read_checkpoint
from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.anchors.positions import GRID, POSITION
from mmsnnet.stitching.anchors.weight_fitting import MOST_NAMES, FittedWeights, fit
from mmsnnet.stitching.anchors.weight_sections import ANCHOR_MODEL, MOST_DICTS, Section, anchors_in, find_sections


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_pretrained`.

    Attributes:
        source: the path, URL or hub name of the weights.
        loaded: the number of tensors that were loaded.
        resized: the anchor's tensors that were resized to its patch and image size.
        left_out: the file's tensors that the anchor does not use: a classifier that it does not keep, or one for
            another number of classes; a text tower, a decoder, a mask token.
        kept: the anchor's tensors that the file lacks, and that stay unchanged: a head, the tables of a relative
            position bias.
        under: the place of the weights in the file: the keys of dicts, then the prefix of the names.
        library: the library whose names the file has; empty for names that timm knows.
        adapted: the channels of the patch embedding in the file and in the anchor, if they differ.
    """

    source: str
    loaded: int
    resized: tuple[str, ...]
    left_out: tuple[str, ...]
    kept: tuple[str, ...] = ()
    under: tuple[str, ...] = ()
    library: str = ""
    adapted: tuple[int, int] | None = None

    def __str__(self) -> str:
        text = f"{self.source}: {self.loaded} tensors loaded"
        if self.under:
            text += f", under {' and '.join(map(repr, self.under))}"
        if self.library:
            text += f", by the names of {self.library}"
        if self.adapted:
            text += f", the first convolution adapted from {self.adapted[0]} to {self.adapted[1]} channels"
        if self.resized:
            text += f", resized: {join_names(self.resized)}"
        if self.left_out:
            text += f", left out: {join_names(self.left_out)}"
        if self.kept:
            text += f", not in the file and kept as initialised: {join_names(self.kept)}"
        return text


def load_pretrained(
    anchor: Anchor,
    source: str | os.PathLike[str] | bool,
    safe_globals: Iterable[SafeGlobal] = (),
    prefix: str | None = None,
) -> LoadReport:
    """Load pretrained weights into an anchor, resampled to its patch and image size.

    The weights may be in nested dicts, and their names may have a prefix. The names are timm's names, names that timm's
    filter for the model's class knows (OpenCLIP, DINOv2, DINOv3, EVA-02, DeiT-III, ...), or names of a library in
    :mod:`mmsnnet.stitching.anchors.foreign_names`. A checkpoint of a :class:`StitchedNetwork` with one anchor is a
    valid file too.

    Such a checkpoint records the grid of its position embedding and relative position tables. For other files, the grid
    is a square if the size allows, else the anchor's grid. Tables that the file lacks stay at zero. A head for another
    number of classes is left out. If the file lacks a head or the norm of pooled tokens, those of the anchor stay
    unchanged. A patch embedding of three channels is adapted to the anchor's number of channels as in timm.

    Args:
        anchor: the anchor to fill.
        source: a source for :func:`read_checkpoint` (a path, a URL, ``hf-hub:owner/name``), or True for the weights
            that timm publishes for the model.
        safe_globals: as for :func:`read_checkpoint`.
        prefix: chooses one of several models in a file. It is the keys of dicts and the prefix of names joined by dots,
            ``teacher.backbone.``, or a part of it. An empty prefix stands for the root of the file.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        DataError: the file cannot be read, has another architecture or no certain grid, or has NaN or infinity in a
            tensor. The anchor stays unchanged.
        SettingError: the file has several models of different weights, or none under ``prefix``; or timm publishes no
            weights for the model.
    """
    if source is True:
        source = _timm_source(anchor.model)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    source = os.fspath(source)
    where = f"pretrained={source!r}"
    file = read_checkpoint(source, safe_globals)
    state = anchor.model.state_dict()
    # Files split and join tensors, and may lack a classifier. A third of the tensors is enough to recognise a model of
    # another depth, so that the error can name the difference.
    sections = find_sections(file, least=len(state) // 3)
    if not sections:
        extract_weights(file, where)  # raises an error that describes the content of the file
        raise DataError(f"{where} holds no weights by name in its first {MOST_DICTS} levels of nested dicts")
    addresses = {section.address for section in _under(prefix, sections, where)}
    fits = _fit_each(anchor, state, sections)
    fitted = _choose([one for one in fits if one.section.address in addresses], prefix, where)
    _check_grid(fitted, where)
    if lost := fitted.lost_biases:
        raise SettingError(
            f"{where} does not fit this anchor, whose attention has no bias for queries and values: "
            f"{join_names(lost, MOST_NAMES)}. Set qkv_bias=True, or choose the model whose name ends with _qkvb"
        )
    loaded = fitted.loaded
    if bad := nonfinite_names(loaded):
        raise DataError(
            f"{where} has NaN or infinity in {join_names(bad, MOST_NAMES)}. The run that wrote it has diverged, or the "
            "file is damaged: use an earlier checkpoint"
        )
    anchor.model.load_state_dict(loaded, strict=False)
    return LoadReport(
        source,
        len(loaded),
        fitted.resized,
        fitted.left_out,
        fitted.kept,
        under=(*fitted.section.dicts, *filter(None, [fitted.section.prefix])),
        library=fitted.library,
        adapted=fitted.adapted,
    )


def _timm_source(model: Any) -> str:
    """The source from which timm loads the weights of a model."""
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
    raise SettingError(
        f"pretrained=True: timm publishes no weights for {'.'.join(filter(None, (name, config.get('tag'))))}; give a "
        "path or a URL" + (f", or choose a tag that has weights: {', '.join(tagged)}" if tagged else "")
    )


def _under(prefix: str | None, sections: Sequence[Section], where: str) -> list[Section]:
    """The sections whose address contains the prefix; all sections if it is None."""
    if prefix is None:
        for section in sections:
            if len(anchors := anchors_in(section)) > 1:
                raise DataError(
                    f"{where} holds {len(anchors)} anchors: choose one by its index, for example "
                    f"prefix='anchors.{min(anchors)}.', or use a checkpoint of one anchor"
                )
        return list(sections)
    address = _address(prefix)
    chosen = [one for one in sections if one.address == address or (address and f".{address}" in f".{one.address}")]
    if not chosen:
        addresses = [repr(one.address) for one in sections if one.address] or ["no prefix"]
        raise SettingError(
            f"{where} has no model under prefix={prefix!r}; it has weights under {join_names(addresses, MOST_NAMES)}"
        )
    return chosen


def _address(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


def _fit_each(anchor: Anchor, state: Mapping[str, Tensor], sections: Sequence[Section]) -> list[FittedWeights]:
    """Fit each section to the anchor, whose model has the state dict ``state``."""
    fits = [fit(anchor, state, section) for section in sections]
    models = [one.section for one in fits if not one.refusal]
    for index, one in enumerate(fits):
        # A section with a model, and with a second model below a prefix such as "ema.", fits without the second one.
        rest = one.section
        for model in models if one.refusal else ():
            if model.lies_in(one.section):
                rest = rest.without(model)
        if rest is not one.section and not (refitted := fit(anchor, state, rest)).refusal:
            fits[index] = refitted
    return fits


def _choose(candidates: Sequence[FittedWeights], prefix: str | None, where: str) -> FittedWeights:
    """Choose the candidate that fits.

    Raises:
        DataError: no candidate fits; the message describes the one that shares most names with the anchor.
        SettingError: several candidates with different weights fit.
    """
    fitting = [one for one in candidates if not one.refusal]
    if not fitting:
        nearest = max(candidates, key=lambda one: (one.matching, len(one.in_file)))
        address = nearest.section.address
        raise DataError(f"{where}{f' (under {address!r})' if address else ''} {nearest.refusal}")
    if prefix is not None:
        fitting = [one for one in fitting if one.section.address == _address(prefix)] or fitting
    models: list[list[FittedWeights]] = []  # candidates with the same weights are one model
    for one in fitting:
        copies = next((model for model in models if _same_weights(model[0], one)), None)
        if copies is not None:
            copies.append(one)
        elif len(models) <= MOST_NAMES:  # the message lists no more, and comparing all pairs would take long
            models.append([one])
    if len(models) > 1:
        addresses = [max((one.section.address for one in model), key=len) for model in models]
        raise SettingError(
            f"{where} holds the model more than once, with different weights: under "
            f"{join_names(list(map(repr, addresses)), MOST_NAMES)}. Choose one: pretrained=dict(source=..., "
            f"prefix={addresses[0]!r}) in a config, load_pretrained(..., prefix={addresses[0]!r}) in Python"
        )
    return max(models[0], key=lambda one: len(one.names))


def _same_weights(one: FittedWeights, other: FittedWeights) -> bool:
    ours, theirs = one.loaded, other.loaded
    pairs = [(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    # NaN equals NaN here, so that the error for a damaged file names NaN, not a second model.
    return all(
        a is b or (a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)) for a, b in pairs
    )


def _check_grid(fitted: FittedWeights, where: str) -> None:
    """Refuse a recorded grid that is invalid or differs from the position embedding's."""
    prefix = fitted.section.prefix
    if fitted.grid is None and fitted.section.grid is not None and ANCHOR_MODEL.fullmatch(prefix):
        raise DataError(
            f"{where} has {prefix.removesuffix('model.')}{GRID} that is no grid: a grid has two whole numbers, its "
            "height and width in patches"
        )
    if fitted.grid is not None and POSITION in fitted.unknown_grid:
        raise DataError(
            f"{where} records {fitted.grid[0]} x {fitted.grid[1]} patches, but its {POSITION} has shape "
            f"{tuple(fitted.named[POSITION].shape)}"
        )
