"""Plot of quality over cost of every stitch with the Pareto front, as a picture or a page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsnnet.errors import needs_extra
from mmsnnet.evaluation.operating_points import CostName, OperatingPoint, OperatingPoints
from mmsnnet.files.writing import write_atomically
from mmsnnet.visualization.chart import Chart, make_chart
from mmsnnet.visualization.figures import check_picture, render
from mmsnnet.visualization.page import plotly_figure, render_page
from mmsnnet.visualization.references import SOURCE, Reference

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from plotly.graph_objects import Figure as PlotlyFigure

LEGEND_COLUMNS = 7
# Height in inches of a line above the axes, by which the picture grows.
HEADER_LINE = 0.19
# In points: possible offsets of an anchor's name from its star, a sufficient distance to the next star or name, and
# half of a name's width.
NAME_SIDES = ((0, 15), (0, -15), (-28, 0), (28, 0))
NAME_ROOM, NAME_HALF = 24, 16
RUN_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
RUN_LINES = ("-", "--", ":", "-.")
STAR: Mapping[str, Any] = {
    "marker": "*",
    "color": "black",
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
    "linestyle": "none",
}
# Reported results are hollow and grey.
REPORTED_COLOUR = "0.45"
REPORTED_LINES = ("--", ":")


@needs_extra("viz")
def plot_pareto(
    runs: Sequence[OperatingPoints],
    metric: str | None,
    out: str | os.PathLike[str],
    cost: CostName = "flops",
    *,
    higher: bool | None = None,
    reference: str | None = None,
) -> Path:
    """Plot all stitches of ``runs``, ``metric`` over ``cost``, to the file ``out``.

    Dots are stitches, coloured by kind. Ringed dots are on the Pareto front, and the step line is the best metric for
    each cost. Stars are the anchors. With several runs, the marker shows the run, and the legend lists settings in
    which their costs differ (input size, device). FLOPs are in G, or in M if all are below 1 G. Stitches whose metric
    is NaN are not drawn; the title counts them. The same runs give the same file.

    Args:
        runs: of one data set.
        metric: its name; None for :func:`mmsnnet.evaluation.default_metric`.
        out: ``.png`` (1200 x 750 pixels, higher with several runs), ``.svg``, or ``.html``: a page of about 5 MB that
            needs no network and shows details and the route of the stitch under the mouse. The file is written
            atomically.
        cost: ``flops`` or ``latency_ms``.
        higher: whether greater values of the metric are better; None to decide by its name.
        reference: also draw results that the paper of SN-Netv2 reports (arXiv 2307.00154, Table 1): a key of
            ``mmsnnet.visualization.references.REFERENCES``.

    Returns:
        The path of the file.

    Raises:
        ValueError: another suffix, nothing to draw, several data sets, a stitch without the metric or the cost, a
            metric with an unknown name without ``higher``, or a reference for another data set, metric or cost.
        MissingPackageError: matplotlib or, for a page, plotly is not installed.
    """
    out = Path(out)
    check_picture(out, ".png", ".svg", ".html")
    chart = make_chart(runs, metric, cost, higher, reference)
    write_atomically(out, render_page(chart) if out.suffix.lower() == ".html" else render(_draw(chart), out))
    return out


@needs_extra("viz")
def pareto_figure(
    runs: Sequence[OperatingPoints],
    metric: str | None = None,
    cost: CostName = "flops",
    *,
    higher: bool | None = None,
    marked: Mapping[str, OperatingPoint] | None = None,
) -> PlotlyFigure:
    """The plot of :func:`plot_pareto` as a figure of plotly, for a notebook or a page of your own.

    Args:
        runs, metric, cost, higher: as of :func:`plot_pareto`.
        marked: points of the runs to ring, by what the legend calls them.

    Raises:
        ValueError, MissingPackageError: as :func:`plot_pareto`.
    """
    return plotly_figure(make_chart(runs, metric, cost, higher, None), marked)


def _draw(chart: Chart) -> Figure:
    from matplotlib.figure import Figure

    header = _header(chart)
    figure = Figure(figsize=(8, 5 + HEADER_LINE * len(header)), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    if chart.reference:
        _draw_reference(axes, chart.reference)
    anchors: list[tuple[str, float, float]] = []
    for index, run in enumerate(chart.runs):
        _draw_stitches(axes, chart, index)
        if steps := chart.steps(index):
            line = RUN_LINES[index % len(RUN_LINES)]
            axes.plot(*zip(*steps, strict=True), line, drawstyle="steps-post", color="0.15", lw=1.3, zorder=2)
        suffix = f" ({index + 1})" if len(chart.runs) > 1 else ""
        anchors += [(f"{point.name}{suffix}", *chart.place(point)) for point in chart.drawn(run) if point.is_anchor]
    axes.set_xlabel(chart.x_label, fontsize=12)
    axes.set_ylabel(chart.y_label, fontsize=12, parse_math=False)
    axes.set_title(chart.title, fontsize=13, parse_math=False)
    axes.tick_params(labelsize=11)
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.05, 0.08)
    _add_legends(figure, chart, header)
    _draw_stars(figure, axes, anchors)
    return figure


def _draw_reference(axes: Axes, reference: Reference) -> None:
    """Draw diamonds for single networks, frames for the ranges of stitched ones."""
    from matplotlib.patches import Rectangle

    for result in reference.results:
        (left, right), (bottom, top) = result.gflops, result.quality
        if result.is_range:
            line = REPORTED_LINES[[other for other in reference.results if other.is_range].index(result)]
            frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, ec=REPORTED_COLOUR, ls=line)
            axes.add_patch(frame)
        else:
            axes.plot(left, bottom, "D", markerfacecolor="none", markeredgecolor=REPORTED_COLOUR, zorder=5)


def _draw_stitches(axes: Axes, chart: Chart, index: int) -> None:
    on_front = {point.id for point in chart.fronts[index]}
    points = [point for point in chart.drawn(chart.runs[index]) if not point.is_anchor]
    for ringed in (False, True):
        chosen: list[OperatingPoint] = [point for point in points if (point.id in on_front) is ringed]
        places = [chart.place(point) for point in chosen]
        axes.scatter(
            [x for x, _ in places],
            [y for _, y in places],
            c=[chart.colours[point.kind] for point in chosen],
            marker=RUN_MARKERS[index],
            s=46 if ringed else 30,
            alpha=1.0 if ringed else 0.7,
            edgecolors="black" if ringed else "white",
            linewidths=1.1 if ringed else 0.4,
            zorder=4 if ringed else 3,
        )


def _draw_stars(figure: Figure, axes: Axes, anchors: Sequence[tuple[str, float, float]]) -> None:
    """Draw stars at (x, y) with names.

    A name stands above its star, or, if two anchors are close, on the side with the most room that is not on the axis.
    """
    for _, x, y in anchors:
        axes.plot(x, y, **STAR, markersize=17, zorder=6)
    # The layout, and with it the position of the axes, is computed only when the figure is drawn.
    figure.draw_without_rendering()
    pixels = figure.dpi / 72
    stars = [tuple(axes.transData.transform((x, y)) / pixels) for _, x, y in anchors]
    names: list[tuple[float, float]] = []
    for (name, x, y), star in zip(anchors, stars, strict=True):
        taken = [*(other for other in stars if other != star), *names]
        places = [(star[0] + dx, star[1] + dy) for dx, dy in NAME_SIDES]
        room = [min([NAME_ROOM, *(math.dist(place, other) for other in taken)]) for place in places]
        room = [
            free if place[0] - NAME_HALF > axes.bbox.x0 / pixels else 0
            for place, free in zip(places, room, strict=True)
        ]
        best = room.index(max(room))
        names.append(places[best])
        axes.annotate(
            name,
            (x, y),
            xytext=NAME_SIDES[best],
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=12,
            fontweight="bold",
            parse_math=False,
            zorder=7,
            bbox=dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.75),
        )


def _add_legends(figure: Figure, chart: Chart, header: Sequence[tuple[Artist, str]]) -> None:
    from matplotlib.lines import Line2D

    dot: Mapping[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 7, "markeredgecolor": "white"}
    entries = [(Line2D([], [], color=colour, **dot), kind) for kind, colour in chart.colours.items()]
    entries.append((Line2D([], [], color="0.15", lw=1.3, marker="o", markerfacecolor="none"), "Pareto front"))
    if any(point.is_anchor for run in chart.runs for point in run):
        entries.append((Line2D([], [], **STAR, markersize=13), "anchor"))
    handles, labels = zip(*entries, strict=True)
    columns = math.ceil(len(entries) / math.ceil(len(entries) / LEGEND_COLUMNS))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)

    if header:
        handles, labels = zip(*header, strict=True)
        # Inside the axes, the legend would cover stitches.
        legend = figure.legend(
            handles, labels, loc="outside upper left", fontsize=10, handlelength=3, frameon=False, labelspacing=0.3
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _header(chart: Chart) -> list[tuple[Artist, str]]:
    """Entries of the legend for runs and reference: their styles and names."""
    if len(chart.runs) == 1 and chart.reference is None:
        return []
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[tuple[Artist, str]] = []
    for index, name in enumerate(chart.run_names):
        line, marker = RUN_LINES[index % len(RUN_LINES)], RUN_MARKERS[index]
        entries.append((Line2D([], [], markersize=7, color="0.35", linestyle=line, marker=marker), name))
    if chart.reference is None:
        return entries
    reference, note = chart.reference, f"{SOURCE}{chart.size_note(chart.reference)}"
    alone = [result.name for result in reference.results if not result.is_range]
    ranges = [result.name for result in reference.results if result.is_range]
    diamond = Line2D([], [], linestyle="none", marker="D", markerfacecolor="none", markeredgecolor=REPORTED_COLOUR)
    frames = [Patch(fill=False, edgecolor=REPORTED_COLOUR, linestyle=line) for line in REPORTED_LINES]
    entries.append((diamond, f"{', '.join(alone)} alone, {note}"))
    return entries + [(frame, f"range of {name}, {note}") for frame, name in zip(frames, ranges, strict=True)]
