"""Check that a data set has the labels that its evaluator compares predictions with."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from mmengine.evaluator import BaseMetric

from mmsnnet.datasets.dataset_parts import is_instance, transforms_of
from mmsnnet.engine.agreement import first_sample
from mmsnnet.engine.mmengine_private import coco_annotations
from mmsnnet.errors import SettingError
from mmsnnet.evaluation.metric_names import class_path, known_names

# The number of label files that are looked for: a set without labels has none of them.
FILES_TRIED = 5


@dataclass(frozen=True)
class Labels:
    """What a metric compares predictions with.

    ``path`` is the key of the label file among a sample's information, ``packed`` the key of the loaded label in a data
    sample, ``word`` the plural noun for messages, and ``output`` the setting that a metric needs in order to write
    predictions only (``format_only``).
    """

    path: str
    packed: str
    word: str
    output: str = "output_dir"


MAPS = Labels("seg_map_path", "gt_sem_seg", "label maps")
FILES = Labels("seg_map_path", "seg_map_path", "label maps")  # the metric reads them itself
DEPTHS = Labels("depth_map_path", "gt_depth_map", "depth maps")
BOXES = Labels("instances", "gt_instances", "annotated boxes", output="outfile_prefix")
CLASSES = Labels("gt_label", "gt_label", "labels")
# The transforms, or their base classes, that load labels from files.
LOADERS = {MAPS: "LoadAnnotations", FILES: "LoadAnnotations", DEPTHS: "LoadDepthAnnotation"}
# By the class, or a base class, of a metric.
LABELS_OF_METRICS = {
    "mmseg.evaluation.metrics.iou_metric.IoUMetric": MAPS,
    "mmseg.evaluation.metrics.citys_metric.CityscapesMetric": FILES,
    "mmseg.evaluation.metrics.depth_metric.DepthMetric": DEPTHS,
    "mmdet.evaluation.metrics.coco_metric.CocoMetric": BOXES,
    "mmsnnet.evaluation.metrics.accuracy.Accuracy": CLASSES,
}


def check_labels(dataset: Any, metrics: Sequence[BaseMetric], stage: str) -> None:
    """Check that a data set lists the labels that metrics need; no sample is loaded.

    Args:
        dataset: of the loop.
        metrics: of the loop's evaluator.
        stage: ``'val'`` or ``'test'``, by which settings are named.

    Raises:
        SettingError: the data set has no labels, a metric that only writes predictions has no path to write to, or two
            metrics give values of one name.
    """
    names = Counter(name for metric in metrics for name in known_names(metric) or ())
    if twice := [name for name, number in names.items() if number > 1]:
        raise SettingError(f"{stage}_evaluator: two metrics give {twice[0]}: set prefix of one of them")
    for metric, labels in _comparing_metrics(metrics, stage):
        # Labels of classes have no common place in data sets: check_first_batch looks for them.
        if hasattr(dataset, "get_data_info") and labels is not CLASSES:
            reason = _why_no_boxes(dataset, metric) if labels is BOXES else _why_no_files(dataset, labels)
            if reason:
                raise _no_labels_error(metric, labels, stage, reason)
    for metric in metrics:
        if getattr(metric, "format_only", False) and (unused := _labels_of(metric)) is not None and unused in LOADERS:
            _check_unlabelled_pipeline(dataset, stage, unused)


def check_first_batch(metrics: Sequence[BaseMetric], stage: str, batch: Any) -> None:
    """Check that a batch was loaded with the labels that metrics need.

    Args:
        metrics, stage: as of :func:`check_labels`.
        batch: as the data loader gives it.

    Raises:
        SettingError: it has no labels; the message names the evaluator and the pipeline.
    """
    samples = batch.get("data_samples") if isinstance(batch, Mapping) else None
    if not isinstance(samples, list | tuple) or not samples:
        return
    # With test-time augmentation each image has a list of samples.
    sample = samples[0][0] if isinstance(samples[0], list | tuple) and samples[0] else samples[0]
    if not hasattr(sample, "keys"):
        return
    for metric, labels in _comparing_metrics(metrics, stage):
        if labels is not BOXES and labels.packed not in sample:
            reason = (
                f"the pipeline of {stage}_dataloader packs no {labels.packed} (no transform loads {labels.word}, or "
                "the data set lists none)"
            )
            raise _no_labels_error(metric, labels, stage, reason)


def check_sample(dataset: Any, metrics: Sequence[BaseMetric], stage: str) -> None:
    """Load the first sample of a data set and check it by :func:`check_first_batch`; random states stay as they are.

    Args:
        dataset, metrics, stage: as of :func:`check_labels`.

    Raises:
        SettingError: the sample has no labels.
    """
    if not any(_comparing_metrics(metrics, stage)) or not len(dataset):
        return
    sample = first_sample(dataset)
    if isinstance(sample, Mapping):
        check_first_batch(metrics, stage, dict(data_samples=[sample.get("data_samples")]))


def keeps_nothing(metric: BaseMetric) -> bool:
    """Whether a metric of mmseg's only writes predictions (``format_only``) and holds no results."""
    return getattr(metric, "format_only", False) and _labels_of(metric) in (MAPS, DEPTHS) and known_names(metric) == ()


