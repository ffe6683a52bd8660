"""The loops over stitches measure what mmengine's loops measure for each stitch, and call hooks as they do."""

import copy
import ctypes
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.fileio import load
from mmengine.hooks import Hook
from mmengine.runner import Runner, TestLoop
from mmengine.structures import BaseDataElement
from rich.console import Console
from torch import nn

from mmsnnet.datasets import write_shapes
from mmsnnet.datasets.procedural.shapes import CLASSES, PALETTE
from mmsnnet.engine import StitchTestLoop, StitchValLoop
from mmsnnet.engine.runner import stitch_passes
from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.engine.runner.stitch_loops import use_checked_image_loader
from mmsnnet.engine.runner.stitch_passes import kept_bytes
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.files.writing import OutputError
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.registry import METRICS, TRANSFORMS
from mmsnnet.stitching import UnknownStitchError, spread

MakeRunner = Callable[..., Runner]
NAMES = ("S", "L", "S0-L2", "L1-S1")
BATCHES = 3  # of five images, two at a time


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", "shapes", train=4, val=5, size=(32, 32))


@pytest.fixture
def make_runner(
    data_root: Path,
    segmentor_config: Callable[..., dict[str, Any]],
    randomise: Callable[[nn.Module], None],
    tmp_path: Path,
) -> MakeRunner:
    """``make_runner(...)``: a runner with a random model and initialised layers; keywords are those of the config."""

    def loader(split: str, **kwargs: Any) -> dict[str, Any]:
        dataset = dict(
            type="BaseSegDataset",
            data_root=str(data_root),
            metainfo=dict(name="shapes", classes=CLASSES, palette=[list(colour) for colour in PALETTE]),
            img_suffix=".jpg",
            seg_map_suffix=".png",
            reduce_zero_label=True,
            data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}"),
            pipeline=[dict(type=name) for name in ("LoadImageFromFile", "LoadAnnotations", "PackSegInputs")],
        )
        return dict(batch_size=2, num_workers=0, dataset=dataset, **kwargs)

    def make(initialized: bool = True, **kwargs: Any) -> Runner:
        test = loader("validation", sampler=dict(type="DefaultSampler", shuffle=False))
        config = dict(
            default_scope="mmseg",
            model=segmentor_config(),
            work_dir=str(tmp_path / "work_dir"),
            experiment_name=f"loops_{next(NUMBERS)}",
            randomness=dict(seed=0),
            train_dataloader=loader("training", sampler=dict(type="InfiniteSampler", shuffle=True)),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=1, val_interval=1),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3)),
            val_dataloader=test,
            val_cfg=dict(type="mmsnnet.StitchValLoop", stitches="anchors"),
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            test_dataloader=test,
            test_cfg=dict(type="mmsnnet.StitchTestLoop", **kwargs.pop("test_cfg", {})),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
        )
        runner = Runner.from_cfg(Config(config | kwargs))
        backbone = find_stitched_backbone(runner.model)
        backbone._cost_models = COSTS.setdefault(str(runner.cfg.model), {})
        randomise(runner.model)
        if initialized:
            for layer in backbone.network.layers.values():
                layer.set_base(layer.weight, layer.bias)
        return runner

    return make


NUMBERS = itertools.count()
COSTS: dict[str, Any] = {}  # of the backbone of each model, counted once


class Recorder(Hook):
    """Record each call of a hook with one of its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        for stage in ("val", "test"):
            for point in (f"before_{stage}", f"before_{stage}_epoch", f"after_{stage}"):
                setattr(self, point, self._recording(point))
            for point in (f"before_{stage}_iter", f"after_{stage}_iter"):
                setattr(self, point, self._recording(point, "batch_idx"))
            setattr(self, f"after_{stage}_epoch", self._recording(f"after_{stage}_epoch", "metrics"))

    def _recording(self, point: str, keep: str | None = None) -> Callable[..., None]:
        return lambda runner, **kwargs: self.calls.append((point, kwargs.get(keep)))


def evaluate_alone(runner: Runner, stitch: str) -> dict[str, float]:
    """The metrics of one stitch, measured by mmengine's loop."""
    find_stitched_backbone(runner.model).set_stitch(stitch)
    return TestLoop(runner, runner.cfg.test_dataloader, runner.cfg.test_evaluator).run()


def fail_at(loop: StitchTestLoop | StitchValLoop, number: int) -> None:
    """Make the ``number``-th evaluation raise."""
    metric, count = loop.evaluator.metrics[0], itertools.count(1)
    compute = metric.compute_metrics

    def compute_or_fail(results: list[Any]) -> dict[str, float]:
        if next(count) == number:
            raise ArithmeticError("the metric failed")
        return compute(results)

    metric.compute_metrics = compute_or_fail


def console_levels(runner: Runner) -> list[int]:
    return [h.level for h in runner.logger.handlers if not isinstance(h, logging.FileHandler)]


