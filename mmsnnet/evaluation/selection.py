"""The best stitch under a budget, and the few points that answer every budget: data only, no tensors."""

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

# A file, what is in it, or points one by one, which may be as the file's "stitches" has them.
Points = str | os.PathLike[str] | Iterable[OperatingPoint | Mapping[str, Any]]


def select_stitch(
    points: Points,
    *,
    max_gflops: float | None = None,
    max_latency_ms: float | None = None,
    metric: str | None = None,
    higher: bool | None = None,
) -> OperatingPoint:
    """The best stitch that costs no more than a budget: of equally good ones the cheapest, of those the lowest id.

    A stitch whose metric is NaN is never chosen.

    Args:
        points: of the stitches to choose from, as :func:`read_points` takes them.
        max_gflops: at most so many 1e9 multiply-accumulates.
        max_latency_ms: at most so many milliseconds, on the device where the points were measured. Exactly one of the
            two is given.
        metric, higher: as of :func:`mmsnnet.evaluation.pareto_front`.

    Raises:
        FileNotFoundError: ``points`` names no file.
        TypeError: a budget that is no number.
        ValueError: no budget, or both; a budget below the cheapest stitch; a point that lacks the cost or the metric;
            a metric that is finite nowhere, or that :func:`mmsnnet.evaluation.pareto_front` refuses.
    """
    cost, budget = _one_budget(max_gflops, max_latency_ms)
    found = sorted(read_points(points), key=lambda point: point.id)
    name = default_metric(found) if metric is None else metric
    front = pareto_front(found, cost, name, higher=higher)
    if not front:
        raise ValueError(f"no stitch has a finite {name}" if found else "expected operating points, found none")
    within = [point for point in front if _in_units_of_budget(point, cost) <= budget]
    if not within:
        unit = "GFLOPs" if cost == "flops" else "ms"
        raise ValueError(
            f"a budget of {budget} {unit} is below the cheapest stitch, {front[0]}, which needs "
            f"{_in_units_of_budget(front[0], cost)} {unit}"
        )
    # The dearest on the front is the best; of twins, the first.
    return max(within, key=lambda point: point.cost(cost))


def compact_front(points: OperatingPoints, metric: str | None = None, *, higher: bool | None = None) -> OperatingPoints:
    """What a model needs of its operating points to choose a stitch under any budget: those on the Pareto front over
    FLOPs and, where all points have latencies, on that over latency, each with this metric alone.

    :func:`select_stitch` gives the same stitch from it as from all points.

    Args:
        points: of one run.
        metric, higher: as of :func:`mmsnnet.evaluation.pareto_front`.

    Raises:
        ValueError: as :func:`mmsnnet.evaluation.pareto_front`; the metric is finite nowhere.
    """
    name = default_metric(points) if metric is None else metric
    timed = all(point.latency_ms is not None for point in points)
    costs: tuple[CostName, ...] = ("flops", "latency_ms") if timed else ("flops",)
    chosen = {point.id for cost in costs for point in pareto_front(points, cost, name, higher=higher)}
    if not chosen:
        raise ValueError(f"no stitch has a finite {name}" if len(points) else "expected operating points, found none")
    front = (replace(point, metrics={name: point.metric(name)}) for point in points if point.id in chosen)
    if not timed:  # A few latencies tell nothing of the front over latency.
        front = (replace(point, latency_ms=None) for point in front)
    # What a run would resume from has all stitches: this has no fingerprint.
    return replace(points, points=tuple(front), fingerprint={})


def read_points(points: Points) -> tuple[OperatingPoint, ...]:
    """Points from the path of a file of operating points, from its contents, or one by one: as ``OperatingPoint``, or
    as a mapping with the keys that a stitch has in such a file.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: what is given is none of these.
        ValueError: the file is damaged, or a mapping lacks a key or has a wrong value.
    """
    if isinstance(points, str | os.PathLike):
        return OperatingPoints.load(points).points
    if isinstance(points, Mapping) or not isinstance(points, Iterable):
        raise TypeError(f"points: expected a file of operating points or a list of them, found {points!r}")
    return tuple(point if isinstance(point, OperatingPoint) else OperatingPoint.from_json(point) for point in points)


def _one_budget(max_gflops: float | None, max_latency_ms: float | None) -> tuple[CostName, float]:
    given = {"max_gflops": max_gflops, "max_latency_ms": max_latency_ms}
    given = {key: budget for key, budget in given.items() if budget is not None}
    if len(given) != 1:
        found = " and ".join(f"{key}={budget}" for key, budget in given.items())
        raise ValueError(f"a budget is max_gflops or max_latency_ms, one of the two; got {found or 'neither'}")
    ((key, budget),) = given.items()
    if isinstance(budget, bool) or not isinstance(budget, Real):
        raise TypeError(f"{key}: expected a number, found {budget!r}")
    if not budget > 0:
        raise ValueError(f"{key}: expected a positive number, found {budget}")
    return ("flops" if key == "max_gflops" else "latency_ms"), budget


def _in_units_of_budget(point: OperatingPoint, cost: CostName) -> float:
    # A quotient, because the number that it prints as, given back as a budget, is then no smaller.
    return point.cost(cost) / 1e9 if cost == "flops" else point.cost(cost)
