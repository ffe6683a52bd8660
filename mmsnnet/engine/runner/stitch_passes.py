"""One pass over the data that evaluates several stitches."""

from __future__ import annotations

import copy
import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import InitVar, dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseDataPreprocessor
from torch import nn
from torch.utils.data import DataLoader

from mmsnnet.engine.agreement import sizes_explained
from mmsnnet.engine.attributes import replaced_attributes
from mmsnnet.engine.mmengine_private import parse_losses
from mmsnnet.engine.ranks import compare_loaders
from mmsnnet.engine.runner.labels import check_first_batch, keeps_nothing
from mmsnnet.engine.runner.metric_warnings import absent_classes_warning
from mmsnnet.engine.runner.stitch_files import StitchPictures, make_folders, output_paths
from mmsnnet.engine.sharding import is_sharded
from mmsnnet.files.writing import DISK_ERRORS, output_errors
from mmsnnet.models import StitchedBackbone
from mmsnnet.models.recalibration import NormStatistics, norm_statistics
from mmsnnet.stitching import Stitch

# The most host memory, in bytes, that the metrics of one pass may hold, unless the number of stitches is given.
HOST_MEMORY = 2 * 2**30


@dataclass
class StitchResults:
    """What evaluating one stitch has gathered so far.

    ``evaluator`` holds the metrics of this stitch, ``outputs`` the attributes by which they write into its folder, as
    (metric, attribute, path), and ``losses`` what the model returned beside its predictions.
    """

    evaluator: Evaluator
    outputs: Sequence[tuple[BaseMetric, str, str]] = ()
    losses: dict[str, HistoryBuffer] = field(default_factory=dict)


@dataclass(eq=False)
class StitchPass:
    """One pass over the data for several stitches.

    Each batch is loaded and preprocessed once. The stitches then run on it one after the other; with ``prefix_reuse``
    they compute the blocks that they start with once. Each stitch has an evaluator of its own.

    Args:
        dataloader: of the data.
        evaluator: as configured; each stitch gets a copy.
        model: with or without wrappers.
        backbone: of the model.
        stitches: in the order in which they run.
        run_batch: run the model on a batch, given as (results of the stitch, index, batch), and add to the results.
        stage: ``'test'`` or ``'val'``, by which settings and losses are named.
        prefix_reuse: whether stitches share prefixes.
        bounded: leave the last stitches to a later pass if metrics would hold more than ``HOST_MEMORY``.
        pictures: give each stitch a folder for what metrics and hooks write; None for no such folders.
        statistics: of batch norms, for each stitch that has its own. Those of a norm depend on the route up to it
            alone, so stitches may still share prefixes.

    Attributes:
        results: the results of each stitch that this pass still runs.
    """

    dataloader: DataLoader
    evaluator: Evaluator
    model: nn.Module
    backbone: StitchedBackbone
    stitches: InitVar[Sequence[Stitch]]
    run_batch: Callable[[StitchResults, int, Any], None]
    stage: str
    prefix_reuse: bool = True
    bounded: bool = True
    pictures: StitchPictures | None = None
    statistics: Mapping[Stitch, NormStatistics] = field(default_factory=dict)
    results: dict[Stitch, StitchResults] = field(init=False)
    _most: float = field(init=False, default=1.0)  # bytes that a stitch needs

    def __post_init__(self, stitches: Sequence[Stitch]) -> None:
        self.results = {stitch: StitchResults(copied_evaluator(self.evaluator)) for stitch in stitches}
        if self.pictures is not None:
            for stitch, results in self.results.items():
                results.outputs = [
                    (metric, name, path)
                    for metric in results.evaluator.metrics
                    for name, path in output_paths(metric, stitch.name).items()
                ]

    def run(self) -> Iterator[int]:
        """Run the pass; yield after each batch how many stitches are left in it."""
        # Ranks may have one batch more or less, and leave out stitches after the same batch.
        batches = compare_loaders(self.dataloader, f"{self.stage}_dataloader", same_batches=is_sharded(self.model))
        if self.pictures is not None:
            for stitch, results in self.results.items():
                for metric in results.evaluator.metrics:
                    make_folders(metric, stitch.name)
        for index, batch in enumerate(self.dataloader):
            if index == 0:
                check_first_batch(self.evaluator.metrics, self.stage, batch)
            # Memory grows about linearly, so batches 1, 2, 4, ... predict the total.
            self._run_stitches(index, batch, self.bounded and index < batches and (index + 1) & index == 0)
            yield len(self.results)

    def _run_stitches(self, index: int, batch: Any, predicts: bool) -> None:
        shared = self.backbone.reuse_prefixes(tuple(self.results)) if self.prefix_reuse else nullcontext()
        explained = sizes_explained(self.model, batch, False, f"{self.stage}_dataloader")
        with shared, explained, _preprocessed_once(self.model) as start_stitch:
            for stitch in tuple(self.results):
                if (results := self.results.get(stitch)) is None:
                    break  # left to a later pass, like all that follow
                self.backbone.set_stitch(stitch)
                start_stitch()
                pictures = nullcontext() if self.pictures is None else self.pictures.of(stitch.name)
                own = norm_statistics(self.statistics.get(stitch, {}))
                with replaced_attributes(results.outputs), pictures, own:
                    self.run_batch(results, index, batch)
                for metric in results.evaluator.metrics:
                    fold(metric)
                if predicts:
                    self._keep_what_fits(results.evaluator, (index + 1) / len(self.dataloader))
                self._return_freed_memory()

    def absent_classes_warning(self) -> str | None:
        """A warning of classes that occur in no label map, None if all do; before any stitch is evaluated."""
        results = next(iter(self.results.values()))
        warnings = [absent_classes_warning(metric, self.stage) for metric in results.evaluator.metrics]
        return next(filter(None, warnings), None)

    def evaluate(self, stitch: Stitch) -> dict[str, Any]:
        """The metrics of one stitch and the means of its losses; frees what they were computed from."""
        results = self.results.pop(stitch)
        with replaced_attributes(results.outputs), _named_outputs(results.evaluator):
            for metric in results.evaluator.metrics:
                if keeps_nothing(metric) and not metric.results:
                    metric.results.append(None)  # mmengine warns of a metric without results
            metrics = results.evaluator.evaluate(len(self.dataloader.dataset))  # type: ignore[arg-type]
        self._return_freed_memory()
        return metrics | (parse_losses(results.losses, self.stage) if results.losses else {})

    def _keep_what_fits(self, evaluator: Evaluator, share: float) -> None:
        """Leave the last stitches to a later pass, judging from one that has seen the ``share`` of the data.

        All ranks keep the same stitches: as many as fit if each needs the most that was found for any, on any rank.
        """
        initial, kept = (kept_bytes([vars(metric) for metric in one.metrics]) for one in (self.evaluator, evaluator))
        most = torch.tensor(max(self._most, initial + (kept - initial) / share))
        all_reduce(most, op="max")
        self._most = float(most)
        self.results = dict(list(self.results.items())[: max(1, int(HOST_MEMORY / self._most))])

    def _return_freed_memory(self) -> None:
        """Return freed memory to the system: between tensors that metrics keep, glibc holds as much again."""
        if self._most > HOST_MEMORY / 256 and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
            trim(0)


