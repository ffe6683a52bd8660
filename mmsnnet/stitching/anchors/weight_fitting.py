"""Fit weights to an anchor: translate their names, resample them, compare them with its tensors."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from timm.models import adapt_input_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mmsnnet.files.reading import describe_mismatch, join_names, tensor_shapes
from mmsnnet.stitching.anchors.attention import BIAS_TABLE
from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.anchors.foreign_names import rename
from mmsnnet.stitching.anchors.positions import POSITION, recorded_grid
from mmsnnet.stitching.anchors.weight_sections import Section, tensors_of
from mmsnnet.stitching.features import Grid

# Published weights are for images of three channels. Like timm, this file adapts them to any other number.
RGB = 3
# Masked autoencoders have a decoder, whose names timm's filters keep.
DECODER = "decoder_"
# Fine-tuning adds these modules to a classifier.
FINE_TUNED = ("head", "head_dist", "fc_norm")
# The number of names that each list in a message shows.
MOST_NAMES = 5


@dataclass
class FittedWeights:
    """A section of a weights file, fitted to an anchor.

    Attributes:
        section: the section.
        stem_weight: the name of the anchor's first weight.
        library: the library whose names the section has; empty for names that timm knows.
        origins: the file's names of each translated name.
        unused: the file's names of tensors that no timm model has.
        in_file: the tensors of the file, under the names that timm's filter reads.
        named: the weights under timm's names.
        sized: ``named``, resampled to the anchor's sizes and adapted to its channels.
        names: the names in ``sized`` that the anchor loads.
        kept: the anchor's tensors that stay unchanged, because the file does not have them.
        grid: the grid that the file records.
        unknown_grid: the tensors whose grid cannot be determined.
        adapted: the channels of the patch embedding in the file and in the anchor, if they differ.
        matching: the number of names that the anchor and the weights have in common.
        refusal: the reason why the weights do not fit; empty if they fit.
    """

    section: Section
    stem_weight: str
    library: str = ""
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    in_file: Mapping[str, Tensor] = field(default_factory=dict)
    named: Mapping[str, Tensor] = field(default_factory=dict)
    sized: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    grid: Grid | None = None
    unknown_grid: frozenset[str] = frozenset()
    adapted: tuple[int, int] | None = None
    matching: int = 0
    refusal: str = ""

    @property
    def loaded(self) -> dict[str, Tensor]:
        """The tensors that the anchor loads, by name."""
        return {name: self.sized[name] for name in self.names}

    @property
    def resized(self) -> tuple[str, ...]:
        """The names of tensors that have another patch or image size in the file."""
        stem = self.stem_weight
        resized = [name for name in self.names if name != stem and self.sized[name] is not self.named[name]]
        pointers = {tensor.data_ptr() for tensor in self.in_file.values()}
        if stem in self.names and self.named[stem].data_ptr() not in pointers:
            resized.append(stem)
        return tuple(resized)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The file's names of tensors that the anchor does not load."""
        return self._file_names(self._left_out) + self.unused

    @property
    def lost_biases(self) -> tuple[str, ...]:
        """The file's names of query and value biases that the anchor lacks."""
        lost = [name for name in self._left_out if name.endswith("attn.qkv.bias")]
        return self._file_names(name for name in lost if _moves_queries_or_values(self.in_file[name]))

    def _file_names(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(source for name in names for source in self.origins.get(name, (name,)))

    @property
    def _left_out(self) -> list[str]:
        # timm's filters rename tensors and take views, so a tensor is identified by its data pointer, or by its name if
        # the filter has computed a new one. The patch embedding is always loaded.
        loaded = {name: self.named[name] for name in self.names}
        used = {(tensor if tensor._base is None else tensor._base).data_ptr() for tensor in loaded.values()}
        patches = (self.stem_weight, "conv1.weight")
        return [
            name
            for name, tensor in self.in_file.items()
            if name not in loaded and tensor.data_ptr() not in used and not name.endswith(patches)
        ]


def fit(anchor: Anchor, state: Mapping[str, Tensor], section: Section) -> FittedWeights:
    """Fit a section of a weights file to an anchor, without changing the anchor.

    Args:
        anchor: the anchor.
        state: the state dict of its model.
        section: the weights.
    """
    fitted = FittedWeights(section, anchor.stem_weight, grid=recorded_grid(section.grid))
    weights = section.weights
    if renamed := rename(weights):
        zero = {name: torch.zeros_like(state[name]) for name in renamed.library.optional if name in state}
        weights = zero | renamed.weights
        fitted.library, fitted.origins, fitted.unused = renamed.library.name, renamed.origins, renamed.unused
    fitted.in_file = tensors_of(weights)
    fitted.matching = sum(name in state for name in fitted.in_file)
    try:
        fitted.named = _in_timm_names(anchor, weights)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError) as error:
        fitted.refusal = f"is of another architecture ({_first_line(error)})"
        return fitted
    fitted.matching = sum(name in state for name in fitted.named)
    fitted.sized, fitted.unknown_grid = _resampled(anchor, fitted.named, fitted.grid)
    _adapt_channels(fitted, state[anchor.stem_weight])
    fitted.kept = tuple(_kept(anchor, fitted.sized, state))
    required = {name: value for name, value in state.items() if name not in fitted.kept}
    fitted.names = tuple(required)
    fitted.refusal = _refusal(anchor, fitted, required)
    return fitted


