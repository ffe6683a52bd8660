"""Choose the stitch of a backbone by its measured operating points."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, read_points, select_stitch
from mmsnnet.evaluation.selection import Points
from mmsnnet.stitching import StitchSpace


class Budget:
    """Chooses operating points of a backbone; keeps points and metric for the next choice.

    Args:
        space: the stitch space of the backbone.
    """

    def __init__(self, space: StitchSpace) -> None:
        self.space = space
        self._points: tuple[OperatingPoint, ...] | None = None
        self._metric: str | None = None

    def choose(self, points: Points | None, metric: str | None, **budget: Any) -> OperatingPoint:
        """Choose the best operating point within a budget; see :meth:`StitchedBackbone.set_budget`.

        Args:
            budget: ``max_gflops``, ``max_latency_ms`` and ``higher``, as of :func:`mmsnnet.evaluation.select_stitch`.
        """
        if points is not None:
            candidates = points_of_space(points, self.space)
        elif self._points is not None:
            candidates, metric = self._points, self._metric if metric is None else metric
        else:
            raise ValueError(
                "a budget needs points to choose from: give the file of operating points that tools/test.py --out wrote"
            )
        chosen = select_stitch(candidates, metric=metric, **budget)
        self._points, self._metric = candidates, metric
        return chosen


def points_of_space(points: Points, space: StitchSpace) -> tuple[OperatingPoint, ...]:
    """Read operating points and check that they belong to this stitch space (:func:`check_points`)."""
    points = OperatingPoints.load(points) if isinstance(points, str | os.PathLike) else points
    candidates = read_points(points)
    check_points(points if isinstance(points, OperatingPoints) else candidates, space)
    return candidates


def check_points(points: Iterable[OperatingPoint], space: StitchSpace) -> None:
    """Check by id and name that operating points belong to this stitch space, and that they were not recalibrated.

    Raises:
        ValueError: a point belongs to another space, or was measured with batch norms that were recalibrated for it.
    """
    if isinstance(points, OperatingPoints) and points.recalibrated is not None:
        raise SettingError(
            "the operating points were measured with batch norms recalibrated for each stitch, and here all stitches "
            "share one set of statistics: give points measured without --recalibrate, or extract one stitch with "
            f"extract_stitch.py --recalibrate {points.recalibrated}"
        )
    for point in points:
        if point.id not in space:
            reason = f"stitch {point} is not in this one, of {len(space)} stitches"
        elif (stitch := space[point.id]).name != point.name:
            reason = f"id {point.id} is {point.name} there, and {stitch.name} here"
        else:
            continue
        raise ValueError(f"the operating points are of another stitch space: {reason}")
