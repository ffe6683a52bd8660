"""Test and validation loops that read each batch once and run many stitches on it.

:class:`StitchTestLoop` runs all stitches by default, :class:`StitchValLoop` a few that show how the space trains.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop, Runner, TestLoop, ValLoop
from mmengine.runner.amp import autocast
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.datasets.transforms.image import with_checked_loader
from mmsnnet.engine.agreement import check_loader
from mmsnnet.engine.console import console_handlers
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.recalibration import recalibrate_on_training_images
from mmsnnet.engine.runner.labels import check_labels
from mmsnnet.engine.runner.measured_points import load_measured_points, run_fingerprint, run_header, save_points
from mmsnnet.engine.runner.metric_values import split_values, text_for_log, values_for_hooks
from mmsnnet.engine.runner.metric_warnings import MOST_NAMES, empty_metrics_warning
from mmsnnet.engine.runner.stitch_files import StitchPictures, make_folders, output_paths
from mmsnnet.engine.runner.stitch_passes import StitchPass, StitchResults, copied_metric
from mmsnnet.evaluation import OperatingPoint
from mmsnnet.files.reading import join_names
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.models.recalibration import NormStatistics
from mmsnnet.registry import LOOPS
from mmsnnet.stitching import LayerKey, Stitch, spread


def use_checked_image_loader(dataloader: DataLoader | dict) -> DataLoader | dict:
    """A data loader's config with ``mmsnnet.LoadImage`` in the place of ``LoadImageFromFile``."""
    return with_checked_loader(dataloader) if isinstance(dataloader, dict) else dataloader


class _StitchLoop(BaseLoop):
    """Evaluation of stitches, for testing and validation; ``stage`` is ``'test'`` or ``'val'``."""

    stage: ClassVar[str]
    evaluator: Evaluator

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        *,
        stitches: str | Sequence[int | str] = "spread",
        prefix_reuse: bool = True,
        stitches_per_pass: int | None = None,
    ) -> None:
        # Calls the constructor of mmengine's TestLoop or ValLoop, which follows in the order of base classes.
        super().__init__(runner, use_checked_image_loader(dataloader), evaluator, fp16)
        if stitches_per_pass is not None and stitches_per_pass < 1:
            raise ValueError(
                f"stitches_per_pass is at least 1, or None for as many as memory allows; got {stitches_per_pass}"
            )
        self._selection = stitches
        self.prefix_reuse = prefix_reuse
        self.stitches_per_pass = stitches_per_pass
        if isinstance(runner.model, nn.Module):  # a FlexibleRunner builds its model later
            _ = self.stitches

    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone of the runner's model."""
        return find_stitched_backbone(self.runner.model)

    @cached_property
    def stitches(self) -> tuple[Stitch, ...]:
        """The stitches to evaluate.

        Raises:
            UnknownStitchError: the space lacks one of them.
        """
        if self.stage == "val" and self._selection == "spread":
            return spread(self.backbone.space, self.backbone.sampler().bins)
        return self.backbone.space.select(self._selection)

    def _run_batch(self, results: StitchResults, index: int, batch: Any) -> None:
        """Run mmengine's iteration with the evaluator and the losses of one stitch, which hooks then see."""
        configured, losses = self.evaluator, f"{self.stage}_loss"
        self.evaluator = results.evaluator
        setattr(self, losses, results.losses)
        try:
            self.run_iter(index, batch)
        finally:
            self.evaluator, results.losses = configured, getattr(self, losses)
            setattr(self, losses, {})

    def _evaluate(
        self, stitches: Sequence[Stitch], statistics: Mapping[Stitch, NormStatistics] | None = None
    ) -> Iterator[dict[Stitch, tuple[dict[str, float], dict[str, Any]]]]:
        """Evaluate stitches; yield after each pass the metrics of its stitches: numbers, and others that hooks can use.

        ``statistics`` are those of batch norms, of the stitches that have their own.
        The metrics are printed after the caller has saved them, or could not. The active stitch is the same afterwards.
        """
        backbone, logger, configured = self.backbone, self.runner.logger, self.evaluator.metrics
        waiting, per_pass = backbone.prefix_order(stitches), self.stitches_per_pass
        if uncopyable := [type(metric).__name__ for metric in configured if copied_metric(metric) is None]:
            logger.info(f"each stitch has a pass of its own: {', '.join(uncopyable)} cannot be copied")
            per_pass = 1
        has_folders = len(self.stitches) > 1
        names = [stitch.name for stitch in self.stitches]
        pictures = StitchPictures(self.runner.hooks, self.runner.visualizer, names) if has_folders else None
        # With warnings alone on the console (--quiet of the tools), a test shows its progress and a validation nothing.
        verbose = any(handler.level <= logging.INFO for handler in console_handlers(logger))
        hidden = not is_main_process() or (self.stage == "val" and not verbose)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        active, number = backbone.stitch, 0
        numbers_by_name: dict[str, dict[str, float]] = {}
        try:
            with _quiet_console(logger), Progress(*columns, console=Console(), disable=hidden) as progress:
                task = progress.add_task("", total=len(waiting) * len(self.dataloader))
                while waiting:
                    start, number = time.monotonic(), number + 1
                    stitch_pass = StitchPass(
                        self.dataloader,
                        self.evaluator,
                        self.runner.model,
                        backbone,
                        waiting[:per_pass],
                        self._run_batch,
                        self.stage,
                        prefix_reuse=self.prefix_reuse,
                        bounded=per_pass is None,
                        pictures=pictures,
                        statistics=statistics or {},
                    )
                    done = len(numbers_by_name) * len(self.dataloader)
                    for batches, size in enumerate(stitch_pass.run(), start=1):
                        description = f"pass {number}, {size} stitches"
                        progress.update(task, description=description, completed=done + batches * size)
                    if number == 1 and (warning := stitch_pass.absent_classes_warning()):
                        logger.warning(warning)
                    split = {stitch: split_values(stitch_pass.evaluate(stitch)) for stitch in list(stitch_pass.results)}
                    try:
                        yield {stitch: (numbers, values_for_hooks(o)) for stitch, (numbers, o) in split.items()}
                    finally:
                        console = progress.console if verbose and is_main_process() else None
                        for stitch, (numbers, others) in split.items():
                            _report(stitch, numbers, others, logger, console)
                            numbers_by_name[stitch.name] = numbers
                    if number == 1 and (others := dict.fromkeys(name for _, other in split.values() for name in other)):
                        logger.warning(f"not numbers, so only in the log file: {join_names(list(others), MOST_NAMES)}")
                    seconds = time.monotonic() - start
                    logger.info(f"pass {number}: {len(split)} of {len(waiting)} stitches left, {seconds:.1f} s")
                    waiting = waiting[len(split) :]
            measured = {name: numbers_by_name[name] for name in names if name in numbers_by_name}
            if warning := empty_metrics_warning(measured):
                logger.warning(warning)
            if measured and not any(measured.values()):
                folder = "<stitch>" if has_folders else ""
                paths = [path for metric in configured for path in output_paths(metric, folder).values()]
                logger.warning(f"no metrics were measured; results are in {', '.join(paths) or 'the log file'}")
        finally:
            backbone.set_stitch(active)


