"""Whether the data that a config names is there, before anything is built."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

LABELS = ("data_prefix.seg_map_path", "data_prefix.depth_map_path")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")


def check_folders(config: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> None:
    """Looks for the folders and annotation files of a config's data sets, those inside wrappers included. Paths with a
    scheme, such as ``s3://``, are left alone.

    Args:
        config: of any toolbox.
        loaders: whose data sets; those that the config does not have are passed over.

    Raises:
        FileNotFoundError: a folder or an annotation file is missing, or a folder holds no image; named with the setting
            that it comes from.
    """
    for loader in loaders:
        if config.get(loader):
            for setting, dataset in _datasets(config[loader].get("dataset"), f"{loader}.dataset"):
                _check(setting, dataset, LABELS if _only_writes(config, loader) else ())


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
        raise FileNotFoundError(
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
            raise FileNotFoundError(f"there is no folder {folder}, {said}")
        if not any(path.is_file() for path in Path(folder).rglob("*")):
            raise FileNotFoundError(f"the folder {folder} holds no file, {said}")
    if file := dataset.get("ann_file"):
        path = os.path.join(root, file)
        if "://" not in path and not Path(path).exists():
            raise FileNotFoundError(
                f"there is no file {path}, from {setting}.data_root and ann_file; docs/datasets.md shows the layout"
            )
