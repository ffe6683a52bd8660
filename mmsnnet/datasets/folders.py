"""Whether the data that a config names is there, before anything is built."""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsnnet.errors import MissingFileError

LABELS = ("data_prefix.seg_map_path", "data_prefix.depth_map_path")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# What names of images end in, whatever img_suffix says.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def check_folders(config: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> None:
    """Looks for the folders and annotation files of a config's data sets, those inside wrappers included. Paths with a
    scheme, such as ``s3://``, are left alone.

    Args:
        config: of any toolbox.
        loaders: whose data sets; those that the config does not have are passed over.

    Raises:
        MissingFileError: a folder or an annotation file is missing, or a folder holds no image of the suffix that the
            data set lists; named with the setting that it comes from.
    """
    for loader in loaders:
        if config.get(loader):
            for setting, dataset in _datasets(config[loader].get("dataset"), f"{loader}.dataset"):
                needed = _loads_labels(dataset) and not _only_writes(config, loader)
                _check(setting, dataset, () if needed else LABELS)


def _datasets(dataset: Mapping[str, Any] | None, setting: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The data sets that read files, with the settings that they are."""
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get("dataset")
    if inner is not None:
        yield from _datasets(inner, f"{setting}.dataset")
    for index, member in enumerate(dataset.get("datasets", ())):
        yield from _datasets(member, f"{setting}.datasets.{index}")
    if inner is None and "datasets" not in dataset:
        yield setting, dataset


def _check_suffix(setting: str, dataset: Mapping[str, Any], folder: str, labels_beside: bool) -> None:
    """Looks whether a folder has images of the suffix that mmseg's data sets list, and warns of images of another."""
    suffix = _image_suffix(dataset)
    if suffix is None:
        return
    names = [name for _, _, files in os.walk(folder, followlinks=True) for name in files if not name.startswith(".")]
    others = Counter(Path(name).suffix or "without suffix" for name in names if not name.endswith(suffix))
    kinds = ", ".join(f"{number} {kind}" for kind, number in others.most_common(3))
    if not names:
        raise MissingFileError(f"the folder {folder} holds no image, from {setting}.data_root and data_prefix.img_path")
    if sum(others.values()) == len(names):
        raise MissingFileError(
            f"no file in {folder} ends in {setting}.img_suffix={suffix!r}; it holds {kinds}: set img_suffix to what "
            "the images' names end in"
        )
    left_out = {kind: number for kind, number in others.items() if kind.lower() in IMAGE_SUFFIXES}
    if left_out and not labels_beside:
        kinds = ", ".join(f"{number} {kind}" for kind, number in left_out.items())
        from mmengine.logging import print_log

        print_log(
            f"{folder}: {kinds} of {len(names)} files are left out, because {setting}.img_suffix is {suffix!r}",
            logger="current",
            level=logging.WARNING,
        )


def _image_suffix(dataset: Mapping[str, Any]) -> str | None:
    """The suffix of images of one of mmseg's data sets: its own, or the default of its class. None for others."""
    kind = dataset.get("type")
    if isinstance(kind, str):
        from mmsnnet.registry import DATASETS  # not needed to write data sets, which is done without OpenMMLab

        with DATASETS.switch_scope_and_registry(None) as registry:  # the toolbox's, if the name has no scope
            kind = registry.get(kind)
    if not isinstance(kind, type):
        return None
    lists = next((base for base in kind.__mro__ if "load_data_list" in vars(base)), kind)
    if lists.__module__.partition(".")[0] != "mmseg":  # a class of a user's own may list other files
        return None
    if "img_suffix" in dataset:
        return dataset["img_suffix"]
    parameter = inspect.signature(kind).parameters.get("img_suffix")
    return parameter.default if parameter is not None and isinstance(parameter.default, str) else None


def _loads_labels(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set's pipeline loads labels, as far as the names of its transforms tell."""
    kinds = [step.get("type") for step in dataset.get("pipeline") or () if isinstance(step, Mapping)]
    names = [kind if isinstance(kind, str) else getattr(kind, "__name__", "") for kind in kinds]
    loaders = [name for name in names if "Load" in name]
    return not loaders or any("Image" not in name for name in loaders)


def _only_writes(config: Mapping[str, Any], loader: str) -> bool:
    """Whether the evaluator of a data loader writes predictions and needs no labels (``format_only``)."""
    evaluators = config.get(loader.replace("_dataloader", "_evaluator")) or []
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    return bool(evaluators) and all(isinstance(e, Mapping) and e.get("format_only", False) for e in evaluators)


def _check(setting: str, dataset: Mapping[str, Any], left_out: Sequence[str] = ()) -> None:
    root = dataset.get("data_root") or ""
    if "://" in root:
        return
    if root and not Path(root).is_dir():
        raise MissingFileError(
            f"there is no folder {root}, {setting}.data_root: --cfg-options data_root=... says where the data lies. "
            "docs/datasets.md says how to get it, or how to make a procedural set in its place"
        )
    folders = {f"data_prefix.{name}": prefix for name, prefix in dict(dataset.get("data_prefix") or {}).items()}
    if "split" in dataset:
        folders["split"] = dataset["split"]
    for name, prefix in folders.items():
        if name in left_out:
            continue
        folder = os.path.join(root, prefix or "")
        if not folder or "://" in folder:
            continue
        said = f"from {setting}.data_root and {name}; docs/datasets.md shows the layout"
        if not Path(folder).is_dir():
            raise MissingFileError(f"there is no folder {folder}, {said}")
        if not any(files for _, _, files in os.walk(folder, followlinks=True)):
            raise MissingFileError(f"the folder {folder} holds no file, {said}")
        if name == "data_prefix.img_path" and not dataset.get("ann_file"):
            labels = os.path.join(root, folders.get("data_prefix.seg_map_path") or "")
            beside = os.path.normpath(labels).startswith(os.path.normpath(folder))
            _check_suffix(setting, dataset, folder, labels_beside=beside)
    if file := dataset.get("ann_file"):
        path = os.path.join(root, file)
        if "://" not in path and not Path(path).exists():
            raise MissingFileError(
                f"there is no file {path}, from {setting}.data_root and ann_file; docs/datasets.md shows the layout"
            )
