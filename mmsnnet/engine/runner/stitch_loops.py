"""Loops that evaluate a stitched model at several stitches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

from mmengine.config import ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.runner import Runner, TestLoop, ValLoop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.agreement import check_loader
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.runner.labels import check_labels
from mmsnnet.engine.runner.metric_values import for_hooks, shown, split_values
from mmsnnet.engine.runner.metric_warnings import empty_metrics, few
from mmsnnet.engine.runner.resume import start
from mmsnnet.engine.runner.stitch_files import output_paths
from mmsnnet.engine.runner.stitch_passes import StitchPass, needs_own_pass
from mmsnnet.evaluation import OperatingPoint
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import LOOPS
from mmsnnet.stitching import LayerKey, Stitch
from mmsnnet.stitching.route_parts import classifier_parts, tap_parts


def checked_loading(dataloader: DataLoader | dict) -> DataLoader | dict:
    """A data loader's config with ``mmsnnet.LoadImage``, whose errors name the file and what was expected, in place of
    ``LoadImageFromFile``. Configs have the latter in their test pipelines, because the toolboxes' inferencers look for
    it there by its name."""
    if not isinstance(dataloader, dict):
        return dataloader

    def checked(setting: Any) -> Any:
        if isinstance(setting, dict):
            inner = {key: checked(value) for key, value in setting.items()}
            kind = setting.get("type")  # a name, or the class itself in a config of Python's
            name = kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]
            if name == "LoadImageFromFile":
                inner["type"] = "mmsnnet.LoadImage"
                for option, unset in (("ignore_empty", False), ("file_client_args", None)):  # which LoadImage lacks
                    if option in inner and inner[option] == unset:
                        del inner[option]
            return ConfigDict(inner)
        return type(setting)(map(checked, setting)) if isinstance(setting, list | tuple) else setting

    return checked(dataloader)


@LOOPS.register_module()
class StitchTestLoop(TestLoop):
    """Tests a stitched model at each of the chosen stitches and writes the file of operating points.

    A pass over the data serves many stitches: each batch is loaded and preprocessed once and walked through them, and
    they share the blocks that they have in common (:meth:`StitchedBackbone.reuse_prefixes`). The file is written anew,
    atomically, after each pass. Hooks see one test epoch, whose metrics are named ``<stitch>/<metric>``, with an
    iteration for each batch and stitch. Metrics that are no numbers go to the log and to the hooks, not to the file.

    What metrics and hooks write goes into a folder for each stitch, named after it: ``output_dir/<stitch>/``. Of one
    stitch alone it goes where mmengine's loop has it.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``TestLoop``.
        stitches: ``'all'``, ``'anchors'``, or ids and names, see :meth:`mmsnnet.stitching.StitchSpace.select`.
        out: path of the file of operating points; None writes none.
        prefix_reuse: whether stitches share what they have in common; the results are the same either way.
        stitches_per_pass: at most so many; by default as many as leave what metrics keep within 2 GiB of memory. A run
            that is killed loses one pass.
        resume: go on with what the file of operating points lacks. Without it too the file keeps what was measured of
            the model's speed.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        stitches: str | Sequence[int | str] = "all",
        out: str | None = None,
        prefix_reuse: bool = True,
        stitches_per_pass: int | None = None,
        resume: bool = False,
    ) -> None:
        super().__init__(runner, checked_loading(dataloader), evaluator, fp16=fp16)
        self.backbone = find_stitched_backbone(runner.model)
        self.stitches = self.backbone.space.select(stitches)
        self.out = out
        self.prefix_reuse = prefix_reuse
        self.stitches_per_pass = _checked(stitches_per_pass)
        self.resume = resume

    def run(self) -> dict[str, Any]:
        """Evaluates each stitch; returns every metric under ``<stitch>/<metric>``.

        Raises:
            RuntimeError: a stitch passes through stitching layers that were neither initialised nor loaded.
            SettingError: the evaluator compares predictions with labels, and the data set has none.
            CannotResumeError: the file is damaged, or of another checkpoint, config, data set or model.
        """
        with fail_together():
            check_labels(self, "test")
            check_loader(self.runner.model, self.dataloader, "test_dataloader", load=False)
        model = unwrapped_model(self.runner.model)
        costs = model_costs(model)
        described = {
            s.id: OperatingPoint(s.id, s.name, s.kind, costs[s.id].flops, costs[s.id].params)
            for s in self.backbone.space
        }
        points = start(self, model, described.values())
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.runner.model.eval()
        measured = {point.id for point in points if point.metrics}
        others: dict[int, dict[str, Any]] = {}
        for evaluated in _passes(self, [s for s in self.stitches if s.id not in measured], "test"):
            for stitch, found in evaluated.items():
                point = next((known for known in points if known.id == stitch.id), described[stitch.id])
                points = points.add(replace(point, metrics=found.numbers))
                others[stitch.id] = found.others
            points = replace(points, points=tuple(sorted(points, key=lambda point: point.id)))
            if self.out is not None and is_main_process():
                points.save(self.out)
        metrics = {point.id: {**point.metrics, **others.get(point.id, {})} for point in points}
        named = _named(self.stitches, metrics)
        self.runner.call_hook("after_test_epoch", metrics=named)
        self.runner.call_hook("after_test")
        return named


