"""Warnings of absent classes and of NaN metrics: of classes that never occur, and of NaN."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric

from mmsnnet.files.reading import join_names

SETS = dict(val="validation", test="test")
MOST_NAMES = 4
# COCO's code gives -1 if there is nothing to detect.
DETECTION = re.compile(r"(.+/)?(\w+_)?m?(AP|AR)\d*([_@]\S+)?")


def absent_classes_warning(metric: BaseMetric, stage: str) -> str | None:
    """A warning of classes that occur in no label map; None if all occur or the metric is of another kind.

    mmseg's ``IoUMetric`` holds the area of each class until it is evaluated. Call this on all ranks, before the metric
    is evaluated.
    """
    stock = getattr(sys.modules.get("mmseg.evaluation.metrics.iou_metric"), "IoUMetric", None)
    if stock is None or not isinstance(metric, stock) or metric.format_only:
        return None
    if any(getattr(type(metric), name) is not getattr(stock, name) for name in ("process", "intersect_and_union")):
        return None  # a subclass may hold something else
    classes = metric.dataset_meta["classes"]
    areas = torch.zeros(len(classes), dtype=torch.float64)
    for *_, area in metric.results:
        areas += area
    all_reduce(areas)
    absent = [name for name, area in zip(classes, areas.tolist(), strict=True) if area == 0]
    if not absent:
        return None
    ignored = f"label {metric.ignore_index} means no class"
    if len(absent) == len(classes):
        return f"no class occurs in the label maps of the {SETS[stage]} set, so there is nothing to measure: {ignored}"
    return (
        f"{join_names(absent, MOST_NAMES)} never occur{'s' * (len(absent) == 1)} in the label maps of the "
        f"{SETS[stage]} set: mIoU and other means are over {len(classes) - len(absent)} of {len(classes)} classes, "
        f"plus a 0 for each absent class that the model predicts. {ignored.capitalize()}"
    )


def empty_metrics_warning(metrics: Mapping[str, Mapping[str, float]]) -> str | None:
    """A warning of stitches whose metrics are all NaN, or all -1 as COCO's may be; None if there are none.

    Args:
        metrics: the numbers of each stitch, by its name.
    """
    empty = [name for name, values in metrics.items() if values and all(map(_is_empty, values, values.values()))]
    if not empty:
        return None
    subject = f"every metric of {join_names(empty, MOST_NAMES)}"
    if not any(math.isnan(value) for name in empty for value in metrics[name].values()):
        return f"{subject} is -1: the annotation file has no boxes of the data set's classes, except for crowds"
    return (
        f"{subject} is NaN: either no pixel or object has a valid label (all are ignored, or outside the evaluator's "
        "range), or the model's predictions are not finite"
    )


def _is_empty(name: str, value: float) -> bool:
    return math.isnan(value) or (value == -1 and DETECTION.fullmatch(name) is not None)
