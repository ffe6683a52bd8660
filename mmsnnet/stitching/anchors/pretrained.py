"""Pretrained weights of anchors: found in their file, loaded, and reported."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mmsnnet.errors import DataError, SettingError
from mmsnnet.files.reading import SafeGlobal, extract_weights, join_names, nonfinite_names, read_checkpoint
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID, POSITION
from mmsnnet.stitching.anchors.weight_fitting import MOST_NAMES, PATCH_WEIGHT, FittedWeights, fit
from mmsnnet.stitching.anchors.weight_sections import ANCHOR_MODEL, MOST_DICTS, Section, anchors_in, find_sections


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_pretrained` did.

    Attributes:
        source: where the weights came from.
        loaded: how many of the anchor's tensors were loaded.
        resized: the anchor's tensors that were resized to its patch and input size.
        left_out: the file's tensors that the anchor has no use for: a classifier that it does not keep, or one for
            another number of classes; a text tower, a decoder, a mask token.
        kept: the anchor's tensors that the file has nothing for and that stay as they were: the tables of a relative
            position bias, a head.
        under: where in the file the weights were: the keys of dicts, then the prefix of the names.
        library: whose names the file has; empty for names that timm knows.
        adapted: the channels of the patch embedding in the file and in the anchor, where they differ.
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
            text += f", {PATCH_WEIGHT} adapted from {self.adapted[0]} to {self.adapted[1]} channels"
        if self.resized:
            text += f", resized: {join_names(self.resized)}"
        if self.left_out:
            text += f", left out: {join_names(self.left_out)}"
        if self.kept:
            text += f", not in the file and kept as initialised: {join_names(self.kept)}"
        return text


def load_pretrained(
    anchor: PlainAnchor,
    source: str | os.PathLike[str] | bool,
    safe_globals: Iterable[SafeGlobal] = (),
    prefix: str | None = None,
) -> LoadReport:
    """Load pretrained weights into an anchor, resampled to its patch and input size.

    The weights may lie in dicts within the file, and below a prefix that their names have. The names are timm's, those
    that timm's filter for the class of the model knows (OpenCLIP's, DINOv2's and DINOv3's, EVA-02's, DeiT-III's, ...),
    or those of a library in :mod:`mmsnnet.stitching.anchors.foreign_names`. A checkpoint of a
    :class:`StitchedNetwork` with one anchor works too.

    A position embedding, like the tables of a relative position bias, is for the grid that a one-anchor checkpoint
    records. Where none is recorded, it is taken for one of a square grid if its size allows, else for one of the
    anchor's grid. Where the file has no such tables, the anchor's stay at zero. A head for another number of classes
    than the anchor's is left out; where the file has no head, or no norm of pooled tokens, an anchor with a classifier
    keeps its own. A patch embedding of three channels is adapted to the anchor's number as timm does it.

    Args:
        anchor: the anchor to fill.
        source: what :func:`read_checkpoint` reads (a path, a URL, ``hf-hub:owner/name``), or True for the weights that
            timm publishes for the model.
        safe_globals: as of :func:`read_checkpoint`.
        prefix: chooses one of several models in a file: ``teacher.backbone.``, the keys of dicts and the prefix of
            names joined by dots, or a part of it. An empty one stands for the names at the root of the file.

    Raises:
        FileNotFoundError: there is no such file, or it cannot be fetched.
        DataError: the file cannot be read, holds another architecture, does not tell its grid, or has NaN or infinity
            in a tensor. The anchor is left as it was.
        SettingError: the file holds the model several times with different weights, or nothing under ``prefix``; or
            timm publishes no weights for the model.
    """
    if source is True:
        source = _timm_source(anchor.model)
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"pretrained is a path, a URL, 'hf-hub:owner/name' or True, got {source!r}")
    source = os.fspath(source)
    where = f"pretrained={source!r}"
    file = read_checkpoint(source, safe_globals)
    own = anchor.model.state_dict()
    # Files split and join tensors, and lack a classifier. A third of the model tells where one of another depth lies.
    sections = find_sections(file, least=len(own) // 3)
    if not sections:
        extract_weights(file, where)  # says what the file has in the place of weights
        raise DataError(f"{where} holds no weights by name, as deep as it was looked into ({MOST_DICTS} dicts)")
    addresses = {section.address for section in _under(prefix, sections, where)}
    fits = _fit_each(anchor, own, sections)
    fitted = _choose([one for one in fits if one.section.address in addresses], prefix, where)
    _check_grid(fitted, where)
    if lost := fitted.lost_biases:
        raise SettingError(
            f"{where} does not fit this anchor, whose attention has no bias on queries and values: "
            f"{_few(lost)}. Set qkv_bias=True for it, or choose its model whose name ends with _qkvb"
        )
    loaded = fitted.loaded
    if bad := nonfinite_names(loaded):
        raise DataError(
            f"{where} has NaN or infinity in {_few(bad)}. The run that wrote it has diverged, or the file is damaged: "
            "take an earlier checkpoint"
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
    raise SettingError(
        f"pretrained=True: timm publishes no weights for {'.'.join(filter(None, (name, config.get('tag'))))}; give a "
        "path or a URL" + (f", or choose the model with a tag that has some: {', '.join(tagged)}" if tagged else "")
    )


def _under(prefix: str | None, sections: Sequence[Section], where: str) -> list[Section]:
    """The sections that a prefix leaves to choose from."""
    if prefix is None:
        for section in sections:
            if len(anchors := anchors_in(section)) > 1:
                raise DataError(
                    f"{where} holds {len(anchors)} anchors: an anchor's weights come from a checkpoint of one, or from "
                    f"that which prefix='anchors.{min(anchors)}.' (...) chooses"
                )
        return list(sections)
    address = _address(prefix)
    found = [one for one in sections if one.address == address or (address and f".{address}" in f".{one.address}")]
    if not found:
        places = [repr(one.address) for one in sections if one.address] or ["no prefix"]
        raise SettingError(f"{where} has no model under prefix={prefix!r}; it has weights under {_few(places)}")
    return found


def _address(prefix: str) -> str:
    return prefix if prefix.endswith(".") or not prefix else f"{prefix}."


def _fit_each(anchor: PlainAnchor, own: Mapping[str, Tensor], sections: Sequence[Section]) -> list[FittedWeights]:
    """Fit each section.

    A section that holds a model, and another one below ``ema.``, fits when the other one is taken out of it.
    """
    fits = [fit(anchor, own, section) for section in sections]
    whole = [one.section for one in fits if not one.refusal]
    for index, one in enumerate(fits):
        rest = one.section
        for part in whole if one.refusal else ():
            if part.lies_in(one.section):
                rest = rest.without(part)
        if rest is not one.section and not (alone := fit(anchor, own, rest)).refusal:
            fits[index] = alone
    return fits


def _choose(candidates: Sequence[FittedWeights], prefix: str | None, where: str) -> FittedWeights:
    """The candidate that fits.

    Raises:
        DataError: none does; the message is about the one with the most names of the anchor.
        SettingError: several do, with different weights.
    """
    fitting = [one for one in candidates if not one.refusal]
    if not fitting:
        nearest = max(candidates, key=lambda one: (one.matching, len(one.in_file)))
        address = nearest.section.address
        raise DataError(f"{where}{f' (under {address!r})' if address else ''} {nearest.refusal}")
    if prefix is not None:
        fitting = [one for one in fitting if one.section.address == _address(prefix)] or fitting
    models: list[list[FittedWeights]] = []
    for one in fitting:
        alike = next((model for model in models if _same_weights(model[0], one)), None)
        if alike is not None:
            alike.append(one)
        elif len(models) <= MOST_NAMES:  # more are not listed, and comparing each with each would take long
            models.append([one])
    if len(models) > 1:
        addresses = [max((one.section.address for one in model), key=len) for model in models]
        raise SettingError(
            f"{where} holds the model more than once, with different weights: under {_few(map(repr, addresses))}. "
            f"Choose one: pretrained=dict(source=..., prefix={addresses[0]!r}) in a config, "
            f"load_pretrained(..., prefix={addresses[0]!r}) in Python"
        )
    return max(models[0], key=lambda one: len(one.names))


def _same_weights(one: FittedWeights, other: FittedWeights) -> bool:
    ours, theirs = one.loaded, other.loaded
    pairs = [(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()]
    # NaN equals NaN here: such a file is refused for it, not for holding two models.
    return all(
        a is b or (a.dtype == b.dtype and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)) for a, b in pairs
    )


def _check_grid(fitted: FittedWeights, where: str) -> None:
    """Refuse a recorded grid that is none, or not that of the position embedding."""
    prefix = fitted.section.prefix
    if fitted.grid is None and fitted.section.grid is not None and ANCHOR_MODEL.fullmatch(prefix):
        raise DataError(
            f"{where} has {prefix.removesuffix('model.')}{GRID} that is no grid: the height and width in patches, two "
            "whole numbers"
        )
    if fitted.grid is not None and POSITION in fitted.of_unknown_grid:
        raise DataError(
            f"{where} says that it is for {fitted.grid[0]} x {fitted.grid[1]} patches, which is not the size of its "
            f"{POSITION}, {tuple(fitted.named[POSITION].shape)}"
        )


def _few(names: Iterable[str]) -> str:
    return join_names(list(names), MOST_NAMES)
