"""Quality over cost of every stitch, with the Pareto front, as a picture."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsnnet.evaluation.operating_points import (
    CostName,
    OperatingPoint,
    OperatingPoints,
    default_metric,
    higher_is_better,
    pareto_front,
    write_atomically,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with every kind of colour vision; black is left for the front and the anchors.
KIND_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# For more kinds, those of three anchors and more: from blue to red, so that the kinds of one pair are near each other.
MANY_COLOURS = "turbo"
LEGEND_COLUMNS = 7
# Where the name of an anchor may stand, in points from its star, and how far from the next star or name is enough.
NAME_SIDES = ((0, 15), (0, -15), (-28, 0), (28, 0))
NAME_ROOM = 26
RUN_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
RUN_LINES = ("-", "--", ":", "-.")
STAR: Mapping[str, Any] = {
    "marker": "*",
    "color": "black",
    "markeredgecolor": "white",
    "markeredgewidth": 0.8,
    "linestyle": "none",
}


def plot_pareto(
    runs: Sequence[OperatingPoints],
    metric: str | None,
    out: str | os.PathLike[str],
    cost: CostName = "flops",
    *,
    higher: bool | None = None,
) -> Path:
    """Draws all stitches of ``runs``, ``metric`` over ``cost``, and writes the picture to ``out``.

    Dots are stitches, coloured by kind; ringed ones are on the Pareto front, and the step line is the best that its
    cost buys; stars are the anchors alone. With several runs, the marker says which. FLOPs are drawn in G, in M if all
    are below 1 G. Stitches whose metric is NaN are not drawn; the title says how many.

    Args:
        runs: of one data set.
        metric: by name; None for :func:`mmsnnet.evaluation.default_metric`.
        out: ``.png`` (1200 x 750 pixels) or ``.svg``; written whole or not at all.
        cost: ``flops`` or ``latency_ms``.
        higher: whether more of the metric is better; None for what its name says.

    Returns:
        The path written.

    Raises:
        ValueError: another suffix, nothing to draw, several data sets, a stitch without the metric or the cost, or a
            metric of an unknown name without ``higher``.
    """
    out = Path(out)
    if out.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"{out}: expected a name that ends in .png or .svg, found {out.suffix or 'no suffix'!r}")
    everything = _check_runs(runs)
    name = default_metric(everything) if metric is None else metric
    if higher is None:
        higher = higher_is_better(name)
    fronts = [pareto_front(run, cost, name, higher=higher) for run in runs]
    if not any(fronts):
        raise ValueError(f"metric {name!r} is NaN for every stitch: there is nothing to draw")

    figure = _draw(runs, fronts, name, cost, higher)
    write_atomically(out, _render(figure, out.suffix.lower()))
    return out


def flops_unit(points: Iterable[OperatingPoint]) -> tuple[float, str]:
    """The unit in which to print the FLOPs of ``points``, and its name: (1e9, "GFLOPs"), or (1e6, "MFLOPs") if all are
    below 1 G."""
    return (1e9, "GFLOPs") if max((point.flops for point in points), default=0) >= 1e9 else (1e6, "MFLOPs")


def _check_runs(runs: Sequence[OperatingPoints]) -> list[OperatingPoint]:
    """All points of ``runs``, which can be drawn together."""
    if not 1 <= len(runs) <= len(RUN_MARKERS):
        raise ValueError(f"expected 1 to {len(RUN_MARKERS)} runs on one plot, found {len(runs)}")
    for number, run in enumerate(runs, start=1):
        if not len(run):
            raise ValueError(f"run {number} ({run.config}) has no stitches: there is nothing to draw")
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    if len(datasets) > 1:
        names = ", ".join(dataset or "an unnamed one" for dataset in datasets)
        raise ValueError(f"runs of different data sets cannot share a plot, found {names}")
    return [point for run in runs for point in run]


def _draw(
    runs: Sequence[OperatingPoints],
    fronts: Sequence[Sequence[OperatingPoint]],
    metric: str,
    cost: CostName,
    higher: bool,
) -> Figure:
    from matplotlib.figure import Figure

    everything = [point for run in runs for point in run]
    unit, unit_name = flops_unit(everything) if cost == "flops" else (1.0, "latency (ms)")
    by_id = sorted(everything, key=lambda point: point.id)
    kinds = list(dict.fromkeys(point.kind for point in by_id if not point.is_anchor))
    colours = dict(zip(kinds, _kind_colours(len(kinds)), strict=True))

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot(facecolor="white")
    anchors: list[tuple[str, float, float]] = []
    for index, (run, front) in enumerate(zip(runs, fronts, strict=True)):
        drawn = [point for point in run if not math.isnan(point.metric(metric))]
        _draw_stitches(axes, drawn, front, metric, cost, unit, colours, RUN_MARKERS[index])
        if front:
            # The best that a budget buys stays the same until the next point of the front, and after the last one.
            end = max(point.cost(cost) for point in drawn)
            xs = [*(point.cost(cost) / unit for point in front), end / unit]
            ys = [*(point.metric(metric) for point in front), front[-1].metric(metric)]
            axes.plot(xs, ys, RUN_LINES[index % len(RUN_LINES)], drawstyle="steps-post", color="0.15", lw=1.3, zorder=2)
        suffix = f" ({index + 1})" if len(runs) > 1 else ""
        anchors += [
            (f"{point.name}{suffix}", point.cost(cost) / unit, point.metric(metric))
            for point in drawn
            if point.is_anchor
        ]
    axes.set_xlabel(unit_name, fontsize=12)
    axes.set_ylabel(metric if higher else f"{metric} (lower is better)", fontsize=12, parse_math=False)
    axes.set_title(_title(runs, fronts, metric), fontsize=13, parse_math=False)
    axes.tick_params(labelsize=11)
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(0.05, 0.08)
    _draw_anchors(axes, anchors)
    _add_legends(figure, axes, runs, colours)
    return figure


def _kind_colours(number: int) -> Sequence[str]:
    if number <= len(KIND_COLOURS):
        return KIND_COLOURS[:number]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The ends of the map are nearly black.
    return [to_hex(colormaps[MANY_COLOURS](0.05 + 0.9 * index / (number - 1))) for index in range(number)]


def _draw_stitches(
    axes: Axes,
    points: Sequence[OperatingPoint],
    front: Sequence[OperatingPoint],
    metric: str,
    cost: CostName,
    unit: float,
    colours: dict[str, str],
    marker: str,
) -> None:
    on_front = {point.id for point in front}
    for ringed in (False, True):
        chosen = [point for point in points if not point.is_anchor and (point.id in on_front) is ringed]
        axes.scatter(
            [point.cost(cost) / unit for point in chosen],
            [point.metric(metric) for point in chosen],
            c=[colours[point.kind] for point in chosen],
            marker=marker,
            s=46 if ringed else 30,
            alpha=1.0 if ringed else 0.7,
            edgecolors="black" if ringed else "white",
            linewidths=1.1 if ringed else 0.4,
            zorder=4 if ringed else 3,
        )


def _draw_anchors(axes: Axes, anchors: Sequence[tuple[str, float, float]]) -> None:
    """Stars at (x, y) and their names: above them, or where two anchors come close, on the side with the most room."""
    for _, x, y in anchors:
        axes.plot(x, y, **STAR, markersize=17, zorder=6)
    pixels = axes.figure.dpi / 72
    stars = [tuple(axes.transData.transform((x, y)) / pixels) for _, x, y in anchors]
    names: list[tuple[float, float]] = []
    for (name, x, y), star in zip(anchors, stars, strict=True):
        taken = [*(other for other in stars if other != star), *names]
        places = [(star[0] + dx, star[1] + dy) for dx, dy in NAME_SIDES]
        room = [min([NAME_ROOM, *(math.dist(place, other) for other in taken)]) for place in places]
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


def _title(runs: Sequence[OperatingPoints], fronts: Sequence[Sequence[OperatingPoint]], metric: str) -> str:
    dataset = runs[0].dataset or "Operating points"
    unmeasured = sum(math.isnan(point.metric(metric)) for run in runs for point in run)
    note = f" ({unmeasured} without a value not shown)" if unmeasured else ""
    if len(runs) > 1:
        return f"{dataset}{note}"
    count = f"{len(runs[0])} {'stitch' if len(runs[0]) == 1 else 'stitches'}"
    return f"{dataset}: {count}, {len(fronts[0])} on the Pareto front{note}"


def _add_legends(figure: Figure, axes: Axes, runs: Sequence[OperatingPoints], colours: dict[str, str]) -> None:
    from matplotlib.lines import Line2D

    dot: Mapping[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 7, "markeredgecolor": "white"}
    entries = [(Line2D([], [], color=colour, **dot), kind) for kind, colour in colours.items()]
    entries.append((Line2D([], [], color="0.15", lw=1.3, marker="o", markerfacecolor="none"), "Pareto front"))
    if any(point.is_anchor for run in runs for point in run):
        entries.append((Line2D([], [], **STAR, markersize=13), "anchor"))
    handles, labels = zip(*entries, strict=True)
    columns = math.ceil(len(entries) / math.ceil(len(entries) / LEGEND_COLUMNS))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=11, frameon=False)

    if len(runs) > 1:
        markers = [
            Line2D([], [], linestyle=RUN_LINES[i % len(RUN_LINES)], marker=RUN_MARKERS[i], markersize=7, color="0.35")
            for i in range(len(runs))
        ]
        axes.legend(markers, _run_labels(runs), fontsize=10, loc="best", framealpha=0.9, handlelength=3)


def _run_labels(runs: Sequence[OperatingPoints]) -> list[str]:
    """A number and a name for each run: of its config, and of its checkpoint where configs are the same."""
    configs = [Path(run.config).stem if run.config else "unnamed" for run in runs]
    labels = []
    for number, (run, name) in enumerate(zip(runs, configs, strict=True), start=1):
        if configs.count(name) > 1 and run.checkpoint:
            checkpoint = Path(run.checkpoint)
            name = f"{name}, {checkpoint.parent.name}/{checkpoint.stem}".replace(", /", ", ")
        labels.append(f"{number}: {name if len(name) <= 56 else f'{name[:27]}...{name[-26:]}'}")
    return labels


def _render(figure: Figure, suffix: str) -> bytes:
    """The figure as a PNG or SVG file, from a canvas of its own: pyplot and its settings are left alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    if suffix == ".png":
        FigureCanvasAgg(figure).print_png(buffer)
    else:
        FigureCanvasSVG(figure).print_svg(buffer)
    return buffer.getvalue()