@LOOPS.register_module()
class StitchValLoop(ValLoop):
    """Validates a stitched model at a few stitches, in one pass over the data.

    Hooks see one validation epoch, whose metrics are named ``<stitch>/<metric>``, so that a checkpoint can be kept by
    ``save_best='L/mIoU'`` and TensorBoard shows a curve for each stitch.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``ValLoop``.
        stitches: as of :class:`StitchTestLoop`, or ``'spread'`` for the anchors and some stitches between them
            (:meth:`StitchedBackbone.spread`).
        prefix_reuse, stitches_per_pass: as of :class:`StitchTestLoop`.
    """

    _has_run = False

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        stitches: str | Sequence[int | str] = "spread",
        prefix_reuse: bool = True,
        stitches_per_pass: int | None = None,
    ) -> None:
        super().__init__(runner, checked_loading(dataloader), evaluator, fp16=fp16)
        self._chosen = stitches
        self.prefix_reuse = prefix_reuse
        self.stitches_per_pass = _checked(stitches_per_pass)
        if isinstance(runner.model, nn.Module):  # which a FlexibleRunner builds later
            _ = self.stitches

    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone of the runner's model."""
        return find_stitched_backbone(self.runner.model)

    @cached_property
    def stitches(self) -> tuple[Stitch, ...]:
        """What is evaluated.

        Raises:
            UnknownStitchError: the space lacks one that was chosen.
        """
        return self.backbone.spread() if self._chosen == "spread" else self.backbone.space.select(self._chosen)

    def run(self) -> dict[str, Any]:
        """Evaluates each stitch; returns every metric under ``<stitch>/<metric>``.

        Raises:
            SettingError: the evaluator compares predictions with labels, and the data set has none.
        """
        if not self._has_run:
            check_labels(self, "val")
            self._has_run = True
        metrics: dict[int, dict[str, Any]] = {}
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        for evaluated in _passes(self, self.stitches, "val"):
            metrics |= {stitch.id: {**found.numbers, **found.others} for stitch, found in evaluated.items()}
        named = _named(self.stitches, metrics)
        self.runner.call_hook("after_val_epoch", metrics=named)
        self.runner.call_hook("after_val")
        return named


class Metrics(NamedTuple):
    """The metrics of one stitch: ``numbers``, and those ``others`` that hooks can handle."""

    numbers: dict[str, float]
    others: dict[str, Any]


