"""Routes of stitches through the blocks of the anchors, in characters and as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsnnet.errors import needs_extra
from mmsnnet.files.writing import write_atomically
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import Stitch, Tap
from mmsnnet.visualization.figures import check_picture, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN, NOT_RUN = "■", "·"
# Okabe and Ito's palette, as in the other pictures.
RUN_COLOUR, NOT_RUN_COLOUR, LAYER_COLOUR, TAP_COLOUR = "#0072B2", "0.92", "#D55E00", "black"
LEGEND = ("block that runs", "block that does not", "stitching layer", "stitching layer of a tap", "tap")
# In data units: the distance of two rows, and of two blocks of the largest anchor, is 1.
BLOCK_HEIGHT, GAP, TAP_HEIGHT = 0.5, 0.14, 0.5
MOST_COLUMNS = 4
STAGE_GAP = 0.6  # between stages, in blocks
# In inches.
ALONE_WIDTH, COLUMN_WIDTH, BLOCK_SPACE = 8.0, 5.0, 0.19
ROW_SPACE, TITLE_SPACE, LEGEND_SPACE = 0.5, 0.5, 0.35


def route_lines(space: StitchSpace, stitch: Stitch) -> list[str]:
    """Draw a route in one line for each anchor, smallest first, with a character for each block that runs or not.

    Blocks of a smaller anchor are aligned with the corresponding blocks of the largest one::

        S · · · ■ ■ ■ · · · · · ·
        L ■■■■■■······■■■■■■■■■■■■

    There is a gap between stages.
    """
    lines: list[str] = []
    for index, (anchor, stages) in enumerate(zip(_letters(space), space.stages, strict=True)):
        parts, block = [], 0
        for depth, length in zip(stages, _lengths(space), strict=True):
            part = [" "] * length
            for place in range(depth):
                part[-(-place * length // depth)] = RUN if _runs(stitch, index, block) else NOT_RUN
                block += 1
            parts.append("".join(part))
        lines.append(f"{anchor} {' '.join(parts).rstrip()}")
    return lines


@needs_extra("viz")
def draw_route(
    space: StitchSpace, stitch: Stitch, out_indices: Sequence[int] = (), axes: Axes | None = None, legend: bool = True
) -> Axes:
    """Draw the route of a stitch with its stitching layers and taps.

    Each anchor is a row of blocks, the largest on top. Blocks that run are filled; the first and last of a segment are
    numbered. Corresponding blocks are aligned, with a gap between stages. Features leave a block at its right edge. The
    tap of a smaller anchor passes through stitching layers up to the width of the largest one.

    Args:
        space, stitch: the route and its anchors.
        out_indices: blocks of the largest anchor at which taps are taken.
        axes: the axes to draw on; None for a new figure, the ``.figure`` of the returned axes.
        legend: whether to draw a legend below.

    Raises:
        ValueError: an index is not a block of the largest anchor.
        MissingPackageError: matplotlib is not installed.
    """
    taps = space.taps(stitch, out_indices)
    if axes is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=_figure_size(space, 1, 1), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
    for anchor, (letter, depth) in enumerate(zip(_letters(space), space.depths, strict=True)):
        axes.text(-0.5, anchor, letter, ha="right", va="center", fontsize=12, fontweight="bold")
        for block in range(depth):
            _draw_block(axes, space, stitch, anchor, block)
    for tap in taps:
        _draw_tap(axes, space, tap)
    _draw_layers(axes, space, stitch)
    axes.set_title(f"{stitch.name}  (id {stitch.id})", fontsize=12, loc="left", x=0.02, parse_math=False)
    axes.set_xlim(-1.4, _length(space) + 0.4)
    axes.set_ylim(-0.4, len(space.depths) - 1 + TAP_HEIGHT + 0.1)
    axes.set_axis_off()
    if legend:
        _add_legend(axes.figure, [axes])
    return axes


@needs_extra("viz")
def plot_routes(
    space: StitchSpace,
    stitches: str | Sequence[int | str],
    out: str | os.PathLike[str],
    out_indices: Sequence[int] = (),
) -> Path:
    """Draw several routes with :func:`draw_route` in one picture, and write it to ``out``.

    Args:
        space: of the stitches.
        stitches: ids and names, as in :meth:`StitchSpace.select`.
        out: ``.png`` or ``.svg``, written atomically; the same routes give the same bytes.
        out_indices: blocks of the largest anchor at which taps are taken.

    Returns:
        The path of the file.

    Raises:
        UnknownStitchError: the space lacks one of the stitches.
        ValueError: another suffix, or an index that is not a block of the largest anchor.
        MissingPackageError: matplotlib is not installed.
    """
    out = Path(out)
    check_picture(out, ".png", ".svg")
    from matplotlib.figure import Figure

    chosen = space.select(stitches)
    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(chosen) / 2)))
    rows = math.ceil(len(chosen) / columns)
    figure = Figure(figsize=_figure_size(space, columns, rows), dpi=150, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes, stitch in zip(grid, chosen, strict=False):
        draw_route(space, stitch, out_indices, axes, legend=False)
    for axes in grid[len(chosen) :]:
        axes.set_axis_off()
    _add_legend(figure, grid)
    write_atomically(out, render(figure, out))
    return out


def _figure_size(space: StitchSpace, columns: int, rows: int) -> tuple[float, float]:
    """Width and height in inches, with room for two digits in each block."""
    width = max(ALONE_WIDTH if columns == 1 else COLUMN_WIDTH, BLOCK_SPACE * (_length(space) + 2))
    return columns * width, rows * (len(space.depths) * ROW_SPACE + TITLE_SPACE) + LEGEND_SPACE


def _runs(stitch: Stitch, anchor: int, block: int) -> bool:
    return any(segment.anchor == anchor and block in segment for segment in stitch.segments)


def _letters(space: StitchSpace) -> list[str]:
    return [anchor.name for anchor in StitchSpace.of("two_way", space.stages).anchors]


def _lengths(space: StitchSpace) -> list[int]:
    """The most blocks of any anchor in each stage."""
    return [max(blocks) for blocks in zip(*space.stages, strict=True)]


def _length(space: StitchSpace) -> float:
    """The length of a drawing, in blocks."""
    lengths = _lengths(space)
    return sum(lengths) + STAGE_GAP * (len(lengths) - 1)


def _edges(space: StitchSpace, anchor: int, block: int) -> tuple[float, float]:
    """Left and right edge of a block, in blocks of the anchor with most in its stage; block -1 ends at 0."""
    start = 0.0
    for depth, length in zip(space.stages[anchor], _lengths(space), strict=True):
        if block < depth:
            return start + block * length / depth, start + (block + 1) * length / depth
        block, start = block - depth, start + length + STAGE_GAP
    raise AssertionError(f"anchor {anchor} has no such block")


def _place(space: StitchSpace, anchor: int, block: int) -> int:
    """The number of a block in its stage."""
    for depth in space.stages[anchor]:
        if block < depth:
            break
        block -= depth
    return block


def _draw_block(axes: Axes, space: StitchSpace, stitch: Stitch, anchor: int, block: int) -> None:
    from matplotlib.patches import Rectangle

    left, right = _edges(space, anchor, block)
    runs = _runs(stitch, anchor, block)
    axes.add_patch(
        Rectangle(
            (left + GAP / 2, anchor - BLOCK_HEIGHT / 2),
            right - left - GAP,
            BLOCK_HEIGHT,
            facecolor=RUN_COLOUR if runs else NOT_RUN_COLOUR,
            label="block that runs" if runs else "block that does not",
        )
    )
    ends = {end for segment in stitch.segments if segment.anchor == anchor for end in (segment.start, segment.stop - 1)}
    if block in ends:
        axes.text(
            (left + right) / 2,
            anchor,
            str(_place(space, anchor, block)),
            ha="center",
            va="center",
            fontsize=8,
            color="white",
        )


def _draw_layers(axes: Axes, space: StitchSpace, stitch: Stitch) -> None:
    for before, after in pairwise(stitch.segments):
        xs = _edges(space, before.anchor, before.stop - 1)[1], _edges(space, after.anchor, after.start - 1)[1]
        ys = before.anchor, after.anchor
        axes.plot(xs, ys, color=LAYER_COLOUR, lw=2, label="stitching layer", solid_capstyle="butt", zorder=4)
        arrow = "^" if after.anchor > before.anchor else "v"
        axes.plot(sum(xs) / 2, sum(ys) / 2, arrow, color=LAYER_COLOUR, markersize=8, zorder=4)


def _draw_tap(axes: Axes, space: StitchSpace, tap: Tap) -> None:
    """Draw a tap from its block through stitching layers up to the largest anchor, and out."""
    path = [(_edges(space, tap.anchor, tap.block)[1], tap.anchor)]
    path += [(_edges(space, key.target, key.target_block - 1)[1], key.target) for key in tap.layers]
    if tap.layers:
        axes.plot(
            *zip(*path, strict=True), color=LAYER_COLOUR, lw=1.3, ls=":", label="stitching layer of a tap", zorder=3
        )
    x, y = path[-1]
    axes.plot((x, x), (y, y + TAP_HEIGHT - 0.05), color=TAP_COLOUR, lw=1, zorder=3)
    axes.plot(x, y + TAP_HEIGHT - 0.05, "o", color=TAP_COLOUR, markersize=5, label="tap", zorder=5)


def _add_legend(figure: Any, grid: Sequence[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in grid:
        handles, labels = axes.get_legend_handles_labels()
        for label, handle in zip(labels, handles, strict=True):
            entries.setdefault(label, handle)
    shown = {label: entries[label] for label in LEGEND if label in entries}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)