@LOOPS.register_module()
class StitchTestLoop(_StitchLoop, TestLoop):
    """Test a stitched model at the chosen stitches and write the file of operating points.

    A pass over the data serves many stitches: each batch is loaded and preprocessed once, and the stitches compute the
    blocks that they start with once (:meth:`StitchedBackbone.reuse_prefixes`). After each pass the file is replaced
    atomically. Hooks see one test epoch, with an iteration for each batch and stitch and with metrics named
    ``<stitch>/<metric>``. Metrics that are no numbers go to the log and to the hooks, but not to the file.

    Metrics and hooks write into a folder for each stitch, ``output_dir/<stitch>/``; with a single stitch, they write
    where they do in mmengine's loop.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``TestLoop``.
        stitches: ``'all'``, ``'anchors'``, or ids and names, see :meth:`mmsnnet.stitching.StitchSpace.select`.
        out: path of the file of operating points; None writes no file.
        prefix_reuse: whether stitches share prefixes; the results are the same either way.
        stitches_per_pass: the most stitches in a pass; by default, as many as let metrics hold at most 2 GiB. A run
            that is killed loses one pass.
        resume: evaluate only the stitches that the file of operating points lacks. Without it, the file still keeps the
            latencies of the same model.
        recalibrate: evaluate each stitch with running statistics of batch norms that are its own, over this many
            training images (:func:`mmsnnet.engine.recalibration.recalibrate_on_training_images`). The model gets back
            the statistics that routes share.
    """

    stage = "test"

    def __init__(
        self,
        *args: Any,
        stitches: str | Sequence[int | str] = "all",
        out: str | None = None,
        resume: bool = False,
        recalibrate: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, stitches=stitches, **kwargs)
        self.out = out
        self.resume = resume
        self.recalibrate = recalibrate

    def run(self) -> dict[str, Any]:
        """Evaluate each stitch; return every metric under ``<stitch>/<metric>``.

        Raises:
            RuntimeError: a stitch runs through stitching layers that were neither initialised nor loaded.
            SettingError: the evaluator compares predictions with labels, and the data set has none; or the training set
                has too few images to recalibrate.
            CannotResumeError: the file is damaged, or of another checkpoint, config, data set, recalibration or model.
            OutputError: the file, or a folder for results of a metric, cannot be written.
        """
        dataset = self.dataloader.dataset
        with fail_together():
            check_labels(dataset, self.evaluator.metrics, "test")
            check_loader(self.runner.model, self.dataloader, "test_dataloader", load=False)
            for metric in self.evaluator.metrics:
                make_folders(metric)
        model, config = unwrapped_model(self.runner.model), self.runner.cfg
        costs = model_costs(model)
        unmeasured = {
            s.id: OperatingPoint(s.id, s.name, s.kind, costs[s.id].flops, costs[s.id].params)
            for s in self.backbone.space
        }
        points = replace(run_header(config, self.backbone, dataset), recalibrated=self.recalibrate)
        if self.out is not None:
            fingerprint = run_fingerprint(config, model, dataset, self.fp16, self.recalibrate)
            points = replace(points, fingerprint=fingerprint)
            points = load_measured_points(points, unmeasured.values(), self.out, self.resume)
        spare = Path(self.runner.log_dir) / "operating_points.json"  # a folder of this run alone
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.runner.model.eval()
        by_id = unmeasured | {point.id: point for point in points}
        others_by_id: dict[int, dict[str, Any]] = {}
        waiting = [stitch for stitch in self.stitches if not by_id[stitch.id].metrics]
        _check_initialized(self.backbone, waiting)
        statistics = None
        if self.recalibrate is not None and waiting:
            with autocast(enabled=self.fp16), fail_together():
                statistics = recalibrate_on_training_images(config, model, waiting, self.recalibrate, self.prefix_reuse)
        for evaluated in self._evaluate(waiting, statistics):
            for stitch, (numbers, others) in evaluated.items():
                points = points.add(replace(by_id[stitch.id], metrics=numbers))
                others_by_id[stitch.id] = others
            points = replace(points, points=tuple(sorted(points, key=lambda point: point.id)))
            with fail_together():
                if self.out is not None and is_main_process():
                    points = save_points(points, unmeasured.values(), self.out, spare)
        metrics = _by_name(self.stitches, {p.id: {**p.metrics, **others_by_id.get(p.id, {})} for p in points})
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics


