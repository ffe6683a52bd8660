"""Operating points: what each stitch costs and how good it is, as data."""

from mmsnnet.evaluation.operating_points import OperatingPoint, OperatingPoints, common_metric, pareto_front

__all__ = ["OperatingPoint", "OperatingPoints", "common_metric", "pareto_front"]