def _passes(
    loop: StitchTestLoop | StitchValLoop, stitches: Sequence[Stitch], stage: str
) -> Iterator[dict[Stitch, Metrics]]:
    """Evaluates stitches, pass by pass, with progress on the console; the active stitch is the same afterwards.

    What a pass has measured is printed after the caller has taken it: it is written first.
    """
    backbone, logger = loop.backbone, loop.runner.logger
    _check_initialized(backbone, stitches)
    waiting, per_pass = backbone.prefix_order(stitches), loop.stitches_per_pass
    if alone := [reason for metric in loop.evaluator.metrics if (reason := needs_own_pass(metric))]:
        logger.info(f"each stitch has a pass of its own: {'; '.join(alone)}")
        per_pass = 1
    # Where the console shows warnings alone (the tools' --quiet), a test has one line, a validation none.
    verbose = any(h.level <= logging.INFO for h in _console_handlers(logger))
    hidden = not is_main_process() or (stage == "val" and not verbose)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    active, number, done = backbone.stitch, 0, 0
    results: dict[str, dict[str, float]] = {}
    folder = "<stitch>" if len(loop.stitches) > 1 else ""
    try:
        with _quiet_console(logger), Progress(*columns, console=console, disable=hidden) as progress:
            task = progress.add_task("", total=len(waiting) * len(loop.dataloader))
            while waiting:
                start, number = time.monotonic(), number + 1
                group = StitchPass(
                    loop,
                    stage,
                    backbone,
                    waiting[:per_pass],
                    reuse=loop.prefix_reuse,
                    bounded=per_pass is None,
                    folders=bool(folder),
                )
                for batches, size in enumerate(group.run(), start=1):
                    completed = done * len(loop.dataloader) + batches * size
                    progress.update(task, description=f"pass {number}, {size} stitches", completed=completed)
                if number == 1 and (warning := group.absent_classes()):
                    logger.warning(warning)
                split = {stitch: split_values(group.evaluate(stitch)) for stitch in group.stitches}
                yield {stitch: Metrics(numbers, for_hooks(others)) for stitch, (numbers, others) in split.items()}
                for stitch, (numbers, others) in split.items():
                    figures = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
                    line = f"{stitch.id:>4}  {stitch.name:<14} {figures or 'no metrics'}"
                    if is_main_process() and verbose:
                        progress.console.print(line, highlight=False)
                    logger.info(f"stitch {line}")
                    for name, value in others.items():
                        logger.info(f"stitch {stitch.name}: {name}, which is no number: {shown(value)}")
                    results[stitch.name] = numbers
                if number == 1 and (names := dict.fromkeys(name for _, others in split.values() for name in others)):
                    logger.warning(f"no numbers, and therefore in the log file alone: {few(list(names))}")
                seconds = time.monotonic() - start
                logger.info(f"pass {number}: {len(split)} of {len(waiting)} stitches left, {seconds:.1f} s")
                waiting, done = waiting[len(split) :], done + len(split)
        if warning := empty_metrics({s.name: results[s.name] for s in loop.stitches if s.name in results}):
            logger.warning(warning)
        if results and not any(results.values()):
            places = [path for metric in loop.evaluator.metrics for path in output_paths(metric, folder).values()]
            logger.warning(f"no metrics were measured; results are in {', '.join(places) or 'the log file'}")
    finally:
        backbone.set_stitch(active)


def _checked(stitches_per_pass: int | None) -> int | None:
    if stitches_per_pass is not None and stitches_per_pass < 1:
        raise ValueError(
            f"stitches_per_pass is at least 1, or None for as many as memory allows; got {stitches_per_pass}"
        )
    return stitches_per_pass


def _named(stitches: Sequence[Stitch], metrics: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{stitch.name}/{name}": value for stitch in stitches for name, value in metrics[stitch.id].items()}


def _check_initialized(backbone: StitchedBackbone, stitches: Sequence[Stitch]) -> None:
    network = backbone.network

    def layers(stitch: Stitch) -> list[LayerKey]:
        if backbone.num_classes is None:
            parts = tap_parts(backbone.space, stitch, backbone.test_out_indices)
        else:
            parts = classifier_parts(stitch)
        return [part for part in parts if isinstance(part, LayerKey)]

    lacking = [stitch.name for stitch in stitches if any(not network.layer(key).initialized for key in layers(stitch))]
    if lacking:
        raise RuntimeError(
            f"{len(lacking)} of {len(stitches)} stitches, {lacking[0]} for one, pass through stitching layers that "
            "were neither initialised nor loaded: is the checkpoint one of a stitched model of these anchors?"
        )


@contextmanager
def _quiet_console(logger: MMLogger) -> Iterator[None]:
    """Keeps the log of each pass (its per-class tables, say) to the log file; the console has the progress instead."""
    handlers = _console_handlers(logger)
    levels = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(max(handler.level, logging.WARNING))
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)


def _console_handlers(logger: MMLogger) -> list[Any]:
    return [handler for handler in logger.handlers if not isinstance(handler, logging.FileHandler)]
