"""Warnings of classes that never occur and of metrics that are all NaN."""

import math
from typing import Any

import pytest
import torch
from mmseg.evaluation import IoUMetric

from mmsnnet.engine.runner.metric_warnings import absent_classes_warning, empty_metrics_warning

NAN = math.nan


def measured(*labels: list[int], classes: int = 3, **settings: Any) -> IoUMetric:
    """The metric after images of these labels, whose pixels are all predicted as 0."""
    metric = IoUMetric(**settings)
    metric.dataset_meta = dict(classes=[f"c{i}" for i in range(classes)])
    for values in labels:
        truth = torch.tensor([values])
        metric.process({}, [dict(pred_sem_seg=dict(data=truth * 0), gt_sem_seg=dict(data=truth), img_path="a.png")])
    return metric


def test_classes_that_never_occur() -> None:
    assert absent_classes_warning(measured([0, 1], [2, 255]), "val") is None
    one = absent_classes_warning(measured([0, 1], [1, 255]), "val")
    assert one.startswith("c2 never occurs in the label maps of the validation set") and "2 of 3 classes" in one
    assert "255 means no class" in one
    two = absent_classes_warning(measured([1, 1], [1, 1]), "test")
    assert two.startswith("c0, c2 never occur in the label maps of the test set") and "1 of 3 classes" in two
    many = absent_classes_warning(measured([0], classes=20), "test")
    assert "c1, c2, c3, c4 and 15 more never occur" in many


def test_no_class_occurs() -> None:
    """Another label than 255 may be the ignored one."""
    warning = absent_classes_warning(measured([7, 7], ignore_index=7), "val")
    assert warning.startswith("no class occurs in the label maps of the validation set")
    assert warning.endswith("label 7 means no class")
    assert absent_classes_warning(measured(), "val").startswith("no class occurs")


class Other(IoUMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.append("something else")


def test_other_metrics_give_no_warning() -> None:
    other = Other()
    other.dataset_meta = dict(classes=["a"])
    other.process({}, [])
    assert absent_classes_warning(other, "val") is None and absent_classes_warning(object(), "val") is None
    assert absent_classes_warning(IoUMetric(format_only=True, output_dir="/tmp"), "val") is None


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
def test_stitches_whose_metrics_are_all_nan(metrics: dict[str, dict[str, float]], says: str) -> None:
    assert empty_metrics_warning(metrics).startswith(says)


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
def test_metrics_with_a_number_give_no_warning(metrics: dict[str, dict[str, float]]) -> None:
    assert empty_metrics_warning(metrics) is None
