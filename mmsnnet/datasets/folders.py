"""Check that the data of a config exists, before anything is built."""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsnnet.errors import MissingFileError

LABELS = ("data_prefix.seg_map_path", "data_prefix.depth_map_path")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes of files that are images, even if ``img_suffix`` names another."""


def check_folders(config: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> None:
    """Check the folders and annotation files of a config's data sets, also inside wrappers.

    Paths with a scheme, such as ``s3://``, are not checked.

    Args:
        config: a config of any toolbox.
        loaders: keys of the data loaders to check; keys that the config lacks are skipped.

    Raises:
        MissingFileError: a folder or an annotation file is missing, or a folder has no image with the suffix of the
            data set. The message names the setting.
    """
    for loader in loaders:
        if config.get(loader):
            for setting, dataset in _datasets(config[loader].get("dataset"), f"{loader}.dataset"):
                needs_labels = _loads_labels(dataset) and not _only_writes(config, loader)
                _check(setting, dataset, skipped=() if needs_labels else LABELS)


def _datasets(dataset: Mapping[str, Any] | None, setting: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each data set that reads files, with the path of its setting."""
    if not isinstance(dataset, Mapping):
        return
    inner = dataset.get("dataset")
    if inner is not None:
        yield from _datasets(inner, f"{setting}.dataset")
    for index, member in enumerate(dataset.get("datasets", ())):
        yield from _datasets(member, f"{setting}.datasets.{index}")
    if inner is None and "datasets" not in dataset:
        yield setting, dataset


def _check_suffix(setting: str, dataset: Mapping[str, Any], folder: str, has_labels: bool) -> None:
    """Check that a folder has images with the data set's suffix; warn about images with another one.

    ``has_labels``: whether the folder also holds label maps, which are no images.
    """
    suffix = _image_suffix(dataset)
    if suffix is None:
        return
    names = [name for _, _, files in os.walk(folder, followlinks=True) for name in files if not name.startswith(".")]
    others = Counter(Path(name).suffix or "without suffix" for name in names if not name.endswith(suffix))
    if not names:
        raise MissingFileError(f"folder {folder} holds no image, from {setting}.data_root and data_prefix.img_path")
    if others.total() == len(names):
        raise MissingFileError(
            f"no file in {folder} ends in {setting}.img_suffix={suffix!r}; it has {_counts(others.most_common(3))}: "
            "set img_suffix to the suffix of the images"
        )
    images = [(other, count) for other, count in others.items() if other.lower() in IMAGE_SUFFIXES]
    if images and not has_labels:
        from mmengine.logging import print_log

        print_log(
            f"{folder}: {_counts(images)} of {len(names)} files are left out, because {setting}.img_suffix is "
            f"{suffix!r}",
            logger="current",
            level=logging.WARNING,
        )


def _counts(suffixes: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{count} {suffix}" for suffix, count in suffixes)


def _image_suffix(dataset: Mapping[str, Any]) -> str | None:
    """Image suffix of a data set of mmseg, or None for classes that list files by other rules."""
    if (cls := dataset_class(dataset)) is None:
        return None
    lister = next((base for base in cls.__mro__ if "load_data_list" in vars(base)), cls)
    if lister.__module__.partition(".")[0] != "mmseg":  # a user's class may list other files
        return None
    if "img_suffix" in dataset:
        return dataset["img_suffix"]
    parameter = inspect.signature(cls).parameters.get("img_suffix")
    return parameter.default if parameter is not None and isinstance(parameter.default, str) else None


def dataset_class(dataset: Mapping[str, Any]) -> type | None:
    """The class of a data set's setting; None if no registry knows it."""
    cls = dataset.get("type")
    if isinstance(cls, str):
        from mmsnnet.registry import DATASETS  # make_shapes.py imports this package without OpenMMLab

        with DATASETS.switch_scope_and_registry(dataset.get("_scope_")) as registry:  # else the config's default scope
            cls = registry.get(cls)
    return cls if isinstance(cls, type) else None


def _loads_labels(dataset: Mapping[str, Any]) -> bool:
    """Whether a data set's pipeline loads labels, judged by the names of its transforms."""
    types = [step.get("type") for step in dataset.get("pipeline") or () if isinstance(step, Mapping)]
    names = [one if isinstance(one, str) else getattr(one, "__name__", "") for one in types]
    loaders = [name for name in names if "Load" in name]
    return not loaders or any("Image" not in name for name in loaders)


def _only_writes(config: Mapping[str, Any], loader: str) -> bool:
    """Whether the evaluator of a data loader only writes predictions (``format_only``) and needs no labels."""
    evaluators = config.get(loader.replace("_dataloader", "_evaluator")) or []
    evaluators = [evaluators] if isinstance(evaluators, Mapping) else evaluators
    return bool(evaluators) and all(isinstance(e, Mapping) and e.get("format_only", False) for e in evaluators)


def _check(setting: str, dataset: Mapping[str, Any], skipped: Collection[str] = ()) -> None:
    root = dataset.get("data_root") or ""
    if "://" in root:
        return
    if root and not Path(root).is_dir():
        raise MissingFileError(
            f"no folder {root}, from {setting}.data_root: set --cfg-options data_root=... to the folder of the data. "
            "docs/datasets.md has the download, and how to make a procedural set in its place"
        )
    folders = {f"data_prefix.{name}": prefix for name, prefix in dict(dataset.get("data_prefix") or {}).items()}
    if "split" in dataset:
        folders["split"] = dataset["split"]
    for name, prefix in folders.items():
        folder = os.path.join(root, prefix or "")
        if name in skipped or not folder or "://" in folder:
            continue
        origin = f"from {setting}.data_root and {name}; docs/datasets.md shows the layout"
        if not Path(folder).is_dir():
            raise MissingFileError(f"no folder {folder}, {origin}")
        if not any(files for _, _, files in os.walk(folder, followlinks=True)):
            raise MissingFileError(f"folder {folder} holds no file, {origin}")
        if name == "data_prefix.img_path" and not dataset.get("ann_file"):
            labels = os.path.join(root, folders.get("data_prefix.seg_map_path") or "")
            has_labels = os.path.normpath(labels).startswith(os.path.normpath(folder))
            _check_suffix(setting, dataset, folder, has_labels)
    if file := dataset.get("ann_file"):
        path = os.path.join(root, file)
        if "://" not in path and not Path(path).exists():
            raise MissingFileError(
                f"no file {path}, from {setting}.data_root and ann_file; docs/datasets.md shows the layout"
            )
