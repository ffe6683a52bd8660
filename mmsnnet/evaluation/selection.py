"""The best stitch under a budget, and the few points that suffice for every budget: data only, no tensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

from mmsnnet.evaluation.operating_points import (
    CostName,
    OperatingPoint,
    OperatingPoints,
    default_metric,
    pareto_front,
)

# The path of a file, or points, which may be entries of "stitches" in such a file.
Points = str | os.PathLike[str] | Iterable[OperatingPoint | Mapping[str, Any]]


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
        front = (replace(point, latency_ms=None) for point in front)
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
