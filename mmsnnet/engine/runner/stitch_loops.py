"""Loops that evaluate a stitched model at several stitches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import ConfigDict
from mmengine.dist import is_main_process
from mmengine.evaluator import Evaluator
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, TestLoop, ValLoop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import StitchedViT, find_stitched_backbone, model_costs
from mmsnnet.registry import LOOPS
from mmsnnet.stitching import LayerKey, Stitch


def checked_loading(dataloader: DataLoader | dict) -> DataLoader | dict:
    """A data loader's config with ``mmsnnet.LoadImage``, whose errors name the file and what was expected, in place of
    ``LoadImageFromFile``. Configs have the latter in their test pipelines, because the toolboxes' inferencers look for
    it there by its name."""
    if not isinstance(dataloader, dict):
        return dataloader

    def checked(setting: Any) -> Any:
        if isinstance(setting, dict):
            inner = {key: checked(value) for key, value in setting.items()}
            is_stock = str(setting.get("type")).rpartition(".")[2] == "LoadImageFromFile"
            return ConfigDict(inner | ({"type": "mmsnnet.LoadImage"} if is_stock else {}))
        return type(setting)(map(checked, setting)) if isinstance(setting, list | tuple) else setting

    return checked(dataloader)


@LOOPS.register_module()
class StitchTestLoop(TestLoop):
    """Tests a stitched model at each of the chosen stitches and writes the file of operating points.

    One pass over the data for each stitch; the file is written anew, atomically, after each of them. Hooks see one test
    epoch, whose metrics are named ``<stitch>/<metric>``.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``TestLoop``.
        stitches: ``'all'``, ``'anchors'``, or ids and names, see :meth:`mmsnnet.stitching.StitchSpace.select`.
        out: path of the file of operating points; None writes none.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        stitches: str | Sequence[int | str] = "all",
        out: str | None = None,
    ) -> None:
        super().__init__(runner, checked_loading(dataloader), evaluator, fp16=fp16)
        self.backbone = find_stitched_backbone(runner.model)
        self.stitches = self.backbone.space.select(stitches)
        self.out = out

    def run(self) -> dict[str, float]:
        """Evaluates each stitch; returns every metric under ``<stitch>/<metric>``.

        Raises:
            RuntimeError: a stitch passes through stitching layers that were neither initialised nor loaded.
        """
        points = _operating_points(self.runner, self.backbone, self.dataloader)
        model = self.runner.model.module if is_model_wrapper(self.runner.model) else self.runner.model
        costs = model_costs(model)
        metrics: dict[str, float] = {}
        self.runner.call_hook("before_test")
        self.runner.call_hook("before_test_epoch")
        self.runner.model.eval()
        for stitch, found in _passes(self, self.test_loss):
            metrics |= {f"{stitch.name}/{name}": value for name, value in found.items()}
            cost = costs[stitch.id]
            point = OperatingPoint(stitch.id, stitch.name, stitch.kind, cost.flops, cost.params, found)
            points = points.add(point)
            if self.out is not None and is_main_process():
                points.save(self.out)
        self.runner.call_hook("after_test_epoch", metrics=metrics)
        self.runner.call_hook("after_test")
        return metrics


