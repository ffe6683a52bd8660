"""Tables of operating points for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmsnnet.errors import needs_extra
from mmsnnet.evaluation.operating_points import CostName, OperatingPoints
from mmsnnet.evaluation.selection import pareto_front
from mmsnnet.visualization.chart import flops_unit

if TYPE_CHECKING:
    from rich.table import Table

MOST_METRICS = 4


@needs_extra("viz")
def operating_points_table(
    points: OperatingPoints,
    metric: str | None = None,
    cost: CostName = "flops",
    *,
    higher: bool | None = None,
) -> Table:
    """Make a table with one row per stitch, by ascending ``cost``, with ``metric`` and up to three other metrics.

    Stitches on the Pareto front of ``metric`` over ``cost`` are bold and marked "front" in the last column; anchors are
    marked "anchor". Without a metric there is no front. ``metric`` and ``higher`` are those of
    :func:`mmsnnet.evaluation.pareto_front`.

    Raises:
        ValueError: a stitch lacks the metric or the cost, or the metric has an unknown name and ``higher`` is None.
        MissingPackageError: rich is not installed.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    front: set[int] = set()
    names: list[str] = []
    if metric is not None:
        names = [metric]
        front = {point.id for point in pareto_front(points, cost, metric, higher=higher)}
    unit, unit_name = flops_unit(points)
    measured = list(dict.fromkeys(key for point in points for key in (*names, *point.metrics)))
    metrics, more = measured[:MOST_METRICS], measured[MOST_METRICS:]
    values = [[point.metrics.get(key) for point in points] for key in metrics]
    decimals = {key: _decimals(column) for key, column in zip(metrics, values, strict=True)}
    timed = any(point.latency_ms is not None for point in points)

    caption = f"not shown: {', '.join(more)}" if more else None
    table = Table(title=Text(points.dataset) if points.dataset else None, box=SIMPLE_HEAD, caption=caption)
    table.add_column("id", justify="right", no_wrap=True)
    table.add_column("name", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for header in (unit_name, "params (M)", *(["latency (ms)"] if timed else []), *metrics):
        table.add_column(Text(header), justify="right", no_wrap=True)
    table.add_column("mark", no_wrap=True)
    for point in sorted(points, key=lambda point: point.cost(cost)):
        cells = [str(point.id), point.name, point.kind, f"{point.flops / unit:.2f}", f"{point.params / 1e6:.2f}"]
        if timed:
            cells.append(_cell(point.latency_ms, 2))
        cells += [_cell(point.metrics.get(key), decimals[key]) for key in metrics]
        marks = ["front"] * (point.id in front) + ["anchor"] * point.is_anchor
        cells.append(", ".join(marks))
        table.add_row(*(Text(cell) for cell in cells), style="bold" if point.id in front else None)
    return table


@needs_extra("viz")
def print_table(table: Table) -> None:
    """Print to the terminal; a file or pipe gets the full width of the table, so no cell is truncated."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=console.measure(table, options=console.options.update(width=1000)).maximum)
    console.print(table)


def _cell(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def _decimals(values: Sequence[float | None]) -> int:
    """Two decimals for percentages, four for small values such as relative errors."""
    return 2 if any(value is not None and not math.isnan(value) and abs(value) >= 10 for value in values) else 4
