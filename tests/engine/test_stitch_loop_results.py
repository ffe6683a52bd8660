"""The files that the loops over stitches write: resumed, replaced, of metrics with values and files of their own."""

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.fileio import load
from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console

from mmsnnet.datasets.procedural.shapes import CLASSES
from mmsnnet.engine.runner.measured_points import CannotResumeError
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.files.writing import OutputError
from mmsnnet.models import model_costs
from mmsnnet.registry import METRICS, TRANSFORMS
from tests.engine.test_stitch_loops import BATCHES, NAMES, MakeRunner, Recorder, evaluate_alone, fail_at, noting

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
    runner.test_loop.run_iter = noting(runner.test_loop.run_iter, ran)
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
    runner.test_loop.run_iter = noting(runner.test_loop.run_iter, ran)
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
