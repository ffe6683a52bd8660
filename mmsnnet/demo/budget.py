"""Budgets that a slider offers, over the operating points of a model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmsnnet.evaluation import OperatingPoint, OperatingPoints, pareto_front, select_stitch
from mmsnnet.evaluation.operating_points import CostName
from mmsnnet.visualization.chart import flops_unit

STEPS = 50


@dataclass(frozen=True)
class BudgetScale:
    """The budgets of a slider, from the cheapest stitch of the front to the costliest.

    Attributes:
        points: to choose from.
        metric: by which stitches are compared.
        cost: ``'flops'`` or ``'latency_ms'``.
        unit: the name of the slider's unit: GFLOPs, MFLOPs or ms.
        unit_cost: the cost of one unit, in FLOPs or ms.
        minimum, maximum, step: in units. They are round numbers; the minimum suffices for the cheapest stitch.
        decimals: of these numbers.
    """

    points: OperatingPoints
    metric: str
    cost: CostName
    unit: str
    unit_cost: float
    minimum: float
    maximum: float
    step: float
    decimals: int

    @classmethod
    def of(cls, points: OperatingPoints, metric: str, cost: CostName) -> BudgetScale:
        """The scale over the front of some points.

        Raises:
            ValueError: a point lacks the cost or the metric, or no point has a finite metric.
        """
        front = pareto_front(points, cost, metric)
        if not front:
            raise ValueError(f"no stitch has a finite {metric}")
        unit_cost, unit = (1.0, "ms") if cost == "latency_ms" else flops_unit(points)
        least, most = front[0].cost(cost) / unit_cost, front[-1].cost(cost) / unit_cost
        decimals = -math.floor(math.log10((most - least or least) / STEPS))
        step = 10.0**-decimals
        minimum = round(math.ceil(least / step) * step, max(decimals, 0))
        maximum = round(max(math.ceil(most / step) * step, minimum + step), max(decimals, 0))
        return cls(points, metric, cost, unit, unit_cost, minimum, maximum, step, max(decimals, 0))

    def best(self, budget: float) -> OperatingPoint:
        """The best stitch within a budget, in units.

        Raises:
            TypeError: the budget is no number.
            ValueError: it is below the cheapest stitch.
        """
        if self.cost == "latency_ms":
            return select_stitch(self.points, max_latency_ms=budget, metric=self.metric)
        in_gflops = budget * self.unit_cost / 1e9 if isinstance(budget, int | float) else budget
        return select_stitch(self.points, max_gflops=in_gflops, metric=self.metric)


def scales(points: OperatingPoints, metric: str) -> dict[str, BudgetScale]:
    """The scale of FLOPs and, if every point has a latency, the scale of milliseconds; by unit."""
    costs: list[CostName] = ["flops"]
    if all(point.latency_ms is not None for point in points):
        costs.append("latency_ms")
    found = [BudgetScale.of(points, metric, cost) for cost in costs]
    return {scale.unit: scale for scale in found}