def _comparing_metrics(metrics: Sequence[BaseMetric], stage: str) -> Iterator[tuple[BaseMetric, Labels]]:
    """The metrics that compare predictions with labels, each with the labels that it needs."""
    for metric in metrics:
        labels = _labels_of(metric)
        if labels is None:
            continue
        if not getattr(metric, "format_only", False):
            yield metric, labels
        elif not getattr(metric, labels.output, None):
            raise SettingError(
                f"{stage}_evaluator: {type(metric).__name__} has format_only=True, which only writes predictions, and "
                f"no place to write to: set {stage}_evaluator.{labels.output}"
            )


def _labels_of(metric: BaseMetric) -> Labels | None:
    known = (LABELS_OF_METRICS.get(class_path(cls)) for cls in type(metric).__mro__)
    return next((labels for labels in known if labels is not None), None)


def _check_unlabelled_pipeline(dataset: Any, stage: str, labels: Labels) -> None:
    """Check that a pipeline loads no labels if only predictions are written and there are no labels."""
    loader = next((step for step in transforms_of(dataset) if is_instance(step, LOADERS[labels])), None)
    if loader is None or not hasattr(dataset, "get_data_info"):
        return
    reason = _why_no_files(dataset, labels)
    is_listed = len(dataset) and labels.path in dataset.get_data_info(0)
    is_ours = type(loader).__module__.partition(".")[0] == "mmsnnet"  # ours pass samples without a path
    if reason and (is_listed or not is_ours):
        raise SettingError(
            f"{stage}_dataloader.dataset.pipeline loads {labels.word} ({type(loader).__name__}), and {reason}: leave "
            "that transform out"
        )


def _why_no_boxes(dataset: Any, metric: BaseMetric) -> str | None:
    """Why a data set has no annotated boxes; None if it has some."""
    # A metric without annotations of its own gets them from the samples.
    if (annotations := coco_annotations(metric)) is not None:
        has_boxes = bool(annotations.dataset.get("annotations"))
    else:
        has_boxes = any(dataset.get_data_info(index).get("instances") for index in range(len(dataset)))
    return None if has_boxes else f"{getattr(dataset, 'ann_file', '') or 'the data set'} has none"


def _why_no_files(dataset: Any, labels: Labels) -> str | None:
    """Why samples have no label files, judging by the paths, the folders and the first files; None if they have."""
    infos = (dataset.get_data_info(index) for index in range(len(dataset)))
    paths = [info.get(labels.path) for info in islice(infos, FILES_TRIED)]
    if not all(paths) or not all(info.get(labels.path) for info in infos):
        return f"the data set lists no {labels.path}"
    local = [path for path in paths if "://" not in path]
    for folder in dict.fromkeys(map(os.path.dirname, local)):
        if not os.path.isdir(folder):
            return f"there is no folder {folder}"
    if local and not any(map(os.path.exists, local)):
        return f"there are no files such as {local[0]}"
    return None


def _no_labels_error(metric: BaseMetric, labels: Labels, stage: str, reason: str) -> SettingError:
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
        f"{stage}_evaluator: {type(metric).__name__} compares predictions with {labels.word}, and {reason}: {cure}"
    )
