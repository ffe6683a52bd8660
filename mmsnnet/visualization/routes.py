"""A stitch as its route through the blocks of the anchors, in characters and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsnnet.files.writing import write_atomically
from mmsnnet.stitching.space import Stitch, StitchSpace, Tap
from mmsnnet.visualization.figures import check_suffix, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RUN, NOT_RUN = "■", "·"
# Of Okabe and Ito's palette, as in the other pictures.
RUN_COLOUR, NOT_RUN_COLOUR, LAYER_COLOUR, TAP_COLOUR = "#0072B2", "0.92", "#D55E00", "black"
LEGEND = ("block that runs", "block that does not", "stitching layer", "stitching layer of a tap", "tap")
# Rows are one apart, blocks of the largest anchor too.
BLOCK_HEIGHT, GAP, TAP_HEIGHT = 0.5, 0.14, 0.5
MOST_COLUMNS = 4
# In inches.
ALONE_WIDTH, COLUMN_WIDTH, BLOCK_SPACE = 8.0, 5.0, 0.19
ROW_SPACE, TITLE_SPACE, LEGEND_SPACE = 0.5, 0.5, 0.35


def route_lines(space: StitchSpace, stitch: Stitch) -> list[str]:
    """A line for each anchor, the smallest first, with a character for each block: whether the route runs it.

    Blocks of a smaller anchor stand under those of the largest one that they correspond to::

        S · · · ■ ■ ■ · · · · · ·
        L ■■■■■■······■■■■■■■■■■■■
    """
    lines: list[str] = []
    for anchor, depth in zip(full_space(space.depths).anchors, space.depths, strict=True):
        line = [" "] * max(space.depths)
        for block in range(depth):
            line[-(-block * len(line) // depth)] = RUN if _runs(stitch, len(lines), block) else NOT_RUN
        lines.append(f"{anchor.name} {''.join(line).rstrip()}")
    return lines


def full_space(depths: Sequence[int]) -> StitchSpace:
    """The space of all stitches of anchors of these depths, smallest first."""
    return StitchSpace.single(*depths) if len(depths) == 1 else StitchSpace.two_way(depths)


def draw_route(
    space: StitchSpace, stitch: Stitch, out_indices: Sequence[int] = (), axes: Axes | None = None, legend: bool = True
) -> Axes:
    """Draws the route of a stitch: a row of blocks for each anchor, the largest on top, those that run filled and the
    first and last of a segment numbered; the stitching layers that join the segments; the taps.

    Corresponding blocks stand one above the other. What leaves a block does so at its right edge; the tap of a smaller
    anchor goes up through the stitching layers into the width of the largest one.

    Args:
        space, stitch: the route and the anchors that it goes through.
        out_indices: blocks of the largest anchor whose output is handed out.
        axes: where to draw; None for a figure of its own, ``.figure`` of what is returned.
        legend: whether to say below what is what.

    Raises:
        ValueError: an index is not a block of the largest anchor.
    """
    taps = space.taps(stitch, out_indices)
    if axes is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=_figure_size(space, 1, 1), dpi=150, layout="constrained", facecolor="white")
        axes = figure.add_subplot()
    letters = [anchor.name for anchor in full_space(space.depths).anchors]
    for anchor, depth in enumerate(space.depths):
        axes.text(-0.5, anchor, letters[anchor], ha="right", va="center", fontsize=12, fontweight="bold")
        for block in range(depth):
            _draw_block(axes, space, stitch, anchor, block)
    for tap in taps:
        _draw_tap(axes, space, tap)
    _draw_layers(axes, space, stitch)
    axes.set_title(f"{stitch.name}  (id {stitch.id})", fontsize=12, loc="left", x=0.02, parse_math=False)
    axes.set_xlim(-1.4, max(space.depths) + 0.4)
    axes.set_ylim(-0.4, len(space.depths) - 1 + TAP_HEIGHT + 0.1)
    axes.set_axis_off()
    if legend:
        _add_legend(axes.figure, [axes])
    return axes


def plot_routes(
    space: StitchSpace,
    stitches: str | Sequence[int | str],
    out: str | os.PathLike[str],
    out_indices: Sequence[int] = (),
) -> Path:
    """Draws routes as :func:`draw_route` does, side by side, and writes the picture to ``out``.

    Args:
        space: of the stitches.
        stitches: ids and names, as :meth:`StitchSpace.select` takes them.
        out: ``.png`` or ``.svg``; written whole or not at all, with the same bytes for the same routes.
        out_indices: blocks of the largest anchor whose output is handed out.

    Returns:
        The path written.

    Raises:
        UnknownStitchError: the space lacks one of the stitches.
        ValueError: another suffix, or an index that is not a block of the largest anchor.
    """
    from matplotlib.figure import Figure

    out = Path(out)
    check_suffix(out, ".png", ".svg")
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
    """In inches; a block has room for two digits, however many there are."""
    width = max(ALONE_WIDTH if columns == 1 else COLUMN_WIDTH, BLOCK_SPACE * (max(space.depths) + 2))
    return columns * width, rows * (len(space.depths) * ROW_SPACE + TITLE_SPACE) + LEGEND_SPACE


def _runs(stitch: Stitch, anchor: int, block: int) -> bool:
    return any(segment.anchor == anchor and block in segment for segment in stitch.segments)


def _edge(space: StitchSpace, anchor: int, blocks: int) -> float:
    """Where so many blocks of an anchor end, in blocks of the largest one."""
    return blocks * max(space.depths) / space.depths[anchor]


def _draw_block(axes: Axes, space: StitchSpace, stitch: Stitch, anchor: int, block: int) -> None:
    from matplotlib.patches import Rectangle

    left, right = _edge(space, anchor, block), _edge(space, anchor, block + 1)
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
        axes.text((left + right) / 2, anchor, str(block), ha="center", va="center", fontsize=8, color="white")


def _draw_layers(axes: Axes, space: StitchSpace, stitch: Stitch) -> None:
    for key in stitch.layers:
        xs = _edge(space, key.source, key.source_block + 1), _edge(space, key.target, key.target_block)
        ys = key.source, key.target
        axes.plot(xs, ys, color=LAYER_COLOUR, lw=2, label="stitching layer", solid_capstyle="butt", zorder=4)
        arrow = "^" if key.target > key.source else "v"
        axes.plot(sum(xs) / 2, sum(ys) / 2, arrow, color=LAYER_COLOUR, markersize=8, zorder=4)


def _draw_tap(axes: Axes, space: StitchSpace, tap: Tap) -> None:
    """The path of a tap: from the block that it leaves up to the width of the largest anchor, and out."""
    path = [(_edge(space, tap.anchor, tap.block + 1), tap.anchor)]
    path += [(_edge(space, key.target, key.target_block), key.target) for key in tap.layers]
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
