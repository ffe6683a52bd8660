"""Figures that mean less than they seem to are said to."""

import math
from typing import Any

import pytest
import torch
from mmseg.evaluation import IoUMetric

from mmsnnet.engine.runner.metric_warnings import absent_classes, empty_metrics, few

NAN = math.nan


def measured(*labels: list[int], classes: int = 3, **settings: Any) -> IoUMetric:
    """The metric after it has seen images of these labels, of which all are predicted as 0."""
    metric = IoUMetric(**settings)
    metric.dataset_meta = dict(classes=[f"c{i}" for i in range(classes)])
    for values in labels:
        truth = torch.tensor([values])
        metric.process({}, [dict(pred_sem_seg=dict(data=truth * 0), gt_sem_seg=dict(data=truth), img_path="a.png")])
    return metric


def test_classes_that_never_occur() -> None:
    assert absent_classes(measured([0, 1], [2, 255]), "val") is None
    one = absent_classes(measured([0, 1], [1, 255]), "val")
    assert one.startswith("c2 never occurs in the label maps of the validation set") and "2 of 3 classes" in one
    assert "255 means no class" in one
    two = absent_classes(measured([1, 1], [1, 1]), "test")
    assert two.startswith("c0, c2 never occur in the label maps of the test set") and "1 of 3 classes" in two
    many = absent_classes(measured([0], classes=20), "test")
    assert "c1, c2, c3, c4 and 15 more never occur" in many


def test_no_class_occurs() -> None:
    """And another label may be the one that is ignored."""
    said = absent_classes(measured([7, 7], ignore_index=7), "val")
    assert said.startswith("no class occurs in the label maps of the validation set") and said.endswith(
        "label 7 means no class"
    )
    assert absent_classes(measured(), "val").startswith("no class occurs")


class Other(IoUMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append("its own")


def test_other_metrics_do_not_tell() -> None:
    other = Other()
    other.dataset_meta = dict(classes=["a"])
    other.process({}, [])
    assert absent_classes(other, "val") is None and absent_classes(object(), "val") is None
    assert absent_classes(IoUMetric(format_only=True, output_dir="/tmp"), "val") is None


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (dict(S=dict(mIoU=NAN, aAcc=NAN), L=dict(mIoU=1.0, aAcc=NAN)), "every metric of S is NaN"),
        (dict(S=dict(abs_rel=NAN), L=dict(abs_rel=NAN)), "every metric of S, L is NaN"),
        (
            {"S": {"coco/bbox_mAP": -1.0, "coco/bbox_mAP_s": -1.0}},
            "every metric of S is -1: the annotation file has no boxes",
        ),
        ({"S": {"coco/bbox_mAP": -1.0, "coco/square_precision": NAN}}, "every metric of S is NaN"),
        ({"S": {"AR@100": -1.0, "AR_s@1000": -1.0}}, "every metric of S is -1"),
        ({"S": {"pascal_voc/AP50": -1.0}}, "every metric of S is -1"),
        (dict(S=dict(a=NAN), L={}), "every metric of S is NaN"),
        ({f"s{i}": dict(a=NAN) for i in range(9)}, "every metric of s0, s1, s2, s3 and 5 more is NaN"),
    ],
)
def test_stitches_without_a_figure(metrics: dict[str, dict[str, float]], says: str) -> None:
    assert empty_metrics(metrics).startswith(says)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        dict(S={}),
        dict(S=dict(mIoU=0.0)),
        {"S": {"coco/bbox_mAP": 0.2, "coco/bbox_mAP_s": -1.0}},
        dict(S=dict(gain=-1.0)),
    ],
)
def test_figures_that_are_as_they_seem(metrics: dict[str, dict[str, float]]) -> None:
    assert empty_metrics(metrics) is None


def test_few() -> None:
    assert few(["a"]) == "a" and few(list("abcd")) == "a, b, c, d" and few(list("abcdef"), 2) == "a, b and 4 more"
