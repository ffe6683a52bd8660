"""Evaluation with statistics of each stitch's own: the images, the figures, the file of operating points, two ranks."""

import copy
import itertools
import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils.data import Dataset

from mmsnnet.engine.recalibration import recalibrate_on_training_images
from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.models.recalibration import norm_statistics, recalibrate
from mmsnnet.registry import DATASETS, METRICS
from tests.models.test_recalibration import by_name, equal, make
from tests.models.test_staged_backbone import PAIRS

TRAINING, BATCH = 12, 3
STITCHES = "S,L,3,9"
NUMBERS = itertools.count()
GIVEN: list[tuple[int, Tensor]] = []
COSTS: dict[str, Any] = {}  # of the backbone of each pair, counted once
weights = cache(lambda pair: make(pair).state_dict())


class Augmented(Dataset):
    """Images that all three global generators change; ``GIVEN`` remembers them."""

    metainfo: dict[str, Any] = {}  # noqa: RUF012  of mmengine's data sets

    def __init__(self, length: int, noise: float = 1.0) -> None:
        self.images = torch.randn(length, 3, 64, 64, generator=torch.Generator().manual_seed(length))
        self.noise = noise

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randn(3, 64, 64) + float(np.random.rand()) + random.random()
        image = self.images[index] + self.noise * noise
        GIVEN.append((index, image))
        return dict(inputs=image, data_samples=BaseDataElement(gt_label=index % 4))


