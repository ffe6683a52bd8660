"""The names that are known of a metric equal those of its values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric, DumpDetResults, VOCMetric
from mmengine.evaluator import BaseMetric, DumpResults
from mmseg.evaluation import DepthMetric, IoUMetric

from mmsnnet.evaluation import better_rule, known_names, main_metric
from mmsnnet.evaluation.metrics.accuracy import Accuracy
from mmsnnet.evaluation.metrics.coco_metric import CocoMetric as OurCocoMetric

CLASSES = ("sky", "road", "car")


def evaluated(metric: Any, *samples: dict[str, Any]) -> set[str]:
    """The names that a metric gives for samples."""
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, list(samples))
    return set(metric.evaluate(len(samples)))


def segmented() -> dict[str, Any]:
    labels = torch.randint(3, (1, 8, 8))
    return dict(pred_sem_seg=dict(data=labels.flip(1)), gt_sem_seg=dict(data=labels), img_path="a.png")


@pytest.mark.parametrize("prefix", [None, "city"])
@pytest.mark.parametrize(
    "kinds", ["mIoU", ["mIoU"], ["mDice"], ["mFscore"], ["mIoU", "mDice", "mFscore"], ["mFscore", "mIoU"]]
)
def test_segmentation(kinds: Any, prefix: str | None) -> None:
    metric = IoUMetric(iou_metrics=kinds, prefix=prefix)
    names = known_names(metric)
    assert len(names) == len(set(names)) and set(names) == evaluated(metric, segmented())


def test_depth() -> None:
    metric = DepthMetric(min_depth_eval=0.1, max_depth_eval=9.0)
    depth = torch.rand(1, 8, 8) + 1
    sample = dict(pred_depth_map=dict(data=depth + 0.1), gt_depth_map=dict(data=depth), img_path="a.png")
    assert set(known_names(metric)) == evaluated(metric, sample)


def test_classification() -> None:
    metric = Accuracy(topk=(1, 3))
    assert set(known_names(metric)) == evaluated(metric, dict(logits=torch.rand(3), gt_label=torch.tensor([1])))


@pytest.fixture
def ann_file(tmp_path: Path) -> str:
    boxes = [
        dict(
            id=i,
            image_id=1,
            category_id=i,
            bbox=[2, 2, 20, 20],
            area=400,
            iscrowd=0,
            segmentation=[[2, 2, 22, 2, 22, 22]],
        )
        for i in (1, 2, 3)
    ]
    contents = dict(
        info={},
        images=[dict(id=1, file_name="1.jpg", height=32, width=32)],
        annotations=boxes,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(contents))
    return str(path)


def detected() -> dict[str, Any]:
    masks = torch.zeros(1, 32, 32, dtype=torch.bool)
    masks[0, 2:22, 2:22] = True
    found = dict(
        bboxes=torch.tensor([[2.0, 2, 22, 22]]),
        scores=torch.ones(1),
        labels=torch.zeros(1, dtype=torch.long),
        masks=masks,
    )
    none = dict(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    truth = dict(bboxes=found["bboxes"], labels=found["labels"])
    return dict(img_id=1, ori_shape=(32, 32), pred_instances=found, gt_instances=truth, ignored_instances=none)


@pytest.mark.parametrize("kind", [CocoMetric, OurCocoMetric])
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(metric=["bbox", "segm"], classwise=True),
        dict(metric_items=["mAP_50", "mAP_s"], prefix="mine"),
        dict(metric=["proposal", "proposal_fast"], proposal_nums=(100, 300, 1000)),
    ],
    ids=str,
)
def test_detection(kind: type, settings: dict[str, Any], ann_file: str) -> None:
    metric = kind(ann_file=ann_file, **settings)
    metric.dataset_meta = dict(classes=CLASSES)
    assert set(known_names(metric)) == evaluated(metric, detected())


@pytest.mark.parametrize("settings", [dict(), dict(iou_thrs=[0.5, 0.75])], ids=str)
def test_voc(settings: dict[str, Any]) -> None:
    metric = VOCMetric(**settings)
    assert set(known_names(metric)) == evaluated(metric, detected())


def test_metrics_that_only_write(tmp_path: Path) -> None:
    for metric in (
        DumpResults(str(tmp_path / "a.pkl")),
        DumpDetResults(str(tmp_path / "a.pkl")),
        IoUMetric(format_only=True, output_dir=str(tmp_path)),
        CocoMetric(format_only=True, outfile_prefix=str(tmp_path / "a")),
    ):
        assert known_names(metric) == ()


class Inherits(IoUMetric):
    pass


class Changes(IoUMetric):
    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(super().compute_metrics(results), more=1.0)


class Renames(IoUMetric):
    def evaluate(self, size: int) -> dict[str, float]:
        return {f"x_{name}": value for name, value in super().evaluate(size).items()}


class Other(BaseMetric):
    def process(self, data_batch: Any, data_samples: Any) -> None:
        raise NotImplementedError

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(mIoU=1.0)


def test_what_a_class_of_a_user_s_own_gives_is_not_known() -> None:
    assert known_names(Inherits()) == known_names(IoUMetric()) == ("aAcc", "mIoU", "mAcc")
    assert [known_names(metric) for metric in (Changes(), Renames(), Other())] == [None] * 3


def test_main_metrics_and_rules() -> None:
    assert main_metric(["S/aAcc", "S/mIoU", "L/mIoU"]) == "S/mIoU"
    assert main_metric(["coco/segm_mAP", "coco/bbox_mAP_50", "coco/bbox_mAP"]) == "coco/bbox_mAP"
    assert main_metric(["rmse", "abs_rel"]) == "abs_rel" and main_metric(["fps"]) is None and main_metric([]) is None
    rules = {name: better_rule(name) for name in ("L/mIoU", "L/rmse", "L/silog", "L/d1", "L/val_loss", "L/fps", "auto")}
    assert [*rules.values()] == ["greater", "less", "less", "greater", "less", None, None]
    assert np.all([better_rule(f"L/{name}") is not None for name in (*DepthMetric.METRICS, "top1", "coco/bbox_mAP_s")])
