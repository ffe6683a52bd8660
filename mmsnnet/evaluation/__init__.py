"""Operating points: what each stitch costs and how good it is, as data."""

from mmsnnet.evaluation.operating_points import (
    OperatingPoint,
    OperatingPoints,
    default_metric,
    higher_is_better,
    pareto_front,
)

__all__ = ["OperatingPoint", "OperatingPoints", "default_metric", "higher_is_better", "pareto_front"]