@LOOPS.register_module()
class StitchValLoop(_StitchLoop, ValLoop):
    """Validate a stitched model at a few stitches, in one pass over the data.

    Hooks see one validation epoch with metrics named ``<stitch>/<metric>``: ``save_best='L/mIoU'`` keeps the best
    checkpoint of a stitch, and TensorBoard shows a curve for each stitch.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``ValLoop``.
        stitches: as of :class:`StitchTestLoop`, or ``'spread'`` for the anchors and some stitches between them
            (:func:`mmsnnet.stitching.spread`).
        prefix_reuse, stitches_per_pass: as of :class:`StitchTestLoop`.
    """

    stage = "val"
    _has_run = False

    def run(self) -> dict[str, Any]:
        """Evaluate each stitch; return every metric under ``<stitch>/<metric>``.

        Raises:
            RuntimeError: a stitch runs through stitching layers that were neither initialised nor loaded.
            SettingError: the evaluator compares predictions with labels, and the data set has none.
        """
        if not self._has_run:
            check_labels(self.dataloader.dataset, self.evaluator.metrics, "val")
            self._has_run = True
        by_id: dict[int, dict[str, Any]] = {}
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        _check_initialized(self.backbone, self.stitches)
        for evaluated in self._evaluate(self.stitches):
            by_id |= {stitch.id: {**numbers, **others} for stitch, (numbers, others) in evaluated.items()}
        metrics = _by_name(self.stitches, by_id)
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics


def _by_name(stitches: Sequence[Stitch], metrics: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{stitch.name}/{name}": value for stitch in stitches for name, value in metrics[stitch.id].items()}


def _check_initialized(backbone: StitchedBackbone, stitches: Sequence[Stitch]) -> None:
    def layers(stitch: Stitch) -> list[LayerKey]:
        return [part for part in backbone.parts(stitch) if isinstance(part, LayerKey)]

    network = backbone.network
    lacking = [stitch.name for stitch in stitches if any(not network.layer(key).initialized for key in layers(stitch))]
    if lacking:
        raise RuntimeError(
            f"{len(lacking)} of {len(stitches)} stitches, {lacking[0]} for one, run through stitching layers that were "
            "neither initialised nor loaded: is the checkpoint one of a stitched model of these anchors?"
        )


def _report(
    stitch: Stitch, numbers: Mapping[str, float], others: Mapping[str, Any], logger: MMLogger, console: Console | None
) -> None:
    values = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    line = f"{stitch.id:>4}  {stitch.name:<14} {values or 'no metrics'}"
    if console is not None:
        console.print(line, highlight=False)
    logger.info(f"stitch {line}")
    for name, value in others.items():
        logger.info(f"stitch {stitch.name}: {name}, which is no number: {text_for_log(value)}")


@contextmanager
def _quiet_console(logger: MMLogger) -> Iterator[None]:
    """Log what passes report, such as tables of classes, to the log file only: the console shows the progress."""
    handlers = console_handlers(logger)
    levels = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(max(handler.level, logging.WARNING))
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
