"""The Pareto front, the best stitch under a budget, and the few points that suffice for every budget.

Data only, no tensors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from mmsnnet.evaluation.metric_names import higher_is_better, main_metric
from mmsnnet.evaluation.operating_points import CostName, OperatingPoint, OperatingPoints

# The path of a file, or points, which may be entries of "stitches" in such a file.
Points = str | os.PathLike[str] | Iterable[OperatingPoint | Mapping[str, Any]]


def default_metric(points: Iterable[OperatingPoint]) -> str:
    """The only metric that all points have, or else the main metric of their task.

    Raises:
        ValueError: there are no points, they have no metric in common, or several without the main metric of a task;
            the message lists them.
    """
    points = tuple(points)
    if not points:
        raise ValueError("expected operating points, found none")
    common = [name for name in points[0].metrics if all(name in point.metrics for point in points)]
    main = main_metric(common)
    if len(common) == 1 or main is not None:
        return main or common[0]
    if common:
        names = ", ".join(common)
        raise ValueError(f"which metric? The points have {len(common)} in common: {names}; say which (--metric)")
    some = dict.fromkeys(name for point in points for name in point.metrics)
    if not some:
        raise ValueError(
            "expected points with metrics, found none: tools/test.py CONFIG CHECKPOINT --out FILE.json measures them"
        )
    raise ValueError(f"expected a metric that all points have, found {', '.join(some)} in some of them only")


def pareto_front(
    points: Iterable[OperatingPoint],
    cost: CostName = "flops",
    metric: str | None = None,
    *,
    higher: bool | None = None,
) -> tuple[OperatingPoint, ...]:
    """The points that no other point dominates, by ascending cost.

    A point dominates another if it is no worse in cost and in ``metric``, and better in one of them. Points that are
    equal in both all stay, in the order of ``points``. A point whose metric is NaN is never on the front.

    Args:
        points: any number.
        cost: ``flops`` or ``latency_ms``.
        metric: by name; None for :func:`default_metric`.
        higher: whether higher values of the metric are better; None for :func:`higher_is_better` of its name.

    Raises:
        ValueError: a point lacks the cost or the metric, ``metric`` is None and there is no default, or ``higher`` is
            None and the metric's name is not known.
    """
    points = tuple(points)
    if not points:
        return ()
    name = default_metric(points) if metric is None else metric
    measured = [(point.cost(cost), point.metric(name), point) for point in points]
    sign = 1 if (higher_is_better(name) if higher is None else higher) else -1
    measured = [(price, sign * quality, point) for price, quality, point in measured]
    measured = [entry for entry in measured if not math.isnan(entry[1])]
    measured.sort(key=lambda entry: (entry[0], -entry[1]))
    front: list[OperatingPoint] = []
    last: tuple[float, float] | None = None
    for price, quality, point in measured:
        if last is None or quality > last[1] or (price, quality) == last:
            front.append(point)
            last = price, quality
    return tuple(front)


def select_stitch(
    points: Points,
    *,
    max_gflops: float | None = None,
    max_latency_ms: float | None = None,
    metric: str | None = None,
    higher: bool | None = None,
) -> OperatingPoint:
    """The best stitch within a budget; among equally good ones the cheapest, then the one with the lowest id.

    A stitch whose metric is NaN is never chosen. The budget is either ``max_gflops`` or ``max_latency_ms``.

    Args:
        points: of the stitches to choose from, as :func:`read_points` takes them.
        max_gflops: the budget in 1e9 multiply-accumulates.
        max_latency_ms: the budget in milliseconds, on the device where the points were measured.
        metric, higher: as of :func:`mmsnnet.evaluation.pareto_front`.

    Raises:
        FileNotFoundError: ``points`` is a path without a file.
        TypeError: the budget is no number.
        ValueError: there is no budget, or there are two; the budget is below the cheapest stitch; a point lacks the
            cost or the metric; no point has a finite metric, or :func:`mmsnnet.evaluation.pareto_front` refuses it.
    """
    cost, budget = _one_budget(max_gflops, max_latency_ms)
    candidates = sorted(read_points(points), key=lambda point: point.id)
    name = default_metric(candidates) if metric is None else metric
    front = pareto_front(candidates, cost, name, higher=higher)
    if not front:
        raise ValueError(f"no stitch has a finite {name}" if candidates else "expected operating points, found none")
    within = [point for point in front if _in_units_of_budget(point, cost) <= budget]
    if not within:
        unit = "GFLOPs" if cost == "flops" else "ms"
        raise ValueError(
            f"a budget of {budget} {unit} is below the cheapest stitch, {front[0]}, which needs "
            f"{_in_units_of_budget(front[0], cost)} {unit}"
        )
    # On the front, the most expensive point is the best; max gives the first of equal ones.
    return max(within, key=lambda point: point.cost(cost))


def compact_front(points: OperatingPoints, metric: str | None = None, *, higher: bool | None = None) -> OperatingPoints:
    """The operating points that suffice to choose a stitch under any budget.

    These are the points on the Pareto front over FLOPs and, if all points have latencies, over latency, each with this
    metric only. :func:`select_stitch` chooses the same stitch from them as from all points.

    Args:
        points: of one run.
        metric, higher: as of :func:`mmsnnet.evaluation.pareto_front`.

    Raises:
        ValueError: as :func:`mmsnnet.evaluation.pareto_front`; no point has a finite metric.
    """
    name = default_metric(points) if metric is None else metric
    timed = all(point.latency_ms is not None for point in points)
    costs: tuple[CostName, ...] = ("flops", "latency_ms") if timed else ("flops",)
    chosen = {point.id for cost in costs for point in pareto_front(points, cost, name, higher=higher)}
    if not chosen:
        raise ValueError(f"no stitch has a finite {name}" if len(points) else "expected operating points, found none")
    front = (replace(point, metrics={name: point.metric(name)}) for point in points if point.id in chosen)
    if not timed:  # the latencies of some points give no front
        front = (replace(point, latency_ms=None, latencies_ms={}) for point in front)
    # Without a fingerprint no run can resume from these points, which lack most stitches.
    return replace(points, points=tuple(front), fingerprint={})


def read_points(points: Points) -> tuple[OperatingPoint, ...]:
    """Operating points from a file, or from an iterable of points or of mappings with the keys of such a file.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``points`` is neither a path nor such an iterable.
        ValueError: the file is damaged, or a mapping lacks a key or has a wrong value.
    """
    if isinstance(points, str | os.PathLike):
        return OperatingPoints.load(points).points
    if isinstance(points, Mapping) or not isinstance(points, Iterable):
        raise TypeError(f"points: expected a file of operating points or a list of them, found {points!r}")
    return tuple(point if isinstance(point, OperatingPoint) else OperatingPoint.from_json(point) for point in points)


def _one_budget(max_gflops: float | None, max_latency_ms: float | None) -> tuple[CostName, float]:
    budgets = {"max_gflops": max_gflops, "max_latency_ms": max_latency_ms}
    budgets = {key: budget for key, budget in budgets.items() if budget is not None}
    if len(budgets) != 1:
        settings = " and ".join(f"{key}={budget}" for key, budget in budgets.items())
        raise ValueError(f"a budget is max_gflops or max_latency_ms, one of the two; got {settings or 'neither'}")
    ((key, budget),) = budgets.items()
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"{key}: expected a number, found {budget!r}")
    if not budget > 0:
        raise ValueError(f"{key}: expected a positive number, found {budget}")
    return ("flops" if key == "max_gflops" else "latency_ms"), budget


def _in_units_of_budget(point: OperatingPoint, cost: CostName) -> float:
    # A product of the budget could exceed the cost by rounding: this quotient, printed and used as a budget, suffices.
    return point.cost(cost) / 1e9 if cost == "flops" else point.cost(cost)
