"""COCO's metric at several stitches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsnnet.registry import METRICS

SIDE = 64
NAMES = {
    f"coco/{kind}_{item}"
    for kind in ("bbox", "segm")
    for item in ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
}


@pytest.fixture
def ann_file(tmp_path: Path) -> Path:
    """One image with one square, 40 to the side."""
    corner = [10, 10, 50, 10, 50, 50, 10, 50]
    thing = dict(id=1, image_id=5, category_id=3, bbox=[10, 10, 40, 40], area=1600, iscrowd=0, segmentation=[corner])
    contents = dict(
        info={},
        images=[dict(id=5, file_name="5.jpg", height=SIDE, width=SIDE)],
        annotations=[thing],
        categories=[dict(id=3, name="square")],
    )
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(contents))
    return path


@pytest.fixture
def metric(ann_file: Path) -> Any:
    metric = METRICS.build(dict(type="mmsnnet.CocoMetric", metric=["bbox", "segm"]))
    metric.dataset_meta = dict(classes=("square",), ann_file=str(ann_file))
    return metric


def detections(*boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """A data sample with these boxes, wholly filled, as the predictions."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    found = dict(
        bboxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
        scores=torch.ones(len(boxes)),
        labels=torch.zeros(len(boxes), dtype=torch.long),
        masks=masks,
    )
    return dict(img_id=5, ori_shape=(SIDE, SIDE), pred_instances=found)


def test_what_is_found_is_measured_against_the_data_sets_own_file(metric: Any, capsys: Any) -> None:
    metric.process({}, [detections((10, 10, 50, 50))])
    found = metric.evaluate(1)
    assert found.keys() == NAMES
    assert (found["coco/bbox_mAP"], found["coco/segm_mAP"], found["coco/bbox_mAP_m"]) == (1, 1, 1)
    assert capsys.readouterr().out == ""


def test_half_of_a_square_counts_up_to_its_overlap(metric: Any) -> None:
    """The upper 25 rows of 40: an overlap of 0.625, which is enough at the thresholds 0.5, 0.55 and 0.6 of ten."""
    metric.process({}, [detections((10, 10, 50, 35))])
    found = metric.evaluate(1)
    assert (found["coco/bbox_mAP"], found["coco/bbox_mAP_50"], found["coco/bbox_mAP_75"]) == (0.3, 1, 0)


def test_finding_nothing_scores_zero_and_the_next_stitch_is_measured(metric: Any) -> None:
    metric.process({}, [detections()])
    assert metric.evaluate(1) == dict.fromkeys(NAMES, 0.0)
    metric.process({}, [detections((10, 10, 50, 50))])
    assert metric.evaluate(1)["coco/bbox_mAP"] == 1


def test_a_given_file_takes_precedence(ann_file: Path, tmp_path: Path) -> None:
    metric = METRICS.build(dict(type="mmsnnet.CocoMetric", metric="bbox", ann_file=str(ann_file)))
    metric.dataset_meta = dict(classes=("square",), ann_file=str(tmp_path / "nowhere.json"))
    metric.process({}, [detections((10, 10, 50, 50))])
    assert metric.evaluate(1)["coco/bbox_mAP_50"] == 1