@LOOPS.register_module()
class StitchValLoop(ValLoop):
    """Validates a stitched model at a few stitches, the anchors by default, one pass over the data for each.

    Hooks see one validation epoch, whose metrics are named ``<stitch>/<metric>``, so that a checkpoint can be kept by
    ``save_best='L/mIoU'`` and TensorBoard shows a curve for each stitch.

    Args:
        runner, dataloader, evaluator, fp16: as of mmengine's ``ValLoop``.
        stitches: ``'all'``, ``'anchors'``, or ids and names, see :meth:`mmsnnet.stitching.StitchSpace.select`.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader | dict,
        evaluator: Evaluator | dict | list,
        fp16: bool = False,
        stitches: str | Sequence[int | str] = "anchors",
    ) -> None:
        super().__init__(runner, checked_loading(dataloader), evaluator, fp16=fp16)
        self.backbone = find_stitched_backbone(runner.model)
        self.stitches = self.backbone.space.select(stitches)

    def run(self) -> dict[str, float]:
        """Evaluates each stitch; returns every metric under ``<stitch>/<metric>``."""
        metrics: dict[str, float] = {}
        self.runner.call_hook("before_val")
        self.runner.call_hook("before_val_epoch")
        self.runner.model.eval()
        for stitch, found in _passes(self, self.val_loss):
            metrics |= {f"{stitch.name}/{name}": value for name, value in found.items()}
        self.runner.call_hook("after_val_epoch", metrics=metrics)
        self.runner.call_hook("after_val")
        return metrics


def _passes(
    loop: StitchTestLoop | StitchValLoop, losses: dict[str, HistoryBuffer]
) -> Iterator[tuple[Stitch, dict[str, float]]]:
    """Evaluates one stitch after the other, with progress on the console; the active stitch is the same afterwards.
    ``losses`` is where the loop's ``run_iter`` keeps what a model puts out beside predictions."""
    backbone, stitches, logger = loop.backbone, loop.stitches, loop.runner.logger
    _check_initialized(backbone, stitches)
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    active = backbone.stitch
    try:
        with _quiet_console(logger), Progress(*columns, console=console, disable=not is_main_process()) as progress:
            task = progress.add_task("", total=len(stitches) * len(loop.dataloader))
            for number, stitch in enumerate(stitches, start=1):
                start = time.monotonic()
                progress.update(task, description=f"stitch {number}/{len(stitches)} {stitch.name}")
                backbone.set_stitch(stitch)
                losses.clear()
                for index, batch in enumerate(loop.dataloader):
                    loop.run_iter(index, batch)
                    progress.advance(task)
                metrics = loop.evaluator.evaluate(len(loop.dataloader.dataset))
                metrics |= {name: values.mean() for name, values in losses.items()}
                figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
                line = f"stitch {number}/{len(stitches)}  {stitch.id:>4}  {stitch.name:<14} {figures}"
                if is_main_process():
                    progress.console.print(line, highlight=False)
                logger.info(f"{line}  ({time.monotonic() - start:.1f} s)")
                yield stitch, metrics
    finally:
        backbone.set_stitch(active)


def _operating_points(runner: Runner, backbone: StitchedViT, dataloader: DataLoader) -> OperatingPoints:
    """The head of a file of operating points, without points."""
    dataset = dataloader.dataset
    name = getattr(dataset, "metainfo", {}).get("name", type(dataset).__name__)
    return OperatingPoints(
        config=runner.cfg.filename and str(Path(runner.cfg.filename)),
        checkpoint=runner.cfg.get("load_from"),
        dataset=name,
        input_shape=backbone.img_size,
        device=str(next(backbone.parameters()).device),
        points=(),
    )


def _check_initialized(backbone: StitchedViT, stitches: Sequence[Stitch]) -> None:
    network = backbone.network

    def layers(stitch: Stitch) -> Iterator[LayerKey]:
        yield from stitch.layers
        if backbone.num_classes is None:
            for tap in backbone.space.taps(stitch, backbone.test_out_indices):
                yield from tap.layers

    lacking = [stitch.name for stitch in stitches if any(not network.layer(key).initialized for key in layers(stitch))]
    if lacking:
        raise RuntimeError(
            f"{len(lacking)} of {len(stitches)} stitches, {lacking[0]} for one, pass through stitching layers that "
            "were neither initialised nor loaded: is the checkpoint one of a stitched model of these anchors?"
        )


@contextmanager
def _quiet_console(logger: MMLogger) -> Iterator[None]:
    """Keeps the log of each pass (its per-class tables, say) to the log file; the console has the progress instead."""
    handlers: list[Any] = [h for h in logger.handlers if not isinstance(h, logging.FileHandler)]
    levels = [handler.level for handler in handlers]
    try:
        for handler in handlers:
            handler.setLevel(max(handler.level, logging.WARNING))
        yield
    finally:
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
