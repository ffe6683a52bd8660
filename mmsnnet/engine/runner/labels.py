"""Whether a data set has the labels that its evaluator compares predictions with."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.runner import BaseLoop

from mmsnnet.engine.agreement import first_sample
from mmsnnet.errors import SettingError
from mmsnnet.evaluation import known_names

# So many label files are looked for: a set without labels has none of them.
FILES_TRIED = 5


@dataclass(frozen=True)
class Labels:
    """What a metric compares predictions with.

    ``path`` is the key of a sample's label file, ``packed`` that of the loaded label in a data sample, ``word`` what it
    is called, ``output`` the setting that a metric of predictions alone (``format_only``) needs.
    """

    path: str
    packed: str
    word: str
    output: str = "output_dir"


MAPS = Labels("seg_map_path", "gt_sem_seg", "label maps")
FILES = Labels("seg_map_path", "seg_map_path", "label maps")  # read by the metric itself
DEPTHS = Labels("depth_map_path", "gt_depth_map", "depth maps")
BOXES = Labels("instances", "gt_instances", "annotated boxes", output="outfile_prefix")
CLASSES = Labels("gt_label", "gt_label", "labels")
# The transforms that load them from files, or their base classes.
LOADERS = {MAPS: ("LoadAnnotations",), FILES: ("LoadAnnotations",), DEPTHS: ("LoadDepthAnnotation",)}
# By the class, or a base class, of a metric.
NEEDED = {
    "mmseg.evaluation.metrics.iou_metric.IoUMetric": MAPS,
    "mmseg.evaluation.metrics.citys_metric.CityscapesMetric": FILES,
    "mmseg.evaluation.metrics.depth_metric.DepthMetric": DEPTHS,
    "mmdet.evaluation.metrics.coco_metric.CocoMetric": BOXES,
    "mmsnnet.evaluation.metrics.accuracy.Accuracy": CLASSES,
}


def check_labels(loop: BaseLoop, stage: str) -> None:
    """Refuses to evaluate a data set without labels, by what it lists; no sample is loaded.

    Args:
        loop: with a data loader and an evaluator.
        stage: ``'val'`` or ``'test'``, by which settings are named.

    Raises:
        SettingError: the data set has no labels, a metric that only writes predictions has no place to write to, or two
            metrics have the same names.
    """
    names = Counter(name for metric in loop.evaluator.metrics for name in known_names(metric) or ())
    if twice := [name for name, number in names.items() if number > 1]:
        raise SettingError(f"{stage}_evaluator: two metrics give {twice[0]}: set prefix of one of them")
    for metric, labels in _comparing(loop, stage):
        dataset = loop.dataloader.dataset
        if not hasattr(dataset, "get_data_info"):
            continue
        infos = (dataset.get_data_info(index) for index in range(len(dataset)))
        if labels is CLASSES:
            continue  # each data set has its own place for them: the first batch shows
        if labels is BOXES:
            # mmdet takes the ground truth from the samples where the metric has no file of its own.
            own = getattr(metric, "_coco_api", None)
            found = bool(own.dataset.get("annotations")) if own is not None else any(i.get("instances") for i in infos)
            reason = None if found else f"{getattr(dataset, 'ann_file', '') or 'the data set'} has none"
        else:
            reason = _lacking(infos, labels)
        if reason:
            raise _refusal(metric, labels, stage, reason)
    for metric in loop.evaluator.metrics:
        if getattr(metric, "format_only", False) and (labels := _needed(metric)) in LOADERS:
            _check_unlabelled(loop, stage, labels)


def _check_unlabelled(loop: BaseLoop, stage: str, labels: Labels) -> None:
    """Refuse a pipeline that loads label maps for predictions of a set that has none."""
    dataset = loop.dataloader.dataset
    transforms = getattr(getattr(dataset, "pipeline", None), "transforms", ())
    loader = next((t for t in transforms if any(c.__name__ in LOADERS[labels] for c in type(t).__mro__)), None)
    if loader is None or not hasattr(dataset, "get_data_info"):
        return
    reason = _lacking((dataset.get_data_info(index) for index in range(len(dataset))), labels)
    is_listed = len(dataset) and labels.path in dataset.get_data_info(0)
    if reason and (is_listed or type(loader).__module__.partition(".")[0] != "mmsnnet"):  # ours let it pass
        raise SettingError(
            f"{stage}_dataloader.dataset.pipeline loads {labels.word} ({type(loader).__name__}), and {reason}: leave "
            "that transform out"
        )


def check_first_batch(loop: BaseLoop, stage: str, batch: Any) -> None:
    """Refuses a batch that was loaded without the labels that the evaluator compares predictions with.

    Raises:
        SettingError: names the evaluator and the pipeline.
    """
    samples = batch.get("data_samples") if isinstance(batch, Mapping) else None
    if not isinstance(samples, list | tuple) or not samples:
        return
    sample = samples[0][0] if isinstance(samples[0], list | tuple) and samples[0] else samples[0]  # of augmentations
    if not hasattr(sample, "keys"):
        return
    for metric, labels in _comparing(loop, stage):
        if labels is not BOXES and labels.packed not in sample:
            raise _refusal(
                metric,
                labels,
                stage,
                f"the pipeline of {stage}_dataloader packs no {labels.packed} (no transform loads {labels.word}, or "
                "the data set lists none)",
            )


def check_sample(loop: BaseLoop, stage: str) -> None:
    """Loads the first sample of a data set as :func:`check_first_batch` wants to have it, and does that.

    Random states are left as they were.

    Raises:
        SettingError: as :func:`check_first_batch`.
    """
    dataset = loop.dataloader.dataset
    if not any(_comparing(loop, stage)) or not len(dataset):
        return
    sample = first_sample(dataset)
    if isinstance(sample, Mapping):
        check_first_batch(loop, stage, dict(data_samples=[sample.get("data_samples")]))


def keeps_nothing(metric: BaseMetric) -> bool:
    """Whether a metric of mmseg's writes predictions and keeps nothing of them (``format_only``)."""
    return getattr(metric, "format_only", False) and _needed(metric) in (MAPS, DEPTHS) and known_names(metric) == ()


