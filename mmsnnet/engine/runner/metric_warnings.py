"""Warnings of figures that mean less than they seem to: classes that never occur, metrics without a value."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.evaluator import BaseMetric

SETS = dict(val="validation", test="test")
# COCO's code gives -1 where there is nothing to detect.
DETECTION = re.compile(r"(.+/)?(\w+_)?m?(AP|AR)\d*([_@]\S+)?")


def few(names: Sequence[str], most: int = 4) -> str:
    """Join names with commas; show at most ``most`` and count the rest."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def absent_classes(metric: BaseMetric, stage: str) -> str | None:
    """A warning of classes that occur in no label map of a set, None if all occur or the metric does not tell.

    To be called on all ranks, before the metric is evaluated: mmseg's ``IoUMetric`` keeps the area of each class.
    """
    stock = getattr(sys.modules.get("mmseg.evaluation.metrics.iou_metric"), "IoUMetric", None)
    if stock is None or not isinstance(metric, stock) or metric.format_only:
        return None
    changed = any(
        getattr(type(metric), name) is not getattr(stock, name) for name in ("process", "intersect_and_union")
    )
    if changed:
        return None
    classes = metric.dataset_meta["classes"]
    areas = torch.zeros(len(classes), dtype=torch.float64)
    for *_, area in metric.results:
        areas += area
    all_reduce(areas)
    absent = [name for name, area in zip(classes, areas.tolist(), strict=True) if area == 0]
    if not absent:
        return None
    means_none = f"label {metric.ignore_index} means no class"
    if len(absent) == len(classes):
        return (
            f"no class occurs in the label maps of the {SETS[stage]} set, so there is nothing to measure: {means_none}"
        )
    return (
        f"{few(absent)} never occur{'s' * (len(absent) == 1)} in the label maps of the {SETS[stage]} set: mIoU and "
        f"other means over classes are over {len(classes) - len(absent)} of {len(classes)} classes, and over those of "
        f"the others that are predicted, as 0. {means_none[0].upper()}{means_none[1:]}"
    )


def empty_metrics(metrics: Mapping[str, Mapping[str, float]]) -> str | None:
    """Warn of stitches whose metrics are all NaN, or -1 as of COCO: each is NaN, or COCO's -1. None if there are none.

    Args:
        metrics: by the stitch's name, its metrics that are numbers.
    """
    empty = [name for name, found in metrics.items() if found and all(map(_is_empty, found, found.values()))]
    if not empty:
        return None
    found = [value for name in empty for value in metrics[name].values()]
    whose = f"every metric of {few(empty)}"
    if not any(map(math.isnan, found)):
        return f"{whose} is -1: the annotation file has no boxes, but for crowds, of the data set's classes"
    return (
        f"{whose} is NaN: either no pixel or object of the set has a valid label (all of them ignored, or out of the "
        "range that the evaluator looks at), or what the model predicts is not finite"
    )


def _is_empty(name: str, value: float) -> bool:
    return math.isnan(value) or (value == -1 and DETECTION.fullmatch(name) is not None)
