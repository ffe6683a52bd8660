"""Passes over the data, each for many stitches at once."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import BaseLoop, Runner
from mmengine.runner.loops import _parse_losses
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.agreement import sizes_explained
from mmsnnet.engine.runner.labels import check_first_batch, keeps_nothing
from mmsnnet.engine.runner.metric_warnings import absent_classes
from mmsnnet.engine.runner.stitch_files import StitchPictures, make_folders, output_paths
from mmsnnet.engine.sharding import refuse_uneven_batches
from mmsnnet.models import StitchedBackbone
from mmsnnet.stitching import Stitch

# What the metrics of one pass may keep in host memory, in bytes, unless the number of stitches is given.
HOST_MEMORY = 2 * 2**30


@dataclass
class StitchResults:
    """What evaluating one stitch has gathered so far: the attributes of each metric, and losses by name.

    ``paths`` are those attributes of each metric that say where its results go.
    """

    states: list[dict[str, Any]]
    paths: list[dict[str, str]]
    losses: dict[str, HistoryBuffer] = field(default_factory=dict)


class StitchPass:
    """One pass over the data for several stitches: each batch is loaded and preprocessed once, and walked through the
    stitches, which share their prefixes.

    One evaluator serves all stitches: its metrics are lent the attributes of the stitch that runs, which start as
    copies of their own.

    Args:
        loop: mmengine's, with a data loader, an evaluator, and ``run_iter``, which runs the model on a batch.
        stage: ``'test'`` or ``'val'``, by which the loop names what a model puts out beside predictions.
        backbone: of the model.
        stitches: in the order in which they are to run.
        reuse: share prefixes.
        bounded: leave stitches out, from the end, where metrics would keep more than ``HOST_MEMORY``.
        folders: what metrics and hooks write goes into a folder for each stitch.
    """

    def __init__(
        self,
        loop: BaseLoop,
        stage: str,
        backbone: StitchedBackbone,
        stitches: Sequence[Stitch],
        reuse: bool = True,
        bounded: bool = True,
        folders: bool = False,
    ) -> None:
        self.loop = loop
        self.stage = stage
        self.backbone = backbone
        self.stitches = tuple(stitches)
        self.reuse = reuse
        self.bounded = bounded
        self.folders = folders
        metrics = self._evaluator.metrics
        self.initial_bytes = kept_bytes([vars(metric) for metric in metrics])
        self.gathered = {
            stitch: StitchResults(
                [copied_state(metric) or vars(metric) for metric in metrics],
                [output_paths(metric, stitch.name) if folders else {} for metric in metrics],
            )
            for stitch in stitches
        }
        self.pictures = StitchPictures(loop.runner, [stitch.name for stitch in stitches]) if folders else None

    def run(self) -> Iterator[int]:
        """Runs the pass; gives after each batch how many stitches it still has."""
        runner: Runner = self.loop.runner
        dataloader: DataLoader = self.loop.dataloader
        batches = torch.tensor(len(dataloader))
        all_reduce(batches, op="min")  # ranks may have one more or less, and have to agree on what to drop together
        refuse_uneven_batches(runner.model, dataloader, self.stage)
        if self.folders:
            for stitch, metric in product(self.stitches, self._evaluator.metrics):
                make_folders(metric, stitch.name)
        for index, batch in enumerate(dataloader):
            if index == 0:
                check_first_batch(self.loop, self.stage, batch)
            shared = self.backbone.reuse_prefixes(self.stitches) if self.reuse else nullcontext()
            explained = sizes_explained(runner.model, batch, False, f"{self.stage}_dataloader")
            with shared, explained, _preprocessed_once(runner.model) as again:
                for stitch in self.stitches:
                    self.backbone.set_stitch(stitch)
                    again()
                    drawn = nullcontext() if self.pictures is None else self.pictures.of(stitch.name)
                    with self._lent(stitch), drawn:
                        self.loop.run_iter(index, batch)
            # What is kept grows evenly enough to foresee: looked at after 1, 2, 4, ... batches.
            if self.bounded and index + 1 < batches and (index + 1) & index == 0:
                self._drop_what_does_not_fit((index + 1) / len(dataloader))
            yield len(self.stitches)

    def absent_classes(self) -> str | None:
        """A warning of classes that occur in no label map, None if all do; before any stitch is evaluated."""
        with self._lent(self.stitches[0]):
            warnings = [absent_classes(metric, self.stage) for metric in self._evaluator.metrics]
        return next(filter(None, warnings), None)

    def evaluate(self, stitch: Stitch) -> dict[str, Any]:
        """The metrics of one stitch, and the means of its losses; frees what they were computed from."""
        with self._lent(stitch) as gathered:
            for metric in self._evaluator.metrics:
                if keeps_nothing(metric) and not metric.results:
                    metric.results.append(None)  # mmengine warns of a metric without results
            metrics = self._evaluator.evaluate(len(self.loop.dataloader.dataset))
        del self.gathered[stitch]
        return metrics | (_parse_losses(gathered.losses, self.stage) if gathered.losses else {})

    @property
    def _evaluator(self) -> Evaluator:
        return self.loop.evaluator

    @contextmanager
    def _lent(self, stitch: Stitch) -> Iterator[StitchResults]:
        """Gives the metrics and the loop what they have gathered for a stitch, and takes it back."""
        gathered, metrics, losses = self.gathered[stitch], self._evaluator.metrics, f"{self.stage}_loss"
        own = [vars(metric) for metric in metrics]
        given = []
        for metric, state, paths in zip(metrics, gathered.states, gathered.paths, strict=True):
            metric.__dict__ = state
            given.append({name: state[name] for name in paths})
            state.update(paths)
        setattr(self.loop, losses, gathered.losses)
        try:
            yield gathered
        finally:
            for metric, state, paths in zip(metrics, own, given, strict=True):
                fold(metric)
                vars(metric).update(paths)  # a metric whose state cannot be copied is lent its own
                metric.__dict__ = state
            gathered.losses = getattr(self.loop, losses)
            setattr(self.loop, losses, {})

    def _drop_what_does_not_fit(self, share: float) -> None:
        """Leaves to a later pass those stitches, from the end, for which there would be no memory, judging by the
        ``share`` of the data that has been seen. All ranks leave the same."""
        kept = max(kept_bytes(gathered.states) for gathered in self.gathered.values())
        largest = torch.tensor(self.initial_bytes + (kept - self.initial_bytes) / share)
        all_reduce(largest, op="max")
        fitting = max(1, int(HOST_MEMORY / max(float(largest), 1.0)))
        for stitch in self.stitches[fitting:]:
            del self.gathered[stitch]
        self.stitches = self.stitches[:fitting]


def copied_state(metric: BaseMetric) -> dict[str, Any] | None:
    """A copy of a metric's attributes for one stitch, None where something among them cannot be copied. What is only
    read, and may be large, is shared: the data set's description, and the annotations (``_coco_api`` and the like)."""
    shared = (value for name, value in vars(metric).items() if name == "_dataset_meta" or name.endswith("_api"))
    try:
        return copy.deepcopy(vars(metric), {id(metric): metric} | {id(value): value for value in shared})
    except Exception:  # whatever the classes of what it keeps may raise
        return None


