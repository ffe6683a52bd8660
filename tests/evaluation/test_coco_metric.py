"""COCO's metric at several stitches."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.fileio import LocalBackend, register_backend

from mmsnnet.engine.runner.stitch_passes import copied_metric
from mmsnnet.registry import METRICS

pytestmark = pytest.mark.detection

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
    """Of both kinds, with a method ``add(*boxes)``, the detections in the one image of ``ann_file``."""
    return make_metric(ann_file, metric=["bbox", "segm"])


def make_metric(named: Path | None, **settings: Any) -> Any:
    metric = METRICS.build(dict(type="mmsnnet.CocoMetric", **settings))
    metric.dataset_meta = dict(classes=("square",))
    metric.add = lambda *boxes: metric.process({}, [detections(named, *boxes)])
    return metric


def detections(named: Path | None, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """A data sample that names an annotation file, with these boxes, wholly filled, as the predictions."""
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = True
    found = dict(
        bboxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
        scores=torch.ones(len(boxes)),
        labels=torch.zeros(len(boxes), dtype=torch.long),
        masks=masks,
    )
    sample = dict(img_id=5, ori_shape=(SIDE, SIDE), pred_instances=found)
    return sample if named is None else sample | dict(ann_file=str(named))


def test_what_is_found_is_measured_against_the_data_sets_own_file(metric: Any, capsys: Any) -> None:
    metric.add((10, 10, 50, 50))
    found = metric.evaluate(1)
    assert found.keys() == NAMES
    assert (found["coco/bbox_mAP"], found["coco/segm_mAP"], found["coco/bbox_mAP_m"]) == (1, 1, 1)
    assert capsys.readouterr().out == ""


def test_half_of_a_square_counts_up_to_its_overlap(metric: Any) -> None:
    """The upper 25 rows of 40: an overlap of 0.625, which is enough at the thresholds 0.5, 0.55 and 0.6 of ten."""
    metric.add((10, 10, 50, 35))
    found = metric.evaluate(1)
    assert (found["coco/bbox_mAP"], found["coco/bbox_mAP_50"], found["coco/bbox_mAP_75"]) == (0.3, 1, 0)


def test_finding_nothing_scores_zero_and_the_next_stitch_is_measured(metric: Any) -> None:
    metric.add()
    assert metric.evaluate(1) == dict.fromkeys(NAMES, 0.0)
    metric.add((10, 10, 50, 50))
    assert metric.evaluate(1)["coco/bbox_mAP"] == 1


def test_a_given_file_takes_precedence(ann_file: Path, tmp_path: Path) -> None:
    metric = make_metric(tmp_path / "nowhere.json", metric="bbox", ann_file=str(ann_file))
    metric.add((10, 10, 50, 50))
    assert metric.evaluate(1)["coco/bbox_mAP_50"] == 1


def test_ground_truth_in_the_samples_is_measured_against_as_by_mmdet() -> None:
    metric = make_metric(None, metric="bbox")
    thing = dict(bbox=[10, 10, 50, 50], bbox_label=0, ignore_flag=0)
    metric.process({}, [detections(None, (10, 10, 50, 35)) | dict(instances=[thing])])
    assert metric.evaluate(1)["coco/bbox_mAP"] == 0.3


def test_no_ground_truth_is_an_error_that_says_where_it_could_come_from() -> None:
    with pytest.raises(ValueError, match=r"no ground truth: .*meta_keys of PackDetInputs.*ann_file of the evaluator"):
        make_metric(None).add((10, 10, 50, 50))


def test_ground_truth_of_two_files_is_an_error_that_names_them(metric: Any, ann_file: Path, tmp_path: Path) -> None:
    metric.add((10, 10, 50, 50))
    other = shutil.copy(ann_file, tmp_path / "others.json")
    with pytest.raises(ValueError, match=rf"{ann_file} and {other}: set ann_file of the evaluator"):
        metric.process({}, [detections(ann_file), detections(other)])


def test_copies_for_stitches_read_the_annotations_once(metric: Any, ann_file: Path) -> None:
    copies = [copied_metric(metric) for _ in range(2)]
    for number, copy in enumerate(copies):
        copy.process({}, [detections(ann_file, *[(10, 10, 50, 50)] * number)])
    assert copies[0]._coco_api is copies[1]._coco_api is not None and metric._coco_api is None
    assert [copy.evaluate(1)["coco/bbox_mAP"] for copy in copies] == [0, 1]


class InFolder(LocalBackend):
    """Local files by their paths below a folder."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    @contextmanager
    def get_local_path(self, filepath: str) -> Iterator[str]:
        yield str(self.folder / filepath)


def test_ground_truth_is_read_by_the_file_backend_that_is_set(ann_file: Path) -> None:
    register_backend("in_folder", InFolder, force=True)
    backend = dict(backend="in_folder", folder=str(ann_file.parent))
    metric = make_metric(Path(ann_file.name), metric="bbox", backend_args=backend)
    metric.add((10, 10, 50, 50))
    assert metric.evaluate(1)["coco/bbox_mAP"] == 1
