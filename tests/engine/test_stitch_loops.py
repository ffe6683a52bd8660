"""The loops over stitches measure what mmengine's loops measure for each stitch, and call hooks as they do."""

import copy
import ctypes
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import ConfigDict
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner, TestLoop
from mmengine.structures import BaseDataElement
from torch import nn

from mmsnnet.engine import StitchTestLoop, StitchValLoop
from mmsnnet.engine.runner import stitch_passes
from mmsnnet.engine.runner.stitch_loops import use_checked_image_loader
from mmsnnet.engine.runner.stitch_passes import kept_bytes
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.registry import METRICS, TRANSFORMS
from mmsnnet.stitching import UnknownStitchError, spread

MakeRunner = Callable[..., Runner]
NAMES = ("S", "L", "S0-L2", "L1-S1")
BATCHES = 3  # of five images, two at a time


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
        with pytest.raises(ValueError, match=f"{image.name} is empty"):
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
    dataset.prepare_data = noting(dataset.prepare_data, loaded)
    monkeypatch.setattr(preprocessor, "forward", noting(preprocessor.forward, preprocessed))
    runner.test()
    assert (len(loaded), len(preprocessed)) == (5, BATCHES)


def noting(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
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
    monkeypatch.setattr(stitch_passes.StitchPass, "run", noting(stitch_passes.StitchPass.run, recorder.calls))
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