def needs_own_pass(metric: BaseMetric) -> str | None:
    """Why a metric cannot serve several stitches in one pass, None if it can."""
    return f"{type(metric).__name__} keeps what cannot be copied" if copied_state(metric) is None else None


def fold(metric: BaseMetric) -> None:
    """Adds up what a metric keeps for each image where it would only do so itself in the end, in the same order.

    mmseg's ``IoUMetric`` keeps four areas per class and image. Over several ranks it is left to gather them: it drops
    those of images that were evaluated twice, to give each rank as many.
    """
    stock = sys.modules.get("mmseg.evaluation.metrics.iou_metric")
    if stock is None or type(metric) is not stock.IoUMetric or get_world_size() > 1 or len(metric.results) < 2:
        return
    metric.results = [tuple(sum(areas) for areas in zip(*metric.results, strict=True))]


def kept_bytes(value: Any) -> int:
    """The memory of what a metric keeps, in bytes, tensors with their storage."""
    if isinstance(value, torch.Tensor):
        return sys.getsizeof(value) + value.untyped_storage().nbytes()
    if isinstance(value, np.ndarray):
        return sys.getsizeof(value) + (0 if value.base is None else value.nbytes)
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(kept_bytes(key) + kept_bytes(item) for key, item in value.items())
    if isinstance(value, list | tuple | set):
        return size + sum(map(kept_bytes, value))
    return size


@contextmanager
def _preprocessed_once(model: nn.Module) -> Iterator[Any]:
    """Has the n-th preprocessing of a batch for one stitch serve the n-th for the others; gives what says that another
    stitch begins."""
    memo: list[Any] = []
    number = 0

    def begin() -> None:
        nonlocal number
        number = 0

    with ExitStack() as stack:
        for preprocessor in (m for m in model.modules() if isinstance(m, BaseDataPreprocessor)):

            def forward(*args: Any, own: Any = preprocessor.forward, **kwargs: Any) -> Any:
                nonlocal number
                number += 1
                if number > len(memo):
                    memo.append(own(*args, **kwargs))
                return memo[number - 1]

            preprocessor.forward = forward
            stack.callback(delattr, preprocessor, "forward")
        yield begin
