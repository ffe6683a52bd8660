"""Operating points: cost and quality of each stitch as data, and the choice among them."""

from mmsnnet.evaluation.metric_names import better_rule, higher_is_better, known_names, main_metric
from mmsnnet.evaluation.operating_points import OperatingPoint, OperatingPoints
from mmsnnet.evaluation.selection import compact_front, default_metric, pareto_front, read_points, select_stitch

__all__ = [
    "OperatingPoint",
    "OperatingPoints",
    "better_rule",
    "compact_front",
    "default_metric",
    "higher_is_better",
    "known_names",
    "main_metric",
    "pareto_front",
    "read_points",
    "select_stitch",
]