class LogitSum(BaseMetric):
    """A number in which every bit of a logit counts."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [float(sample["logits"].double().square().sum()) for sample in data_samples]

    def compute_metrics(self, results: list[float]) -> dict[str, float]:
        return dict(logits=sum(results))


@pytest.fixture(autouse=True, scope="module")
def registered() -> Iterator[None]:
    DATASETS.register_module(module=Augmented)
    METRICS.register_module(module=LogitSum)
    yield
    del DATASETS.module_dict["Augmented"], METRICS.module_dict["LogitSum"]


def make_runner(folder: Path, pair: str = "resnet", **changes: Any) -> Runner:
    anchors = [dict(anchor) for anchor in PAIRS[pair]]
    backbone = dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=64, rank=2, flops_step=1e5)
    test_cfg = dict(type="mmsnnet.StitchTestLoop", stitches=STITCHES) | changes.pop("test_cfg", {})
    config = dict(
        default_scope="mmsnnet",
        model=dict(
            type="StitchedClassifier",
            backbone=backbone,
            num_classes=4,
            data_preprocessor=dict(type="mmengine.ImgDataPreprocessor"),
        ),
        train_dataloader=dict(batch_size=BATCH, dataset=dict(type="Augmented", length=TRAINING)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        test_dataloader=dict(
            batch_size=2,
            dataset=dict(type="Augmented", length=5, noise=0.0),
            sampler=dict(type="DefaultSampler", shuffle=False),
        ),
        test_evaluator=dict(type="LogitSum"),
        test_cfg=test_cfg,
        work_dir=str(folder / "work_dir"),
        experiment_name=f"recalibration_{next(NUMBERS)}",
        log_level="ERROR",
    )
    runner = Runner.from_cfg(Config(config | changes))
    runner.model.backbone._cost_models = COSTS.setdefault(pair, {})
    runner.model.load_state_dict(weights(pair), strict=False)
    return runner


def figures(metrics: dict[str, float]) -> dict[str, float]:
    return {name.partition("/")[0]: value for name, value in metrics.items()}


@pytest.mark.slow
def test_each_stitch_has_its_own_statistics(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, test_cfg=dict(out=str(tmp_path / "points.json"), recalibrate=7))
    before = copy.deepcopy(runner.model.state_dict())
    found = figures(runner.test())
    assert all(torch.equal(tensor, before[name]) for name, tensor in runner.model.state_dict().items())
    assert OperatingPoints.load(tmp_path / "points.json").recalibrated == 7
    assert {p.name: p.metrics["logits"] for p in OperatingPoints.load(tmp_path / "points.json")} == found

    # One stitch at a time, in a model that has the statistics for good, without shared prefixes.
    plain = make_runner(tmp_path)
    shared = figures(plain.test())
    for stitch in plain.test_loop.stitches:
        [statistics] = recalibrate_on_training_images(plain.cfg, plain.model, [stitch], 7, prefix_reuse=False).values()
        with norm_statistics(statistics):
            alone = make_runner(tmp_path, test_cfg=dict(prefix_reuse=False, stitches=stitch.name))
            alone.model.load_state_dict(plain.model.state_dict())
            assert figures(alone.test()) == {stitch.name: found[stitch.name]}
        assert found[stitch.name] != shared[stitch.name]


def test_images_are_a_sample_of_the_training_set_with_its_augmentation(tmp_path: Path) -> None:
    runner = make_runner(tmp_path)
    [stitch] = runner.model.backbone.space.select("9")

    def recalibrated(number: int) -> tuple[dict[str, tuple[Tensor, ...]], list[int], list[Tensor]]:
        GIVEN.clear()
        before = random.getstate(), torch.get_rng_state(), np.random.get_state()[2]
        statistics = recalibrate_on_training_images(runner.cfg, runner.model, [stitch], number)[stitch]
        assert before[0] == random.getstate() and torch.equal(before[1], torch.get_rng_state())
        assert before[2] == np.random.get_state()[2]
        return by_name(runner.model, statistics), [index for index, _ in GIVEN], [image for _, image in GIVEN]

    first, indices, images = recalibrated(7)
    assert len(set(indices)) == 7 and max(indices) < TRAINING
    plain = Augmented(TRAINING, noise=0.0)
    assert not any(torch.equal(image, plain.images[index]) for index, image in zip(indices, images, strict=True))
    random.random(), torch.rand(1), np.random.rand()
    again, same, _ = recalibrated(7)
    assert same == indices and equal(first, again)
    assert len(recalibrated(TRAINING)[1]) == TRAINING

    # Seven images in batches of at most three: three, two and two, as alike as can be.
    batches = [dict(inputs=torch.stack(part)) for part in (images[:3], images[3:5], images[5:])]
    [expected] = recalibrate(runner.model, [stitch], batches).values()
    assert equal(first, by_name(runner.model, expected))


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.json", tmp_path / "resumed.json"
    settings = dict(recalibrate=7, stitches_per_pass=1)
    make_runner(tmp_path, test_cfg=dict(out=str(whole), **settings)).test()
    runner = make_runner(tmp_path, test_cfg=dict(out=str(resumed), **settings))
    compute, count = runner.test_loop.evaluator.metrics[0].compute_metrics, itertools.count(1)

    def fail_at_third(results: list[float]) -> dict[str, float]:
        return compute(results) if next(count) < 3 else dict(failed=1 / 0)

    runner.test_loop.evaluator.metrics[0].compute_metrics = fail_at_third
    with pytest.raises(ZeroDivisionError):
        runner.test()
    assert len(OperatingPoints.load(resumed)) == 2
    make_runner(tmp_path, test_cfg=dict(out=str(resumed), resume=True, **settings)).test()
    assert resumed.read_text() == whole.read_text()
    GIVEN.clear()
    make_runner(tmp_path, test_cfg=dict(out=str(resumed), resume=True, **settings)).test()
    assert not GIVEN  # nothing is left, so no image is read


@pytest.mark.slow
@pytest.mark.parametrize("first", [None, 5])
def test_figures_of_other_statistics_are_left_alone(first: int | None, tmp_path: Path) -> None:
    out = tmp_path / "points.json"

    def loop(**settings: Any) -> dict[str, Any]:
        return dict(out=str(out), stitches="S,9") | settings

    make_runner(tmp_path, test_cfg=loop(recalibrate=first)).test()
    before = out.read_text()
    others: list[dict[str, Any]] = [dict(recalibrate=6), dict(recalibrate=5 if first is None else None)]
    for other in others:
        with pytest.raises(CannotResumeError, match="results of another recalibration, which --resume cannot continue"):
            make_runner(tmp_path, test_cfg=loop(resume=True, **other)).test()
    assert out.read_text() == before
    make_runner(tmp_path, test_cfg=loop(resume=True, recalibrate=first)).test()
    assert out.read_text() == before
    make_runner(tmp_path, test_cfg=loop(stitches="S", **others[1])).test()  # replaces, and does not merge
    assert OperatingPoints.load(out).recalibrated == others[1]["recalibrate"]
    assert [point.name for point in OperatingPoints.load(out)] == ["S"]


@pytest.mark.parametrize(
    ("number", "changes", "says"),
    [
        (0, {}, "recalibrate is a number of training images, at least 1; got 0"),
        (TRAINING + 1, {}, "recalibrate=13, but the training set has 12 images"),
        (4, dict(pair="swin"), "no BatchNorm, so there is nothing to recalibrate"),
        (4, dict(train_dataloader=None, train_cfg=None, optim_wrapper=None), "the config has no train_dataloader"),
    ],
)
def test_mistakes_end_the_test_before_an_image_is_read(
    number: int, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    runner = make_runner(tmp_path, test_cfg=dict(recalibrate=number), **changes)
    GIVEN.clear()
    with pytest.raises(SettingError, match=says):
        runner.test()
    assert not GIVEN