@pytest.mark.slow
def test_a_point_for_each_stitch_as_if_evaluated_alone(make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "new" / "points.json"
    runner = make_runner(test_cfg=dict(out=str(out)))
    runner.model.backbone.set_stitch("S0-L2")
    metrics = runner.test()
    assert runner.model.backbone.stitch.name == "S0-L2"

    points = OperatingPoints.load(out)
    costs = model_costs(runner.model)
    assert (points.dataset, points.input_shape, points.device) == ("shapes", (32, 32), "cpu")
    assert [point.name for point in points] == list(NAMES)
    for point, stitch in zip(points, runner.model.backbone.space, strict=True):
        assert (point.id, point.kind) == (stitch.id, stitch.kind)
        assert (point.flops, point.params) == (costs[stitch.id].flops, costs[stitch.id].params)
        expected = evaluate_alone(runner, stitch.name)
        assert point.metrics == pytest.approx(expected, abs=0, nan_ok=True)
        assert {name: metrics[f"{stitch.name}/{name}"] for name in expected} == pytest.approx(expected, nan_ok=True)
    assert len({tuple(point.metrics.values()) for point in points}) > 1
    log = Path(runner._log_dir, f"{runner.timestamp}.log").read_text()
    assert all(f"  {name} " in log for name in NAMES) and "4 of 4 stitches left" in log


@pytest.mark.slow
def test_hooks_see_what_the_stock_loop_shows_them(make_runner: MakeRunner) -> None:
    runner, recorder = make_runner(), Recorder()
    runner.register_hook(recorder)
    runner.test()
    ours = recorder.calls.copy()
    recorder.calls.clear()
    expected = {f"{name}/{k}": v for name in NAMES for k, v in evaluate_alone(runner, name).items()}
    stock = recorder.calls[: len(recorder.calls) // 4]
    assert len(stock) == 2 + 2 * BATCHES + 2
    pairs = zip(stock[2:-2:2], stock[3:-2:2], strict=True)
    assert ours[:-2] == [*stock[:2], *(call for pair in pairs for call in pair * 4)]  # each batch, four stitches
    assert [point for point, _ in ours[-2:]] == [point for point, _ in stock[-2:]]
    assert ours[-2][1] == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_the_file_is_whole_after_each_pass(make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    runner = make_runner(test_cfg=dict(out=str(out), stitches_per_pass=2))
    runner.model.backbone.set_stitch("S")
    levels = console_levels(runner)
    fail_at(runner.test_loop, 4)
    with pytest.raises(ArithmeticError, match="the metric failed"):
        runner.test()
    first = runner.model.backbone.prefix_order(runner.model.backbone.space)[:2]
    assert [point.id for point in OperatingPoints.load(out)] == sorted(stitch.id for stitch in first)
    assert runner.model.backbone.stitch.name == "S"
    assert console_levels(runner) == levels


@pytest.mark.slow
def test_a_file_that_cannot_be_written(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The console logs again by the time the error is handled."""
    (tmp_path / "file").touch()
    runner = make_runner(test_cfg=dict(out=str(tmp_path / "file" / "points.json")))
    runner.model.backbone.set_stitch("S0-L2")
    levels = console_levels(runner)
    with pytest.raises(OSError) as raised:
        runner.test()
    assert raised.tb is not None  # holds on to the frames, and so to any generator left half-way
    assert (runner.model.backbone.stitch.name, console_levels(runner)) == ("S0-L2", levels)


@pytest.mark.slow
def test_the_console_is_quiet_during_the_passes_only(make_runner: MakeRunner) -> None:
    class Levels(Hook):
        def before_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            seen.append(console_levels(runner))

    seen: list[list[int]] = []
    runner = make_runner(test_cfg=dict(stitches="L"))
    runner.register_hook(Levels())
    runner.logger.handlers[0].setLevel(logging.DEBUG)
    levels = console_levels(runner)
    runner.test()
    assert levels and seen == [[logging.WARNING] * len(levels)] * BATCHES
    assert console_levels(runner) == levels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stitches", "names"),
    [
        ("all", NAMES),
        ("anchors", ("S", "L")),
        ("2,0", ("S", "S0-L2")),
        ("L1-S1|L", ("L", "L1-S1")),
        (["L1-S1", 0], ("S", "L1-S1")),
    ],
)
def test_selection(stitches: Any, names: tuple[str, ...], make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    metrics = make_runner(test_cfg=dict(stitches=stitches, out=str(out))).test()
    assert tuple(point.name for point in OperatingPoints.load(out)) == names
    assert tuple(dict.fromkeys(key.rpartition("/")[0] for key in metrics)) == names


@pytest.mark.slow
@pytest.mark.parametrize("stitches", ["L,7", "S0-L3", ["S", 99]])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_an_unknown_stitch(stage: str, stitches: Any, make_runner: MakeRunner) -> None:
    loop = dict(val="mmsnnet.StitchValLoop", test="mmsnnet.StitchTestLoop")[stage]
    runner = make_runner()
    setattr(runner, f"_{stage}_loop", dict(type=loop, stitches=stitches))
    with pytest.raises(UnknownStitchError, match="ids run from 0 to 4"):
        getattr(runner, stage)()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(("stitches", "says"), [("all", "3 of 4 stitches, S "), ("2", "1 of 1 stitches, S0-L2 ")])
def test_layers_that_were_never_set_are_not_measured(
    stage: str, stitches: str, says: str, make_runner: MakeRunner, tmp_path: Path
) -> None:
    """The small anchor's maps run through a stitching layer too, to the width of the large anchor."""
    loop = dict(
        val=dict(type="mmsnnet.StitchValLoop", stitches=stitches),
        test=dict(type="mmsnnet.StitchTestLoop", stitches=stitches, out=str(tmp_path / "points.json")),
    )
    runner = make_runner(initialized=False)
    setattr(runner, f"_{stage}_loop", loop[stage])
    with pytest.raises(RuntimeError, match=f"{says}.*neither initialised nor loaded.*checkpoint"):
        getattr(runner, stage)()
    assert not (tmp_path / "points.json").exists()


@pytest.mark.slow
def test_the_largest_anchor_needs_no_layers(make_runner: MakeRunner) -> None:
    runner = make_runner(initialized=False, test_cfg=dict(stitches="L"))
    metrics = runner.test()
    assert {name.removeprefix("L/"): value for name, value in metrics.items()} == pytest.approx(
        evaluate_alone(runner, "L"), nan_ok=True
    )


@pytest.mark.slow
def test_validation_is_of_the_anchors_and_leaves_the_active_stitch(make_runner: MakeRunner) -> None:
    runner, recorder = make_runner(), Recorder()
    runner.register_hook(recorder)
    runner.model.backbone.set_stitch("L1-S1")
    metrics = runner.val()
    assert isinstance(runner.val_loop, StitchValLoop)
    assert runner.model.backbone.stitch.name == "L1-S1"
    expected = {f"{name}/{k}": v for name in ("S", "L") for k, v in evaluate_alone(runner, name).items()}
    assert metrics == pytest.approx(expected, nan_ok=True)
    iterations = [(f"{when}_val_iter", index) for index in range(BATCHES) for when in ("before", "after") * 2]
    val = [call for call in recorder.calls if "val" in call[0]]
    assert val[:-2] == [("before_val", None), ("before_val_epoch", None), *iterations]
    assert [point for point, _ in val[-2:]] == ["after_val_epoch", "after_val"]

    fail_at(runner.val_loop, 2)
    runner.model.backbone.set_stitch("L1-S1")
    with pytest.raises(ArithmeticError):
        runner.val()
    assert runner.model.backbone.stitch.name == "L1-S1"


@pytest.mark.slow
def test_a_spread_is_validated_by_default(make_runner: MakeRunner) -> None:
    runner = make_runner(val_cfg=dict(type="mmsnnet.StitchValLoop"))
    names = {name.partition("/")[0] for name in runner.val()}
    assert (
        names
        == {stitch.name for stitch in spread(runner.model.backbone.space, runner.model.backbone.sampler().bins)}
        == set(NAMES)
    )


@pytest.mark.slow
def test_validation_during_training(make_runner: MakeRunner, tmp_path: Path) -> None:
    """The hook initialises the layers, the best checkpoint of a stitch is kept, and training continues."""
    runner = make_runner(
        initialized=False,
        custom_hooks=[dict(type="mmsnnet.StitchInitHook", num_images=4), dict(type="mmsnnet.StitchLogHook")],
        default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1, save_best="L/mIoU")),
    )
    runner.train()
    scalars = runner.message_hub.log_scalars
    expected = {f"val/{s}/{m}" for s in ("S", "L") for m in ("aAcc", "mIoU", "mAcc")}
    assert {name for name in scalars if name.startswith("val/") and "time" not in name} == expected
    assert "train/flops_share" in scalars
    for name in ("S", "L"):
        alone = evaluate_alone(copy.copy(runner), name)
        assert scalars[f"val/{name}/mIoU"].current() == pytest.approx(alone["mIoU"])
    best = torch.load(tmp_path / "work_dir" / "best_L_mIoU_iter_1.pth", weights_only=False)
    assert best["state_dict"]["backbone.draws"] == 1


def test_nothing_but_the_image_loader_is_changed() -> None:
    pipeline = [dict(type="mmdet.LoadImageFromFile", backend_args=None), dict(type="Resize", scale=(32, 32))]
    loader = dict(batch_size=2, dataset=dict(type="RepeatDataset", dataset=dict(pipeline=pipeline)))
    checked = use_checked_image_loader(loader)
    inner = checked["dataset"]["dataset"]["pipeline"]
    assert inner == [dict(pipeline[0], type="mmsnnet.LoadImage"), pipeline[1]] and type(inner[1]["scale"]) is tuple
    assert pipeline[0]["type"] == "mmdet.LoadImageFromFile" and checked["batch_size"] == 2


def test_every_setting_of_the_image_loader_is_kept() -> None:
    settings = dict(
        to_float32=True, color_type="grayscale", imdecode_backend="pillow", backend_args=dict(backend="local")
    )
    unset = dict(ignore_empty=False, file_client_args=None)  # what mmcv's class takes and ours does not
    for kind in ("LoadImageFromFile", "mmcv.LoadImageFromFile", LoadImageFromFile):
        (loader,) = use_checked_image_loader(dict(pipeline=[dict(settings, type=kind, **unset)]))["pipeline"]
        assert loader == dict(settings, type="mmsnnet.LoadImage")
        built = TRANSFORMS.build(loader)
        assert {name: getattr(built, name) for name in settings} == settings
    (loader,) = use_checked_image_loader(dict(pipeline=[dict(type="LoadImageFromFile", ignore_empty=True)]))["pipeline"]
    with pytest.raises(TypeError, match="ignore_empty"):  # images are not skipped
        TRANSFORMS.build(loader)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["test", "val"])
def test_an_image_that_cannot_be_read_is_named(loop: str, make_runner: MakeRunner, data_root: Path) -> None:
    """The loop replaces the toolbox's image loader, whose error for an empty file does not name the file."""
    runner = make_runner()
    pipeline = runner.cfg[f"{loop}_dataloader"].dataset.pipeline
    assert pipeline[0].type == "LoadImageFromFile"
    stitch_loop = runner.test_loop if loop == "test" else runner.val_loop
    image = Path(stitch_loop.dataloader.dataset.get_data_info(0)["img_path"])
    content = image.read_bytes()
    image.write_bytes(b"")
    try:
        with pytest.raises(ValueError, match=f"{image.name}.*expected an image"):
            stitch_loop.run()
    finally:
        image.write_bytes(content)
    # The config, which is written beside the log, is as it was: inferencers look for the loader there.
    assert runner.cfg[f"{loop}_dataloader"].dataset.pipeline[0].type == "LoadImageFromFile"


# Passes for many stitches


def blocks_run(runner: Runner) -> list[int]:
    """A list whose entry counts the blocks that run from now on, without those of copies, which cost counting makes."""
    blocks = {block for anchor in runner.model.backbone.network.anchors for block in anchor.model.blocks}
    calls = [0]

    def count(block: nn.Module, *_: Any) -> None:
        calls[0] += block in blocks

    for block in blocks:
        block.register_forward_hook(count)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("per_pass", [None, 1, 3])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_prefix_reuse_changes_no_figure(mode: str, per_pass: int | None, make_runner: MakeRunner) -> None:
    """The routes are S0 S1, L0 L1 L2 L3, S0 L2 L3 and L0 L1 S1, and share S0 and L0 L1: 9 blocks instead of 12, if all
    run in one pass. A slide of three windows multiplies both."""
    found, counts = [], []
    for reuse in (True, False):
        runner = make_runner(test_cfg=dict(prefix_reuse=reuse, stitches_per_pass=per_pass))
        if mode == "slide":
            runner.model.test_cfg = ConfigDict(mode="slide", crop_size=(32, 16), stride=(32, 8))
        calls = blocks_run(runner)
        found.append(runner.test())
        counts.append(calls[0] // BATCHES // (3 if mode == "slide" else 1))
    assert found[0] == pytest.approx(found[1], abs=0, nan_ok=True) and len({*found[0].values()}) > 4
    assert counts[1] == 12 and counts[0] == {None: 9, 1: 12}.get(per_pass, counts[0])
    assert counts[0] <= counts[1]


@pytest.mark.slow
def test_each_batch_is_loaded_and_preprocessed_once(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner()
    dataset, preprocessor = runner.test_loop.dataloader.dataset, type(runner.model.data_preprocessor)
    loaded, preprocessed = [], []
    dataset.prepare_data = _noting(dataset.prepare_data, loaded)
    monkeypatch.setattr(preprocessor, "forward", _noting(preprocessor.forward, preprocessed))
    runner.test()
    assert (len(loaded), len(preprocessed)) == (5, BATCHES)


def _noting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return noting


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_size", "kept", "memory", "passes"),
    [
        (2, (10, 10, 10, 10), 25, [[2, 2, 2], [2, 2, 2]]),
        (5, (10, 10, 10, 10), 25, [[2], [2]]),
        (2, (10, 10, 20, 10), 45, [[3, 2, 2], [2, 2, 2]]),  # the third does not fit
        (2, (10, 10, 30, 10), 25, [[2, 2, 2], [1, 1, 1], [1, 1, 1]]),  # nor does it fit alone
        (2, (0, 0, 0, 0), 25, [[4, 4, 4]]),
    ],
)
def test_what_metrics_keep_is_bounded(
    batch_size: int,
    kept: Sequence[int],
    memory: int,
    passes: list[list[int]],
    make_runner: MakeRunner,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stitch whose metrics do not fit is left to a later pass before it runs, or after its first batch.

    ``kept`` is what a stitch keeps of each batch, ``memory`` as much for a whole pass, and ``passes`` the number of
    stitches that run on each batch of each pass.
    """
    expected = make_runner().test()
    runner, recorder = make_runner(), Recorder()
    runner.test_loop.dataloader = runner.build_dataloader(runner.cfg.test_dataloader | dict(batch_size=batch_size))
    runner.register_hook(recorder)
    monkeypatch.setattr(stitch_passes.StitchPass, "run", _noting(stitch_passes.StitchPass.run, recorder.calls))
    backbone = runner.model.backbone
    order = [stitch.name for stitch in backbone.prefix_order(backbone.space)]

    def kept_bytes(states: list[dict[str, Any]]) -> int:
        batches = 1 + next(call[1] for call in reversed(recorder.calls) if call[0] == "after_test_iter")
        return batches * kept[order.index(backbone.stitch.name)] * any(state["results"] for state in states)

    monkeypatch.setattr(stitch_passes, "kept_bytes", kept_bytes)
    monkeypatch.setattr(stitch_passes, "HOST_MEMORY", memory * len(runner.test_loop.dataloader))
    assert runner.test() == pytest.approx(expected, nan_ok=True)
    found: list[list[int]] = []
    for call, *index in recorder.calls:
        if isinstance(call, stitch_passes.StitchPass):
            found.append([0] * len(runner.test_loop.dataloader))
        elif call == "before_test_iter":
            found[-1][index[0]] += 1
    assert found == passes


@METRICS.register_module()
class LargeMetric(BaseMetric):
    """Keeps 8 MB for each image, between blocks that it frees, and records the memory of the process."""

    most: ClassVar[float] = 0

    def process(self, data_batch: Any, data_samples: Any) -> None:
        for _ in data_samples:
            freed, kept = (torch.ones(2 * 10**6) for _ in range(2))
            self.results.append(kept)
            del freed
        LargeMetric.most = max(LargeMetric.most, resident_megabytes())

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return dict(images=len(results))


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
def test_freed_memory_goes_back(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four stitches keep 160 MB of five images. glibc alone would hold as much again, and hold it afterwards."""
    monkeypatch.setattr(stitch_passes, "HOST_MEMORY", 200e6)
    runner = make_runner(test_evaluator=dict(type="mmsnnet.LargeMetric"))
    blocks = [torch.ones(2**20) for _ in range(8)]
    del blocks  # glibc now takes blocks of up to 32 MB from its heap
    ctypes.CDLL(None).malloc_trim(0)
    before = resident_megabytes()
    runner.test()
    assert LargeMetric.most - before < 240 and resident_megabytes() - before < 60


@pytest.mark.slow
def test_areas_are_added_up_as_the_metric_would(make_runner: MakeRunner) -> None:
    runner = make_runner(test_cfg=dict(stitches="S,L"))
    most: list[int] = []
    run_iter = runner.test_loop.run_iter

    def watched(*args: Any) -> None:
        run_iter(*args)
        most.append(max(len(metric.results) for metric in runner.test_loop.evaluator.metrics))

    runner.test_loop.run_iter = watched
    runner.test()
    assert max(most) == 3  # the sum so far and a batch of two


def test_bytes_that_are_kept() -> None:
    small, large = torch.zeros(10), torch.zeros(1000)
    assert 4000 < kept_bytes([large]) < 6000 < kept_bytes([large, large.clone()])
    assert kept_bytes([large[:1]]) > 4000  # a view keeps the whole
    assert kept_bytes({"a": [small, "x" * 5000]}) > 5000 + 40
    assert 8000 < kept_bytes((np.zeros(1000),)) < 9000


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [0, -1])
def test_no_stitches_per_pass(wrong: int, make_runner: MakeRunner) -> None:
    with pytest.raises(ValueError, match="stitches_per_pass is at least 1"):
        make_runner(test_cfg=dict(stitches_per_pass=wrong)).test()


# Metrics and losses that mmengine's loop handles


@METRICS.register_module()
class LogitMetric(BaseMetric):
    """The mean logit, held outside ``results``.

    With a folder it goes through files, as in mmseg's ``CityscapesMetric``. With ``uncopyable`` an attribute cannot be
    copied.
    """

    def __init__(self, output_dir: str | None = None, uncopyable: bool = False) -> None:
        super().__init__(prefix="logits")
        self.output_dir = output_dir
        self.means: dict[str, list[float]] = {"all": []}
        self.last = torch.zeros(())
        self.kept = (item for item in ()) if uncopyable else None

    def process(self, data_batch: Any, data_samples: Any) -> None:
        for sample in data_samples:
            mean = sample["seg_logits"]["data"].double().mean()
            self.last.copy_(mean)
            self.means["all"].append(mean.item())
            self.results.append(None)
            if self.output_dir:
                torch.save(mean, Path(self.output_dir, f"{Path(sample['img_path']).stem}.pt"))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        means, self.means = self.means["all"], {"all": []}
        assert len(results) == len(means)
        if self.output_dir:
            means = [torch.load(path).item() for path in sorted(Path(self.output_dir).glob("*.pt"))]
        return dict(mean=float(np.mean(means)), last=self.last.item())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["running", "files", "uncopyable", "uncopyable files"])
def test_metrics_that_keep_more_than_results(kind: str, make_runner: MakeRunner, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    settings = dict(uncopyable="uncopyable" in kind)
    if "files" in kind:
        settings |= dict(output_dir=str(tmp_path / "files"))
    runner = make_runner(test_evaluator=dict(type="mmsnnet.LogitMetric", **settings))
    found = runner.test()
    assert found == {f"{name}/{k}": value for name in NAMES for k, value in evaluate_alone(runner, name).items()}
    assert len({*found.values()}) == 2 * len(NAMES)
    log = Path(runner._log_dir, f"{runner.timestamp}.log").read_text()
    assert ("pass 4" in log and "a pass of its own: LogitMetric" in log) == ("uncopyable" in kind)


def test_what_metrics_only_read_is_shared() -> None:
    metric = LogitMetric()
    metric.dataset_meta, metric._coco_api = dict(classes=["a"]), object()
    state = vars(stitch_passes.copied_metric(metric))
    assert state.keys() == vars(metric).keys() and state["means"] == metric.means
    assert {name for name in state if state[name] is not getattr(metric, name)} == {"results", "means", "last"}


def test_each_stitch_has_an_evaluator_which_hooks_see(make_runner: MakeRunner) -> None:
    """The configured evaluator is in its place again after each iteration, and holds no results."""

    class Evaluators(Hook):
        def after_test_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
            seen.append(runner.test_evaluator)

    seen: list[Any] = []
    runner = make_runner(test_cfg=dict(stitches="S,L"))
    runner.register_hook(Evaluators())
    configured = runner.test_loop.evaluator
    runner.test()
    assert seen == seen[:2] * BATCHES and seen[0] is not seen[1] and configured not in seen
    assert seen[0].dataset_meta is configured.dataset_meta
    assert runner.test_loop.evaluator is configured and configured.metrics[0].results == []


@pytest.mark.slow
def test_losses_are_those_of_the_stock_loop(make_runner: MakeRunner) -> None:
    runner = make_runner()
    step = runner.model.test_step

    def with_losses(data: Any) -> list[Any]:
        losses = BaseDataElement()
        losses.loss = dict(loss_a=torch.rand(()), loss_b=torch.rand(()), acc=torch.rand(()))
        return [*step(data), losses]

    runner.model.test_step = with_losses
    torch.manual_seed(0)
    found = runner.test()
    names = {name for name in found if "IoU" not in name and "Acc" not in name}
    assert names == {f"{name}/{loss}" for name in NAMES for loss in ("loss_a", "loss_b", "acc", "test_loss")}
    assert {*found} == {f"{name}/{k}" for name in NAMES for k in evaluate_alone(runner, name)}
    for name in NAMES:
        assert found[f"{name}/test_loss"] == pytest.approx(found[f"{name}/loss_a"] + found[f"{name}/loss_b"])


@pytest.mark.slow
def test_test_time_augmentation(
    make_runner: MakeRunner, segmentor_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Two scales, each flipped and not; the checkpoint of the inner model is loaded strictly."""
    plain, out = make_runner(), tmp_path / "points.json"
    torch.save(plain.model.state_dict(), tmp_path / "weights.pth")
    loader = copy.deepcopy(plain.cfg.test_dataloader)
    load, annotate, pack = loader.dataset.pipeline
    scales = [dict(type="Resize", scale_factor=factor, keep_ratio=True) for factor in (1.0, 1.5)]
    flips = [dict(type="RandomFlip", prob=probability, direction="horizontal") for probability in (0.0, 1.0)]
    loader.dataset.pipeline = [load, dict(type="TestTimeAug", transforms=[scales, flips, [annotate], [pack]])]
    model = segmentor_config()
    del model["data_preprocessor"]["size"]
    runner = make_runner(
        initialized=False,
        model=dict(type="SegTTAModel", module=model),
        test_dataloader=loader,
        test_cfg=dict(out=str(out)),
        custom_hooks=[dict(type="mmsnnet.StrictLoadHook")],
        load_from=str(tmp_path / "weights.pth"),
    )
    found = runner.test()
    expected = {f"{name}/{k}": value for name in NAMES for k, value in evaluate_alone(runner, name).items()}
    assert found == pytest.approx(expected, abs=0, nan_ok=True)
    assert found != pytest.approx(plain.test(), nan_ok=True)
    costs = model_costs(plain.model)
    assert all(point.flops == costs[point.id].flops for point in OperatingPoints.load(out))


# Resuming


def interrupted(make_runner: MakeRunner, out: Path) -> None:
    runner = make_runner(test_cfg=dict(out=str(out), stitches_per_pass=1))
    fail_at(runner.test_loop, 3)
    with pytest.raises(ArithmeticError):
        runner.test()


@pytest.mark.slow
def test_a_resumed_run_ends_as_an_undisturbed_one(make_runner: MakeRunner, tmp_path: Path) -> None:
    resumed, whole = tmp_path / "resumed.json", tmp_path / "whole.json"
    make_runner(test_cfg=dict(out=str(whole))).test()
    interrupted(make_runner, resumed)
    assert len(OperatingPoints.load(resumed)) == 2
    runner = make_runner(test_cfg=dict(out=str(resumed), resume=True))
    ran: list[int] = []
    runner.test_loop.run_iter = _noting(runner.test_loop.run_iter, ran)
    metrics = runner.test()
    assert len(ran) == 2 * BATCHES and {name.partition("/")[0] for name in metrics} == set(NAMES)
    assert resumed.read_text() == whole.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(test_evaluator=dict(type="IoUMetric", iou_metrics=["mDice"])), "another config"),
        ("data", "another data set"),
        ("weights", "another checkpoint"),
        ("cut", "no valid JSON"),
    ],
)
def test_results_of_another_run_are_left_alone(change: Any, says: str, make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    interrupted(make_runner, out)
    if change == "cut":
        out.write_text(out.read_text()[:-20])
    before = out.read_text()
    runner = make_runner(test_cfg=dict(out=str(out), resume=True), **(change if isinstance(change, dict) else {}))
    if change == "data":
        runner.cfg.test_dataloader.dataset.data_prefix.img_path = "images/training"
    if change == "weights":
        runner.model.decode_head.conv_seg.bias.data[0] += 1e-6
    with pytest.raises(CannotResumeError, match=f"{says}.*--resume"):
        runner.test()
    assert out.read_text() == before


@pytest.mark.slow
def test_simultaneous_runs_write_into_one_file(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Each keeps what the other has measured, and the latencies that benchmark.py adds in the meantime."""
    out = tmp_path / "points.json"
    first, second = (make_runner(test_cfg=dict(stitches=name, out=str(out))) for name in ("S", "L"))
    found: dict[str, float] = {}

    class Second(Hook):
        def before_test_epoch(self, runner: Runner) -> None:
            found.update(second.test())
            points = OperatingPoints.load(out)
            timed = tuple(replace(point, latency_ms=2.0) for point in points)
            replace(points, points=timed, benchmark=dict(device="a clock")).save(out)

    first.register_hook(Second())  # the first has read the file by then
    found |= first.test()
    points = OperatingPoints.load(out)
    written = {f"{point.name}/{name}": value for point in points for name, value in point.metrics.items()}
    assert written == pytest.approx(found, abs=0, nan_ok=True)
    assert [(point.name, point.latency_ms) for point in points] == [("S", None), ("L", 2.0)]
    assert points.benchmark == dict(device="a clock")


@pytest.mark.slow
def test_results_of_another_run_are_replaced_with_a_warning(
    make_runner: MakeRunner, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "points.json"
    interrupted(make_runner, out)
    runner = make_runner(test_cfg=dict(stitches="S", out=str(out)))
    runner.model.decode_head.conv_seg.bias.data[0] += 1e-6
    runner.test()
    assert [point.name for point in OperatingPoints.load(out)] == ["S"]
    assert "points.json: the results of another checkpoint" in Path(runner.logger.log_file).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before", "metric", "at the end"])
def test_results_that_cannot_be_written(
    when: str, make_runner: MakeRunner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first image, or kept in the work folder."""
    (tmp_path / "file").touch()
    out = tmp_path / ("file/points.json" if when == "before" else "points.json")
    dump = dict(type="DumpResults", out_file_path=str(tmp_path / "file" / "all.pkl"))
    changes = dict(test_evaluator=dump) if when == "metric" else {}
    runner = make_runner(test_cfg=dict(stitches="S", out=str(out)), **changes)
    ran: list[int] = []
    runner.test_loop.run_iter = _noting(runner.test_loop.run_iter, ran)
    if when == "at the end":
        runner.test_loop.run_iter = lambda *args, run=runner.test_loop.run_iter: (out.mkdir(exist_ok=True), run(*args))
    with pytest.raises(OutputError) as found:
        runner.test()
    if when != "at the end":
        assert not ran and str(tmp_path / "file") in str(found.value)
        assert ("--out" if when == "before" else "DumpResults.out_file_path") in str(found.value)
        return
    kept = Path(runner.log_dir) / "operating_points.json"
    assert f"{out} cannot be written" in str(found.value) and f"--out {kept} --resume" in str(found.value)
    assert OperatingPoints.load(kept).points[0].metrics and "mIoU" in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_keeps_latencies(make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    interrupted(make_runner, out)
    points = OperatingPoints.load(out)
    lacking = next(stitch for stitch in make_runner().model.backbone.space if stitch.id not in {p.id for p in points})
    timed = OperatingPoint(lacking.id, lacking.name, lacking.kind, 1, 1, {}, latency_ms=2.0)
    replace(points.add(timed), benchmark=dict(device="a clock")).save(out)
    make_runner(test_cfg=dict(out=str(out), resume=True)).test()
    resumed = OperatingPoints.load(out)
    assert resumed.benchmark == dict(device="a clock") and all(point.metrics for point in resumed)
    assert {point.id: point.latency_ms for point in resumed if point.latency_ms} == {lacking.id: 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_latencies_that_were_measured_first_are_kept(resume: bool, make_runner: MakeRunner, tmp_path: Path) -> None:
    """benchmark.py writes latencies of all stitches, without metrics or fingerprint; --resume accepts them."""
    out = tmp_path / "points.json"
    runner = make_runner(test_cfg=dict(stitches="anchors", out=str(out), resume=resume))
    costs = model_costs(runner.model)
    timed = [
        OperatingPoint(s.id, s.name, s.kind, costs[s.id].flops, costs[s.id].params, {}, 2.0 + s.id, 5.0, 7)
        for s in runner.model.backbone.space
    ]
    first = OperatingPoints(None, None, None, (32, 32), "cuda:0", tuple(timed), benchmark=dict(device="a clock"))
    first.save(out)
    runner.test()
    found = OperatingPoints.load(out)
    assert tuple(replace(point, metrics={}) for point in found) == tuple(timed)
    assert {point.name for point in found if point.metrics} == {"S", "L"}
    assert found.benchmark == first.benchmark and found.fingerprint and found.device == "cpu"

    # What another model, or another config, took says nothing of this one.
    for other in (
        replace(first, points=(replace(timed[0], flops=timed[0].flops + 1), *timed[1:])),
        replace(first, input_shape=(32, 48)),
    ):
        other.save(out)
        if resume:
            with pytest.raises(CannotResumeError, match=r"another model or config.*--resume"):
                runner.test()
            assert OperatingPoints.load(out) == other
        else:
            runner.test()
            found = OperatingPoints.load(out)
            assert len(found) == 2 and not found.benchmark and all(point.latency_ms is None for point in found)


@pytest.mark.slow
def test_results_that_are_measured_anew_keep_latencies(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Other weights do not change the latency of a model."""
    out = tmp_path / "points.json"
    runner = make_runner(test_cfg=dict(stitches="S", out=str(out)))
    runner.test()
    points = OperatingPoints.load(out)
    timed = replace(points.points[0], latency_ms=2.0, metrics=dict(mIoU=-1.0))
    replace(points, points=(timed,), fingerprint={}, benchmark=dict(device="a clock")).save(out)
    runner.test()
    found = OperatingPoints.load(out)
    assert found == replace(points, points=(replace(points.points[0], latency_ms=2.0),), benchmark=found.benchmark)
    assert found.benchmark == dict(device="a clock")


@pytest.mark.slow
def test_settings_that_change_no_figure_are_no_other_config(
    make_runner: MakeRunner, segmentor_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "points.json"
    make_runner(test_cfg=dict(stitches="S", out=str(out))).test()
    before = out.read_text()
    runner = make_runner(test_cfg=dict(stitches="S", out=str(out), resume=True))
    backbone = runner.cfg.model.backbone
    backbone.update(stitch="S0-L2", seed=3, with_cp=True, init_cfg=dict(type="Pretrained"), frozen_anchors=[0])
    backbone.anchors[0].update(drop_path_rate=0.3, pretrained="elsewhere")
    runner.test()
    assert out.read_text() == before
    for change in (dict(test_cfg=dict(mode="slide")), dict(seed=1)):  # of the segmentor, not of the backbone
        runner.cfg.model.update(change)
        with pytest.raises(CannotResumeError, match="another config,"):
            runner.test()
        for name in change:
            runner.cfg.model[name] = segmentor_config().get(name)


@pytest.mark.slow
def test_files_that_were_changed_are_another_data_set(make_runner: MakeRunner, data_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    make_runner(test_cfg=dict(stitches="S", out=str(out))).test()
    labels = next((data_root / "annotations" / "validation").iterdir())
    content, stat = labels.read_bytes(), labels.stat()
    runner = make_runner(test_cfg=dict(stitches="S", out=str(out), resume=True))
    try:
        os.utime(labels, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        with pytest.raises(CannotResumeError, match="another data set,"):
            runner.test()
        labels.write_bytes(content + b" ")
        os.utime(labels, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(CannotResumeError, match="another data set,"):
            runner.test()
    finally:
        labels.write_bytes(content)
        os.utime(labels, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    runner.test()


def test_a_run_that_starts_is_not_resumed(make_runner: MakeRunner, tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    make_runner(test_cfg=dict(out=str(out), resume=True)).test()
    assert [point.name for point in OperatingPoints.load(out)] == list(NAMES)


# Values and files of metrics


@METRICS.register_module()
class Confusion(BaseMetric):
    """A number, and values that are not numbers."""

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results += [0] * len(data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[Any, Any]:
        return dict(images=np.int64(len(results)), matrix=np.eye(8), worst="bar", odd=object(), keys={1: 2}, none=None)


WITH_OTHERS = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="mmsnnet.Confusion", prefix="my")]


def console_of(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list of the messages that are logged to the console from now on."""
    messages: list[str] = []
    for handler in (h for h in runner.logger.handlers if not isinstance(h, logging.FileHandler)):
        monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    return messages


@pytest.mark.slow
def test_values_that_are_no_numbers(make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gets numbers, hooks get the values that they can handle, and the log gets all."""
    out = tmp_path / "points.json"
    runner, recorder = make_runner(test_evaluator=WITH_OTHERS, test_cfg=dict(out=str(out))), Recorder()
    runner.register_hook(recorder)
    messages = console_of(runner, monkeypatch)
    runner.test()
    plain = make_runner().test()
    for point in OperatingPoints.load(out):
        assert {name: value for name, value in point.metrics.items() if name != "my/images"} == pytest.approx(
            {name: plain[f"{point.name}/{name}"] for name in ("aAcc", "mIoU", "mAcc")}, nan_ok=True
        )
        assert point.metrics["my/images"] == 5
    metrics = next(metrics for call, metrics in recorder.calls if call == "after_test_epoch")
    own = {name.removeprefix("L/my/"): value for name, value in metrics.items() if name.startswith("L/my/")}
    assert own.pop("matrix").tolist() == np.eye(8).tolist() and own == dict(images=5, worst="bar", none=None)
    assert [line for line in messages if "not numbers" in line] == [
        "not numbers, so only in the log file: my/matrix, my/worst, my/odd, my/keys and 1 more"
    ]
    log = Path(runner._log_dir, f"{runner.timestamp}.log").read_text()
    assert "stitch S0-L2: my/matrix, which is no number: ndarray of shape (8, 8)" in log and "my/odd, which" in log


@pytest.mark.slow
def test_training_goes_on_beside_such_values(make_runner: MakeRunner, tmp_path: Path) -> None:
    """Checkpoints hold them, and a run resumes from these. The largest anchor decides which checkpoint is best."""
    hook = dict(type="mmsnnet.AtomicCheckpointHook", by_epoch=False, interval=1, save_best="auto")
    settings = dict(val_evaluator=WITH_OTHERS, default_hooks=dict(checkpoint=hook))
    for iters in (1, 2):
        train = dict(type="IterBasedTrainLoop", max_iters=iters, val_interval=1)
        runner = make_runner(train_cfg=train, resume=iters == 2, **settings)
        if iters == 2:
            runner._load_from = str(tmp_path / "work_dir" / "iter_1.pth")
        runner.train()
        assert runner.message_hub.get_info("val/L/my/worst") == "bar"
    assert (tmp_path / "work_dir" / "best_L_mIoU_iter_1.pth").exists() or (
        tmp_path / "work_dir" / "best_L_mIoU_iter_2.pth"
    ).exists()


@pytest.mark.slow
def test_results_are_written_before_they_are_printed(
    make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(console: Console, *lines: Any, **kwargs: Any) -> None:
        if "mIoU" in str(lines):
            raise UnicodeEncodeError("ascii", "mIoU", 0, 1, "a console that cannot print")

    monkeypatch.setattr(Console, "print", fail)
    out = tmp_path / "points.json"
    with pytest.raises(UnicodeEncodeError):
        make_runner(test_cfg=dict(out=str(out))).test()
    assert [point.name for point in OperatingPoints.load(out) if point.metrics] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["test", "val"])
def test_a_folder_for_each_stitch(stage: str, make_runner: MakeRunner, tmp_path: Path) -> None:
    """It has the files that mmengine's loop writes for that stitch."""

    def evaluator(folder: Path) -> list[dict[str, Any]]:
        return [
            dict(type="IoUMetric", output_dir=str(folder / "masks")),
            dict(type="DumpResults", out_file_path=str(folder / "dump.pkl")),
        ]

    def contents(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    settings = {f"{stage}_evaluator": evaluator(tmp_path / "ours")}
    if stage == "val":
        settings["val_cfg"] = dict(type="mmsnnet.StitchValLoop", stitches="all")
    draws = dict(type="SegVisualizationHook", draw=True, interval=1)
    visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], alpha=1.0)
    runner = make_runner(default_hooks=dict(visualization=draws), visualizer=visualizer, **settings)
    getattr(runner, stage)()
    pictures = Path(runner._log_dir, "vis_data", "vis_image")
    drawn = {path.name: len(list(path.iterdir())) for path in pictures.iterdir()}
    assert drawn == dict.fromkeys(NAMES, 5 if stage == "test" else BATCHES)
    indices = {path.stem.rpartition("_")[2] for path in (pictures / "L").iterdir()}
    assert indices == ({*"12345"} if stage == "test" else {*"012"})  # as if it were alone
    for name in NAMES if stage == "test" else ("L",):
        runner.cfg.test_evaluator = evaluator(tmp_path / name)
        evaluate_alone(runner, name)
        masks = contents(tmp_path / "ours" / "masks" / name)
        assert len(masks) == 5 and masks == contents(tmp_path / name / "masks")
        dumps = [load(str(folder / "dump.pkl")) for folder in (tmp_path / "ours" / name, tmp_path / name)]
        for ours, stock in zip(*dumps, strict=True):
            assert ours["img_path"] == stock["img_path"]
            assert torch.equal(ours["pred_sem_seg"]["data"], stock["pred_sem_seg"]["data"])


@pytest.mark.slow
def test_one_stitch_needs_no_folder(make_runner: MakeRunner, tmp_path: Path) -> None:
    evaluator = dict(type="IoUMetric", output_dir=str(tmp_path / "masks"))
    make_runner(test_evaluator=evaluator, test_cfg=dict(stitches="L")).test()
    assert len(list((tmp_path / "masks").glob("*.png"))) == 5


def without_labels(loader: Any, listed: bool = False) -> Any:
    """A loader that loads no labels; its data set lists labels only if ``listed``."""
    loader.dataset.pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    if not listed:
        loader.dataset.data_prefix = dict(img_path="images/validation")
    return loader


@pytest.mark.slow
def test_predictions_for_a_set_without_labels(
    make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "points.json"
    loader = without_labels(make_runner().cfg.test_dataloader)
    runner = make_runner(test_dataloader=loader, test_cfg=dict(out=str(out)))
    with pytest.raises(SettingError, match=r"test_evaluator: IoUMetric.*lists no seg_map_path.*format_only=True"):
        runner.test()
    assert not out.exists()
    evaluator = dict(type="IoUMetric", format_only=True, output_dir=str(tmp_path / "masks"))
    runner = make_runner(test_dataloader=loader, test_evaluator=evaluator, test_cfg=dict(out=str(out)))
    messages = console_of(runner, monkeypatch)
    assert runner.test() == {}
    assert {path.name: len(list(path.glob("*.png"))) for path in (tmp_path / "masks").iterdir()} == dict.fromkeys(
        NAMES, 5
    )
    assert [(point.name, point.metrics) for point in OperatingPoints.load(out)] == [(name, {}) for name in NAMES]
    warnings = [line for line in messages if "empty" in line or "measured" in line]
    assert warnings == [f"no metrics were measured; results are in {tmp_path / 'masks' / '<stitch>'}"]


@pytest.mark.slow
@pytest.mark.parametrize("lacking", ["labels", "pipeline"])
def test_validation_without_labels_is_refused_before_training(lacking: str, make_runner: MakeRunner) -> None:
    loader = without_labels(make_runner().cfg.val_dataloader, listed=lacking == "pipeline")
    hook = dict(type="mmsnnet.AtomicCheckpointHook", by_epoch=False)
    runner = make_runner(val_dataloader=loader, default_hooks=dict(checkpoint=hook))
    says = dict(labels="lists no seg_map_path", pipeline="packs no gt_sem_seg")[lacking]
    with pytest.raises(SettingError, match=f"val_evaluator: IoUMetric.*{says}"):
        runner.train()
    assert runner.iter == 0 and not runner._has_loaded


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mIoU", "mIuO"])
def test_a_wrong_metric_is_refused_before_training(name: str, make_runner: MakeRunner) -> None:
    """The second is a metric whose direction mmengine does not know."""
    hook = dict(type="mmsnnet.AtomicCheckpointHook", by_epoch=False, save_best=name)
    runner = make_runner(default_hooks=dict(checkpoint=hook))
    with pytest.raises(SettingError, match=f"no metric is called {name}; those of this loop are S/mIoU, L/mIoU, "):
        runner.train()
    assert runner.iter == 0


@pytest.mark.slow
def test_classes_that_never_occur(make_runner: MakeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The console shows one warning for all passes and stitches."""
    loader = make_runner().cfg.test_dataloader
    loader.dataset.pipeline.insert(2, dict(type="mmsnnet.WithoutLast"))
    runner = make_runner(test_dataloader=loader, test_cfg=dict(stitches_per_pass=1))
    messages = console_of(runner, monkeypatch)
    runner.test()
    (warning,) = [line for line in messages if "never occur" in line]
    assert CLASSES[-1] in warning and CLASSES[1] not in warning and "test set" in warning


@pytest.mark.slow
def test_metrics_that_are_all_nan(make_runner: MakeRunner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = dict(type="IoUMetric", ignore_index=0)
    loader = make_runner().cfg.test_dataloader
    loader.dataset.pipeline.insert(2, dict(type="mmsnnet.Blank"))
    out = tmp_path / "points.json"
    runner = make_runner(test_dataloader=loader, test_evaluator=evaluator, test_cfg=dict(out=str(out)))
    messages = console_of(runner, monkeypatch)
    runner.test()
    assert any(line.startswith("no class occurs in the label maps of the test set") for line in messages)
    assert any(line.startswith("every metric of S, L, S0-L2, L1-S1 is NaN") for line in messages)
    assert all(np.isnan([*point.metrics.values()]).all() for point in OperatingPoints.load(out))


@TRANSFORMS.register_module()
class WithoutLast:
    """Remove the last class from label maps."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        labels = results["gt_seg_map"]
        labels[labels == len(CLASSES) - 1] = 255
        return results


@TRANSFORMS.register_module()
class Blank:
    """Set all labels to 0."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["gt_seg_map"][:] = 0
        return results
