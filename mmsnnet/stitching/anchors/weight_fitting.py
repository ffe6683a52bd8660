"""Fitting weights to an anchor: translated to timm's names, resampled to its sizes, held against its tensors."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor

from mmsnnet.files.reading import describe_mismatch, join_names, tensor_shapes
from mmsnnet.stitching.anchors.attention import BIAS_TABLE
from mmsnnet.stitching.anchors.foreign_names import rename
from mmsnnet.stitching.anchors.plain import CLASSIFIER_MODULES, PlainAnchor
from mmsnnet.stitching.anchors.positions import POSITION, recorded_grid
from mmsnnet.stitching.anchors.weight_sections import Section, tensors_of
from mmsnnet.stitching.windows import Grid

PATCH_WEIGHT = "patch_embed.proj.weight"
# The channels of the images that weights are published for. Like timm, we adapt those to any other number.
RGB = 3
# The parts of a masked autoencoder beside its encoder, which timm's filters let pass.
DECODER = "decoder_"
# What a classifier has anew when it is fine-tuned.
FINE_TUNED = ("head", "head_dist", "fc_norm")
# How many names of each side a message lists.
MOST_NAMES = 5


@dataclass
class FittedWeights:
    """A section of a weights file, fitted to an anchor.

    Attributes:
        section: the section.
        library: whose names it has; empty for names that timm knows.
        origins: the file's names for each name that was translated.
        unused: the file's names for tensors that no model of timm's has.
        in_file: the tensors of the file, under the names that timm's filter was given.
        named: the weights under timm's names.
        sized: ``named``, resampled to the anchor's sizes and adapted to its channels.
        names: those of ``sized`` that the anchor loads.
        kept: the anchor's tensors that stay as they are, because the file has nothing for them.
        grid: the grid that the file records.
        of_unknown_grid: the tensors whose grid nothing tells.
        adapted: the channels of the patch embedding in the file and in the anchor, where they differ.
        matching: how many names the anchor and the weights have in common.
        refusal: why the weights do not fit; empty where they do.
    """

    section: Section
    library: str = ""
    origins: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    in_file: Mapping[str, Tensor] = field(default_factory=dict)
    named: Mapping[str, Tensor] = field(default_factory=dict)
    sized: dict[str, Tensor] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    grid: Grid | None = None
    of_unknown_grid: frozenset[str] = frozenset()
    adapted: tuple[int, int] | None = None
    matching: int = 0
    refusal: str = ""

    @property
    def loaded(self) -> dict[str, Tensor]:
        """What the anchor loads."""
        return {name: self.sized[name] for name in self.names}

    @property
    def resized(self) -> tuple[str, ...]:
        """The names of what is of another patch or input size in the file."""
        resized = [name for name in self.names if name != PATCH_WEIGHT and self.sized[name] is not self.named[name]]
        memories = {_memory(tensor) for tensor in self.in_file.values()}
        if PATCH_WEIGHT in self.names and _memory(self.named[PATCH_WEIGHT]) not in memories:
            resized.append(PATCH_WEIGHT)
        return tuple(resized)

    @property
    def left_out(self) -> tuple[str, ...]:
        """The file's names for tensors nothing of which is loaded."""
        return self._in_files_names(self._left_out) + self.unused

    @property
    def lost_biases(self) -> tuple[str, ...]:
        """Biases of queries and values that the anchor has no place for."""
        lost = [name for name in self._left_out if name.endswith("attn.qkv.bias")]
        return self._in_files_names(name for name in lost if _of_queries_and_values(self.in_file[name]))

    def _in_files_names(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(source for name in names for source in self.origins.get(name, (name,)))

    @property
    def _left_out(self) -> list[str]:
        # timm's filters rename: a tensor is known by its memory and, where it was computed with, by its name. The patch
        # embedding is never left out.
        loaded = {name: self.named[name] for name in self.names}
        used = {_memory(tensor) for tensor in loaded.values()}
        return [
            name
            for name, tensor in self.in_file.items()
            if name not in loaded and _memory(tensor) not in used and not name.endswith((PATCH_WEIGHT, "conv1.weight"))
        ]


def fit(anchor: PlainAnchor, own: Mapping[str, Tensor], section: Section) -> FittedWeights:
    """Fit a section of a weights file to an anchor, which is left as it is; ``own`` is its model's state dict."""
    fitted = FittedWeights(section, grid=recorded_grid(section.grid))
    weights = section.weights
    if renamed := rename(weights):
        zero = {name: torch.zeros_like(own[name]) for name in renamed.library.optional if name in own}
        weights = zero | renamed.weights
        fitted.library, fitted.origins, fitted.unused = renamed.library.name, renamed.origins, renamed.unused
    fitted.in_file = tensors_of(weights)
    fitted.matching = sum(name in own for name in fitted.in_file)
    try:
        fitted.named = _in_timm_names(anchor, weights)
    except (RuntimeError, AssertionError, AttributeError, TypeError, ValueError, LookupError) as error:
        fitted.refusal = f"is of another architecture ({_first_line(error)})"
        return fitted
    fitted.matching = sum(name in own for name in fitted.named)
    fitted.sized, fitted.of_unknown_grid = _in_anchors_size(anchor, fitted.named, fitted.grid)
    _adapt_channels(fitted, own[PATCH_WEIGHT])
    fitted.kept = tuple(_kept(fitted.sized, own))
    wanted = {name: value for name, value in own.items() if name not in fitted.kept}
    fitted.names = tuple(wanted)
    fitted.refusal = _refusal(anchor, fitted, wanted)
    return fitted


def _in_timm_names(anchor: PlainAnchor, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights under timm's names, the patch embedding resampled to the anchor's patches."""
    model = anchor.model
    # From a model without a position embedding, timm's filter lets the file's pass as it is: it cannot tell apart two
    # grids of as many tokens, and takes the grid of a one-anchor checkpoint for a square.
    position, model.pos_embed = model.pos_embed, None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the filter for Eva prints what it tries in vain
            return anchor.checkpoint_filter(weights)
    finally:
        model.pos_embed = position


def _in_anchors_size(
    anchor: PlainAnchor, named: Mapping[str, Tensor], grid: Grid | None
) -> tuple[dict[str, Tensor], frozenset[str]]:
    """The weights with position embedding and bias tables resampled to the anchor's input size, and the names of those
    that are of no known grid; ``grid`` is the recorded one."""
    sized, unknown = dict(named), set()
    for name, own in anchor.positions.grids().items():
        if name not in named:
            continue
        found = [one for one in _grids(name, named[name], grid, own) if anchor.positions.fits(name, named[name], one)]
        if found:
            sized[name] = anchor.positions.resample(name, named[name], found[0])
        else:
            unknown.add(name)
    return sized, frozenset(unknown)


def _grids(name: str, tensor: Any, recorded: Grid | None, own: Grid) -> Iterator[Grid]:
    """The grids that a tensor may be for, the likeliest first; that of a table within windows is not recorded."""
    if recorded is not None:
        yield recorded
    if recorded is None or name != POSITION:
        rows = tensor.shape[-2] if isinstance(tensor, Tensor) and tensor.ndim > 1 else 0
        yield from ((side, side) for side in range(1, math.isqrt(rows) + 1))
        yield own


def _adapt_channels(fitted: FittedWeights, own: Tensor) -> None:
    """Adapt a patch embedding of three channels to the anchor's number of channels."""
    weight, wanted = fitted.sized.get(PATCH_WEIGHT), own.shape[1]
    if isinstance(weight, Tensor) and weight.shape == (own.shape[0], RGB, *own.shape[2:]) and wanted != RGB:
        fitted.sized[PATCH_WEIGHT] = adapt_input_conv(wanted, weight)
        fitted.adapted = RGB, wanted


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


def _refusal(anchor: PlainAnchor, fitted: FittedWeights, wanted: Mapping[str, Tensor]) -> str:
    """Why weights do not fit an anchor that wants these; empty where they do."""
    given = {name: value for name, value in fitted.sized.items() if name in wanted or not _of_no_use(name)}
    wrong = describe_mismatch(tensor_shapes(given), tensor_shapes(wanted), most=MOST_NAMES)
    if not wrong:
        kinds = [
            f"{name} ({str(value.dtype).removeprefix('torch.')})"
            for name, value in given.items()
            if name in wanted and wanted[name].is_floating_point() and not value.is_floating_point()
        ]
        return f"has weights that are no real numbers: {join_names(kinds, MOST_NAMES)}" if kinds else ""
    refusal = f"does not fit this anchor ({anchor.depth} blocks, width {anchor.width}). "
    if not fitted.matching:
        names = list(fitted.in_file)
        levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
        common = "".join(f"{level[0]}." for level in takewhile(lambda parts: len(set(parts)) == 1, levels))
        return (
            f"{refusal}It has no name that is known; its names"
            + (f" all begin with {fitted.section.address + common!r}" if common else "")
            + f" ({join_names(names, MOST_NAMES)}), the anchor's are {join_names(list(wanted), MOST_NAMES)}. "
            "docs/checkpoints.md lists the libraries whose names are read: give a file of one of them, or rename"
        )
    weight = fitted.sized.get(PATCH_WEIGHT)
    if isinstance(weight, Tensor) and weight.ndim == 4 and weight.shape[1] != anchor.in_chans:
        wrong += (
            f". The file is for images of {weight.shape[1]} channels, and only weights for {RGB} are adapted to "
            f"another number: set in_chans={weight.shape[1]} in the anchor"
        )
    known, own = (
        tensor_shapes({name: value for name, value in weights.items() if name not in fitted.of_unknown_grid})
        for weights in (given, wanted)
    )
    if fitted.grid is None and not describe_mismatch(known, own):
        wrong += (
            ". The file does not tell of what grid of patches these are, which is neither a square nor this "
            f"anchor's {' x '.join(map(str, anchor.positions.grid))}: load it into a model at the img_size that it "
            "was made at, and give the checkpoint of that model, which records the grid"
        )
    return refusal + wrong


def _of_no_use(name: str) -> bool:
    return name.split(".")[0] in CLASSIFIER_MODULES or name.startswith(DECODER)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_queries_and_values(bias: Tensor) -> bool:
    """Whether a joint bias moves queries or values; DINOv3 keeps that of keys in its files, but masks it."""
    return bias.ndim != 1 or len(bias) % 3 != 0 or bool(bias.view(3, -1)[[0, 2]].any())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