def _in_timm_names(anchor: Anchor, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights under timm's names, with the patch embedding resampled to the anchor's patches."""
    model = anchor.model
    if anchor.positions is None:
        return _filtered(model, weights)
    # Without a position embedding in the model, timm's filter leaves the embedding of the file unchanged. Otherwise it
    # would resample it from a guessed grid: it cannot distinguish grids with the same number of patches.
    position, model.pos_embed = model.pos_embed, None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm's filter for Eva prints failed attempts
            return _filtered(model, weights)
    finally:
        model.pos_embed = position


def _filtered(model: nn.Module, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Apply the checkpoint filter of the model's family in timm, if it has one.

    It renames published weights, and resamples them to the model's size.
    """
    options = dict(adapt_layer_scale=True) if isinstance(model, VisionTransformer) else {}
    for class_ in reversed(type(model).__mro__):  # the family's own class first
        if (filter_ := getattr(sys.modules[class_.__module__], "checkpoint_filter_fn", None)) is not None:
            return filter_(dict(weights), model, **options)
    return dict(weights)


def _resampled(
    anchor: Anchor, named: Mapping[str, Tensor], recorded: Grid | None
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Resample positions to the anchor's image size.

    Returns:
        The weights, and the names of the tensors whose grid cannot be determined.
    """
    sized, unknown, positions = dict(named), set(), anchor.positions
    if positions is None:
        return sized, frozenset()
    for name, stored in positions.grids().items():
        if name not in named:
            continue
        candidates = _candidate_grids(name, named[name], recorded, stored)
        grids = [grid for grid in candidates if positions.fits(name, named[name], grid)]
        if grids:
            sized[name] = positions.resample(name, named[name], grids[0])
        else:
            unknown.add(name)
    return sized, frozenset(unknown)


def _candidate_grids(name: str, tensor: Any, recorded: Grid | None, stored: Grid) -> Iterator[Grid]:
    """Yield the grids that a tensor may have, the likeliest first.

    A file does not record the grid of a table of windowed attention.
    """
    if recorded is not None:
        yield recorded
    if recorded is None or name != POSITION:
        rows = tensor.shape[-2] if isinstance(tensor, Tensor) and tensor.ndim > 1 else 0
        yield from ((side, side) for side in range(1, math.isqrt(rows) + 1))
        yield stored


def _adapt_channels(fitted: FittedWeights, stem: Tensor) -> None:
    """Adapt a patch embedding of three channels to the number of channels of the anchor's ``stem``."""
    weight, channels = fitted.sized.get(fitted.stem_weight), stem.shape[1]
    if isinstance(weight, Tensor) and weight.shape == (stem.shape[0], RGB, *stem.shape[2:]) and channels != RGB:
        fitted.sized[fitted.stem_weight] = adapt_input_conv(channels, weight)
        fitted.adapted = RGB, channels


def _kept(anchor: Anchor, sized: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The anchor's tensors that keep their initial values.

    They are bias tables and modules for fine-tuning that the file lacks, and a head for another number of classes.
    """
    tables = [key for key in state if key.endswith(BIAS_TABLE) and anchor.positions is not None]
    kept = [] if any(key in sized for key in tables) else tables
    # timm names the layers of a hierarchical model that depend on the number of classes.
    classifier = anchor.model.pretrained_cfg["classifier"]
    named = (classifier,) if isinstance(classifier, str) else classifier
    for module in FINE_TUNED if anchor.positions is not None else named:
        weight = f"{module}.weight"
        absent = not any(key.startswith(f"{module}.") for key in sized)
        if absent or (weight in state and weight in sized and len(state[weight]) != len(sized[weight])):
            kept += [key for key in state if key.startswith(f"{module}.")]
    return kept


def _refusal(anchor: Anchor, fitted: FittedWeights, required: Mapping[str, Tensor]) -> str:
    """The reason why weights do not fit the tensors that an anchor requires; empty if they fit."""
    relevant = {
        name: value for name, value in fitted.sized.items() if name in required or not _is_superfluous(anchor, name)
    }
    wrong = describe_mismatch(tensor_shapes(relevant), tensor_shapes(required), most=MOST_NAMES)
    if not wrong:
        return ""
    refusal = f"does not fit this anchor ({anchor.depth} blocks, width {anchor.widths[-1]}). "
    if not fitted.matching:
        names = list(fitted.in_file)
        levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
        common = "".join(f"{level[0]}." for level in takewhile(lambda parts: len(set(parts)) == 1, levels))
        return (
            f"{refusal}It has no name that is known: its names"
            + (f" all begin with {fitted.section.address + common!r}" if common else "")
            + f" are {join_names(names, MOST_NAMES)}, and the anchor's are {join_names(list(required), MOST_NAMES)}. "
            "docs/checkpoints.md lists the libraries whose names can be read: use a file of one of them, or rename the "
            "weights"
        )
    weight = fitted.sized.get(fitted.stem_weight)
    if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[1] != anchor.in_chans:
        wrong += (
            f". The file is for images of {weight.shape[1]} channels, and only weights for {RGB} channels can be "
            f"adapted: set in_chans={weight.shape[1]} in the anchor"
        )
    if anchor.positions is None:
        return refusal + wrong
    with_grid, required_with_grid = (
        tensor_shapes({name: value for name, value in weights.items() if name not in fitted.unknown_grid})
        for weights in (relevant, required)
    )
    if fitted.grid is None and not describe_mismatch(with_grid, required_with_grid):
        wrong += (
            ". The file does not record the grid of patches, which is neither a square nor this anchor's "
            f"{' x '.join(map(str, anchor.positions.grid))}: load the file into a model of its own img_size, and use a "
            "checkpoint of that model, which records the grid"
        )
    return refusal + wrong


def _is_superfluous(anchor: Anchor, name: str) -> bool:
    return name.split(".")[0] in anchor.classifier_modules or name.startswith(DECODER)


def _moves_queries_or_values(bias: Tensor) -> bool:
    """Whether a joint bias is not zero for queries or values. DINOv3's files have a key bias, which it masks."""
    return bias.ndim != 1 or len(bias) % 3 != 0 or bool(bias.view(3, -1)[[0, 2]].any())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
