"""Names of metrics: those that an evaluator gives, the main one of a task, and whether higher is better.

The classes of the toolboxes are looked up by name, so that nothing imports the toolboxes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# The main metric of each task.
MAIN_METRICS = ("mIoU", "bbox_mAP", "top1", "abs_rel")
HIGHER_IS_BETTER = (
    r"aAcc|m(IoU|Acc|Dice|Fscore|Precision|Recall)",  # mmseg's IoUMetric
    r"d[123]",  # mmseg's DepthMetric
    r"(\w+_)?m?AP(_?\d+|_[sml])?|AR(_[sml])?@\d+|\w+_precision",  # mmdet's CocoMetric and VOCMetric
    r"top\d+|accuracy",
)
LOWER_IS_BETTER = (
    r"abs_rel|sq_rel|rmse|rmse_log|log10|silog",  # mmseg's DepthMetric
    r"(.+[._])?loss([._].+)?|latency_ms",
)
# The items of COCO's metrics of boxes and of masks.
COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")


def higher_is_better(metric: str) -> bool:
    """Whether higher values of a metric are better, by its name after the last slash (``coco/bbox_mAP``).

    Raises:
        ValueError: the name is not known.
    """
    name = metric.rpartition("/")[2]
    for patterns, higher in ((LOWER_IS_BETTER, False), (HIGHER_IS_BETTER, True)):
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            return higher
    raise ValueError(
        f"metric {metric!r} is not known, nor whether more or less of it is better: say which, by --better of the "
        "tools or higher=True or False in Python"
    )


def better_rule(metric: str) -> str | None:
    """mmengine's ``rule`` for a metric, ``'greater'`` or ``'less'``; None if the name is not known."""
    try:
        return "greater" if higher_is_better(metric) else "less"
    except ValueError:
        return None


def main_metric(names: Iterable[str]) -> str | None:
    """The first of these metrics that is the main one of a task, None if none is."""
    names = tuple(names)
    return next((name for main in MAIN_METRICS for name in names if name.rpartition("/")[2] == main), None)


def known_names(metric: Any) -> tuple[str, ...] | None:
    """The names of the values that a metric gives, with its prefix; None if its class is not known.

    A subclass is known as long as it overrides neither ``compute_metrics`` nor ``evaluate``.

    Args:
        metric: a ``BaseMetric`` of mmengine's.
    """
    computes = next((cls for cls in type(metric).__mro__ if "compute_metrics" in vars(cls)), None)
    evaluates = next((cls for cls in type(metric).__mro__ if "evaluate" in vars(cls)), None)
    if computes is None or evaluates is None or class_path(evaluates) != "mmengine.evaluator.metric.BaseMetric":
        return None
    names = NAMES.get(class_path(computes))
    if names is None:
        return None
    unprefixed = () if getattr(metric, "format_only", False) else dict.fromkeys(names(metric))
    prefix = getattr(metric, "prefix", None)
    return tuple(f"{prefix}/{name}" if prefix else name for name in unprefixed)


def class_path(cls: type) -> str:
    """The name of a class with its module, by which it is looked up."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _names_of_segmentation(metric: Any) -> Iterable[str]:
    parts = dict(mIoU=("mIoU", "mAcc"), mDice=("mDice", "mAcc"), mFscore=("mFscore", "mPrecision", "mRecall"))
    families = [metric.metrics] if isinstance(metric.metrics, str) else metric.metrics
    return ("aAcc", *(name for family in families for name in parts.get(family, ())))


def _names_of_coco(metric: Any) -> Iterable[str]:
    classes = (metric.dataset_meta or {}).get("classes", ())
    for family in metric.metrics:
        if family == "proposal_fast":
            yield from (f"AR@{number}" for number in metric.proposal_nums)
        elif family == "proposal":
            recalls = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")
            yield from metric.metric_items or recalls
        else:
            yield from (f"{family}_{item}" for item in metric.metric_items or COCO_ITEMS)
            if metric.classwise:
                yield from (f"{name}_precision" for name in classes)


def _names_of_voc(metric: Any) -> Iterable[str]:
    if metric.metric == "mAP":
        return ("mAP", *(f"AP{int(threshold * 100):02d}" for threshold in metric.iou_thrs))
    numbers, thresholds = metric.proposal_nums, metric.iou_thrs
    recalls = [f"recall@{number}@{threshold}" for number in numbers for threshold in thresholds]
    return (*recalls, *(f"AR@{number}" for number in numbers if len(thresholds) > 1))


# The names that a class gives without a prefix, by the class that defines ``compute_metrics``.
NAMES: Mapping[str, Callable[[Any], Iterable[str]]] = {
    "mmengine.evaluator.metric.DumpResults": lambda _: (),
    "mmseg.evaluation.metrics.iou_metric.IoUMetric": _names_of_segmentation,
    "mmseg.evaluation.metrics.depth_metric.DepthMetric": lambda metric: metric.metrics,
    "mmseg.evaluation.metrics.citys_metric.CityscapesMetric": lambda _: (
        "averageScoreCategories",
        "averageScoreInstCategories",
    ),
    "mmdet.evaluation.metrics.coco_metric.CocoMetric": _names_of_coco,
    "mmdet.evaluation.metrics.cityscapes_metric.CityScapesMetric": lambda _: ("mAP", "AP@50"),
    "mmdet.evaluation.metrics.dump_proposals_metric.DumpProposals": lambda _: (),
    "mmdet.evaluation.metrics.faster_coco_metric.FasterCocoMetric": _names_of_coco,
    "mmdet.evaluation.metrics.voc_metric.VOCMetric": _names_of_voc,
    "mmsnnet.evaluation.metrics.accuracy.Accuracy": lambda metric: [f"top{k}" for k in metric.topk],
    "mmsnnet.evaluation.metrics.coco_metric.CocoMetric": _names_of_coco,
}