@contextmanager
def _named_outputs(evaluator: Evaluator) -> Iterator[None]:
    """Name the files of metrics where their disk is full."""
    paths = [path for metric in evaluator.metrics for path in output_paths(metric, "").values()]
    with output_errors(", ".join(paths) or None, "make room, or set another output of the metric", DISK_ERRORS):
        yield


def copied_evaluator(evaluator: Evaluator) -> Evaluator:
    """An evaluator for one stitch: a copy, whose metrics are copies as well, except for those that cannot be copied."""
    copied = copy.copy(evaluator)
    copied.metrics = [metric if (own := copied_metric(metric)) is None else own for metric in evaluator.metrics]
    return copied


def copied_metric(metric: BaseMetric) -> BaseMetric | None:
    """A deep copy of a metric, None if it cannot be copied.

    The copy shares what metrics only read, and what may be large: the description of the data set, and the annotations
    (attributes such as ``_coco_api``).
    """
    shared = [metric.dataset_meta, *(value for name, value in vars(metric).items() if name.endswith("_api"))]
    try:
        return copy.deepcopy(metric, {id(value): value for value in shared})
    except Exception:  # the attributes of a metric may be of any class, and raise anything
        return None


def fold(metric: BaseMetric) -> None:
    """Add up the areas that mmseg's ``IoUMetric`` keeps for each image, in the order in which it would do so itself.

    The metric keeps four areas for each class and image. With several ranks they are left as they are: the metric drops
    the areas of images that were evaluated twice, which the sampler adds to give each rank as many.
    """
    stock = sys.modules.get("mmseg.evaluation.metrics.iou_metric")
    if stock is None or type(metric) is not stock.IoUMetric or get_world_size() > 1 or len(metric.results) < 2:
        return
    metric.results = [tuple(sum(areas) for areas in zip(*metric.results, strict=True))]


def kept_bytes(value: Any) -> int:
    """The memory of nested containers, tensors and arrays, in bytes; a view counts with its whole storage."""
    if isinstance(value, torch.Tensor):
        return sys.getsizeof(value) + value.untyped_storage().nbytes()
    if isinstance(value, np.ndarray):
        return sys.getsizeof(value) + (0 if value.base is None else value.nbytes)
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    return sys.getsizeof(value) + (sum(map(kept_bytes, inner)) if isinstance(inner, list | tuple | set) else 0)


@contextmanager
def _preprocessed_once(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Preprocess a batch once for all stitches; yield a function to call before each stitch.

    Test-time augmentation preprocesses several times: the n-th result serves the n-th call of every stitch.
    """
    results: list[Any] = []
    calls = count()

    def start_stitch() -> None:
        nonlocal calls
        calls = count()

    def once(preprocess: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if (call := next(calls)) == len(results):
                results.append(preprocess(*args, **kwargs))
            return results[call]

        return forward

    preprocessors = [module for module in model.modules() if isinstance(module, BaseDataPreprocessor)]
    with replaced_attributes([(module, "forward", once(module.forward)) for module in preprocessors]):
        yield start_stitch
