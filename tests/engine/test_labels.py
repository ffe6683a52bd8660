"""Evaluators that compare predictions with labels need a data set with labels."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.evaluator import DumpResults
from mmengine.structures import BaseDataElement
from mmseg.evaluation import CityscapesMetric, DepthMetric, IoUMetric

from mmsnnet.engine.runner.labels import check_first_batch, check_labels, check_sample, keeps_nothing
from mmsnnet.errors import SettingError
from mmsnnet.evaluation.metrics.accuracy import Accuracy


class Listed:
    """A data set that lists its samples, as those of mmengine do."""

    def __init__(self, *infos: dict[str, Any], transforms: tuple[Any, ...] = (), packed: Any = None) -> None:
        self.infos = infos
        self.pipeline = SimpleNamespace(transforms=transforms)
        self.packed = packed

    def __len__(self) -> int:
        return len(self.infos)

    def get_data_info(self, index: int) -> dict[str, Any]:
        return self.infos[index]

    def __getitem__(self, index: int) -> Any:
        random.random(), np.random.rand(), torch.rand(())
        return dict(inputs=None, data_samples=self.packed)


class LoadAnnotations:
    pass


def test_a_set_with_label_maps(tmp_path: Path) -> None:
    (tmp_path / "3.png").touch()
    infos = [dict(seg_map_path=str(tmp_path / f"{i}.png")) for i in range(9)]  # some files may lack: loading names them
    check_labels(Listed(*infos), [IoUMetric()], "test")
    check_labels(Listed(dict(seg_map_path="s3://bucket/1.png")), [IoUMetric()], "test")
    check_labels([1, 2], [IoUMetric()], "test")  # it lists nothing
    check_labels(Listed(dict()), [DumpResults("a.pkl")], "test")  # it compares nothing


@pytest.mark.parametrize("metric", [IoUMetric, DepthMetric])
@pytest.mark.parametrize("kind", ["no key", "none", "no folder", "no files", "some lack"])
def test_a_set_without(kind: str, metric: type, tmp_path: Path) -> None:
    key = "seg_map_path" if metric is IoUMetric else "depth_map_path"
    (tmp_path / "there.png").touch()
    infos, says = {
        "no key": ([dict(img_path="a.jpg")], f"lists no {key}"),
        "none": ([{key: None}], f"lists no {key}"),
        "no folder": ([{key: str(tmp_path / "labels" / "1.png")}], rf"no folder {tmp_path / 'labels'}\b"),
        "no files": ([{key: str(tmp_path / f"{i}.png")} for i in range(9)], r"no files such as .*0\.png"),
        "some lack": ([*[{key: str(tmp_path / "there.png")}] * 9, dict(img_path="a.jpg")], f"lists no {key}"),
    }[kind]
    with pytest.raises(
        SettingError, match=rf"test_evaluator: {metric.__name__}.*{says}.*format_only=True.*output_dir"
    ) as e:
        check_labels(Listed(*infos), [metric()], "test")
    assert "\n" not in str(e.value)


def test_boxes(tmp_path: Path) -> None:
    none = Listed(dict(instances=[]), dict(instances=[]))
    check_labels(Listed(dict(instances=[]), dict(instances=[1])), [CocoMetric()], "val")
    with pytest.raises(SettingError, match=r"val_evaluator: CocoMetric.*the data set has none.*outfile_prefix"):
        check_labels(none, [CocoMetric()], "val")
    none.ann_file = "image_info.json"
    with pytest.raises(SettingError, match=r"image_info\.json has none"):
        check_labels(none, [CocoMetric()], "val")
    metric = CocoMetric()
    for annotations in ([], [dict(id=1)]):
        metric._coco_api = SimpleNamespace(dataset=dict(annotations=annotations))  # a file of the metric's own
        if annotations:
            check_labels(none, [metric], "val")
        else:
            with pytest.raises(SettingError, match="has none"):
                check_labels(none, [metric], "val")


def test_predictions_alone(tmp_path: Path) -> None:
    """Writing predictions needs no labels, but a path, and a pipeline that does not load missing labels."""
    unlisted, missing = Listed(dict()), Listed(dict(seg_map_path=str(tmp_path / "none" / "1.png")))
    metric = IoUMetric(format_only=True, output_dir=str(tmp_path))
    for dataset in (unlisted, missing):
        check_labels(dataset, [metric], "test")
        dataset.pipeline.transforms = (LoadAnnotations(),)
        with pytest.raises(SettingError, match=r"test_dataloader\.dataset\.pipeline.*LoadAnnotations.*leave"):
            check_labels(dataset, [metric], "test")
    with pytest.raises(SettingError, match=r"no place to write to: set test_evaluator\.output_dir"):
        check_labels(unlisted, [IoUMetric(format_only=True)], "test")
    assert keeps_nothing(metric) and not keeps_nothing(IoUMetric())
    assert not keeps_nothing(CocoMetric(format_only=True, outfile_prefix=str(tmp_path / "a")))  # it keeps its results


def sample(**fields: Any) -> BaseDataElement:
    return BaseDataElement(**fields)


def test_the_first_batch() -> None:
    """It shows whether the pipeline loads labels, before the model runs."""
    metrics = [IoUMetric(), Accuracy()]
    good = sample(gt_sem_seg=torch.zeros(1), gt_label=torch.zeros(1))
    for batch in (
        dict(data_samples=[good]),
        dict(data_samples=[[good], [good]]),  # of test-time augmentation
        dict(data_samples=[dict(gt_sem_seg=1, gt_label=1)]),
        dict(inputs=[1]),
        [1, 2],
        dict(data_samples=[]),
    ):
        check_first_batch(metrics, "test", batch)
    for lacking, batch in (
        ("gt_sem_seg", sample(gt_label=torch.zeros(1))),
        ("gt_label", sample(gt_sem_seg=torch.zeros(1))),
    ):
        with pytest.raises(SettingError, match=f"pipeline of test_dataloader packs no {lacking}"):
            check_first_batch(metrics, "test", dict(data_samples=[batch]))


def test_a_sample_before_training() -> None:
    """Loading it does not change random states."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(SettingError, match="pipeline of val_dataloader packs no gt_sem_seg"):
        check_sample(Listed(dict(), packed=sample()), [IoUMetric()], "val")
    check_sample(Listed(dict(), packed=sample(gt_sem_seg=torch.zeros(1))), [IoUMetric()], "val")
    check_sample(Listed(), [IoUMetric()], "val")
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_cityscapes_metrics_read_labels_themselves() -> None:
    metric = object.__new__(CityscapesMetric)  # without its package of scripts
    metric.format_only = False
    with pytest.raises(SettingError, match="CityscapesMetric compares predictions with label maps"):
        check_labels(Listed(dict(img_path="a.png")), [metric], "test")
    metric.keep_results = True  # what it has written would be removed with it
