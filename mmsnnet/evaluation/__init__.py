"""Operating points: what each stitch costs and how good it is, as data, and the choice of one."""

from mmsnnet.evaluation.operating_points import (
    OperatingPoint,
    OperatingPoints,
    default_metric,
    higher_is_better,
    pareto_front,
)
from mmsnnet.evaluation.selection import compact_front, read_points, select_stitch

__all__ = [
    "OperatingPoint",
    "OperatingPoints",
    "compact_front",
    "default_metric",
    "higher_is_better",
    "pareto_front",
    "read_points",
    "select_stitch",
]