def _comparing(loop: BaseLoop, stage: str) -> Iterator[tuple[BaseMetric, Labels]]:
    """The metrics that need labels, with what they need."""
    for metric in loop.evaluator.metrics:
        labels = _needed(metric)
        if labels is None:
            continue
        if not getattr(metric, "format_only", False):
            yield metric, labels
        elif not getattr(metric, labels.output, None):
            raise SettingError(
                f"{stage}_evaluator: {type(metric).__name__} has format_only=True, to write predictions and measure "
                f"nothing, and no place to write to: set {stage}_evaluator.{labels.output}"
            )


def _needed(metric: BaseMetric) -> Labels | None:
    for path, labels in NEEDED.items():
        module, _, name = path.rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)  # of a toolbox that is not imported there is no metric
        if cls is not None and isinstance(metric, cls):
            return labels
    return None


def _lacking(infos: Iterator[Mapping[str, Any]], labels: Labels) -> str | None:
    """Why samples have no label files, by what they list, the folders, and the first few files; None if they have."""
    first = list(islice(infos, FILES_TRIED))
    paths = [info.get(labels.path) for info in first]
    if not all(paths) or not all(info.get(labels.path) for info in infos):
        return f"the data set lists no {labels.path}"
    local = [path for path in paths if "://" not in path]
    for folder in {os.path.dirname(path): None for path in local}:
        if not os.path.isdir(folder):
            return f"there is no folder {folder}"
    if local and not any(map(os.path.exists, local)):
        return f"there are no files such as {local[0]}"
    return None


def _refusal(metric: BaseMetric, labels: Labels, stage: str, fault: str) -> SettingError:
    if labels is BOXES:
        cure = f"set {stage}_dataloader.dataset.ann_file to a file that has some"
    else:
        cure = f"name them in {stage}_dataloader.dataset and load them in its pipeline"
    if hasattr(metric, "format_only"):
        cure += (
            f", or set {stage}_evaluator.format_only=True and {stage}_evaluator.{labels.output}, to write predictions "
            "and measure nothing"
        )
    return SettingError(
        f"{stage}_evaluator: {type(metric).__name__} compares predictions with {labels.word}, and {fault}: {cure}"
    )
