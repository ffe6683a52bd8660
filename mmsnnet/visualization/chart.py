"""Contents of a plot of quality over cost, independent of the plotting library."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mmsnnet.evaluation.metric_names import higher_is_better
from mmsnnet.evaluation.operating_points import CostName, OperatingPoint, OperatingPoints
from mmsnnet.evaluation.selection import default_metric, pareto_front
from mmsnnet.visualization.references import REFERENCES, Reference

MOST_RUNS = 8
# Okabe and Ito's palette, which suits every kind of colour vision; black is for the front and the anchors.
KIND_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# Three and more anchors have more kinds: a map from blue to red gives the kinds of one pair similar colours.
MANY_COLOURS = "turbo"
LONGEST_NAME = 56


@dataclass(frozen=True)
class Chart:
    """Stitches of one or several runs, ``metric`` over ``cost``, with the Pareto front of each run.

    :func:`make_chart` checks the runs and makes one.
    """

    runs: tuple[OperatingPoints, ...]
    fronts: tuple[tuple[OperatingPoint, ...], ...]
    metric: str
    cost: CostName
    higher: bool
    reference: Reference | None

    def drawn(self, run: OperatingPoints) -> list[OperatingPoint]:
        """Points of a run whose metric is not NaN."""
        return [point for point in run if not math.isnan(point.metric(self.metric))]

    def place(self, point: OperatingPoint) -> tuple[float, float]:
        """Coordinates of a point: its cost, in the unit of the axis, and its metric."""
        return point.cost(self.cost) / self._unit[0], point.metric(self.metric)

    def steps(self, run: int) -> list[tuple[float, float]]:
        """Corners of the front's step line.

        Between two points of the front, a larger budget buys nothing better. The line ends at the costliest stitch.
        """
        corners = [self.place(point) for point in self.fronts[run]]
        if not corners:
            return []
        end = max(x for x, _ in map(self.place, self.drawn(self.runs[run])))
        return [*corners, (end, corners[-1][1])]

    @cached_property
    def colours(self) -> Mapping[str, str]:
        """Colour of each kind of stitch, in the order of ids, without anchors."""
        by_id = sorted((point for run in self.runs for point in run), key=lambda point: point.id)
        kinds = list(dict.fromkeys(point.kind for point in by_id if not point.is_anchor))
        return dict(zip(kinds, _kind_colours(len(kinds)), strict=True))

    @property
    def x_label(self) -> str:
        devices = {run.benchmark.get("device") for run in self.runs} if self.cost == "latency_ms" else {None}
        on = f" on {devices.pop()}" if len(devices) == 1 and None not in devices else ""
        return f"{self._unit[1]}{on}{' at the input size of each' if len(self._shapes) > 1 else ''}"

    @property
    def y_label(self) -> str:
        return self.metric if self.higher else f"{self.metric} (lower is better)"

    @property
    def title(self) -> str:
        dataset = self.runs[0].dataset or "Operating points"
        unmeasured = sum(len(run) - len(self.drawn(run)) for run in self.runs)
        note = f" ({unmeasured} without a value not shown)" if unmeasured else ""
        if len(self.runs) > 1:
            return f"{dataset}{note}"
        count = f"{len(self.runs[0])} {'stitch' if len(self.runs[0]) == 1 else 'stitches'}"
        return f"{dataset}: {count}, {len(self.fronts[0])} on the Pareto front{note}"

    @property
    def run_names(self) -> list[str]:
        """Number and name of each run: its config, and its checkpoint if runs share a config.

        If runs differ in the input size or, for latencies, in the settings of the measurement, the name includes them.
        """
        names = self._configs_and_checkpoints()
        # The plot shows the latencies of `batch_size`, the first of `batch_sizes`.
        hidden = ("date", "batch_sizes")
        settings = dict.fromkeys(key for run in self.runs for key in run.benchmark if key not in hidden)
        differing = [key for key in settings if len({run.benchmark.get(key) for run in self.runs}) > 1]
        for index, run in enumerate(self.runs):
            names[index] += self.size_note(run)
            if self.cost == "latency_ms":
                names[index] += "".join(f", {key} {run.benchmark.get(key)}" for key in differing)
        return [f"{number}: {name}" for number, name in enumerate(names, start=1)] if len(names) > 1 else names

    def size_note(self, measured: OperatingPoints | Reference) -> str:
        """Input size of a run or of the reference, as a suffix; empty if all have the same."""
        height, width = measured.input_shape
        return f", {height} x {width}" if len(self._shapes) > 1 else ""

    def _configs_and_checkpoints(self) -> list[str]:
        configs = [Path(run.config).stem if run.config else "unnamed" for run in self.runs]
        names = []
        for run, name in zip(self.runs, configs, strict=True):
            if configs.count(name) > 1 and run.checkpoint:
                checkpoint = Path(run.checkpoint)
                name = f"{name}, {checkpoint.parent.name}/{checkpoint.stem}".replace(", /", ", ")
            names.append(name if len(name) <= LONGEST_NAME else f"{name[:27]}...{name[-26:]}")
        return names

    @cached_property
    def _unit(self) -> tuple[float, str]:
        if self.cost == "latency_ms":
            return 1.0, "latency (ms)"
        # The paper reports GFLOPs.
        return (1e9, "GFLOPs") if self.reference else flops_unit(point for run in self.runs for point in run)

    @cached_property
    def _shapes(self) -> set[tuple[int, int]]:
        shapes = {run.input_shape for run in self.runs}
        return {*shapes, self.reference.input_shape} if self.reference else shapes


def make_chart(
    runs: Sequence[OperatingPoints],
    metric: str | None,
    cost: CostName,
    higher: bool | None,
    reference: str | None,
) -> Chart:
    """Make a chart of ``runs``; the arguments are those of :func:`mmsnnet.visualization.plot_pareto`.

    Raises:
        ValueError: nothing to draw, too many runs, several data sets, a stitch without the metric or the cost, a metric
            with an unknown name without ``higher``, or a reference for another data set, metric or cost.
    """
    points = _check_runs(runs)
    name = default_metric(points) if metric is None else metric
    if higher is None:
        higher = higher_is_better(name)
    fronts = tuple(pareto_front(run, cost, name, higher=higher) for run in runs)
    if not any(fronts):
        raise ValueError(f"metric {name!r} is NaN for every stitch: nothing to draw")
    reported = None if reference is None else _check_reference(reference, runs[0].dataset, name, cost)
    return Chart(tuple(runs), fronts, name, cost, higher, reported)


def flops_unit(points: Iterable[OperatingPoint]) -> tuple[float, str]:
    """Unit for the FLOPs of ``points``, with its name: (1e9, "GFLOPs"), or (1e6, "MFLOPs") if all are below 1 G."""
    return (1e9, "GFLOPs") if max((point.flops for point in points), default=0) >= 1e9 else (1e6, "MFLOPs")


def _check_runs(runs: Sequence[OperatingPoints]) -> list[OperatingPoint]:
    """Return all points of ``runs`` if one plot can show them."""
    if not 1 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"expected 1 to {MOST_RUNS} runs on one plot, found {len(runs)}")
    for number, run in enumerate(runs, start=1):
        if not len(run):
            raise ValueError(f"run {number} ({run.config}) has no stitches: nothing to draw")
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    if len(datasets) > 1:
        names = ", ".join(dataset or "an unnamed one" for dataset in datasets)
        raise ValueError(f"runs of different data sets cannot share a plot, found {names}")
    return [point for run in runs for point in run]


def _check_reference(name: str, dataset: str | None, metric: str, cost: CostName) -> Reference:
    if name not in REFERENCES:
        raise ValueError(f"reference: expected {' or '.join(REFERENCES)}, got {name!r}")
    reference = REFERENCES[name]
    if dataset != reference.dataset:
        raise ValueError(
            f"reference {name} is for {reference.dataset}, but the operating points are for "
            f"{dataset or 'an unnamed data set'}"
        )
    if (metric, cost) != (reference.metric, "flops"):
        raise ValueError(f"reference {name} is {reference.metric} over flops, but the plot is {metric} over {cost}")
    return reference


def _kind_colours(number: int) -> Sequence[str]:
    if number <= len(KIND_COLOURS):
        return KIND_COLOURS[:number]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # The ends of the map are nearly black.
    return [to_hex(colormaps[MANY_COLOURS](0.05 + 0.9 * index / (number - 1))) for index in range(number)]
