"""Images in class folders, as ImageNet has them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mmsnnet.errors import DataError, MissingFileError
from mmsnnet.files.reading import join_names
from mmsnnet.registry import DATASETS

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


@DATASETS.register_module()
class ImageNet(BaseDataset):
    """Images in ImageNet's layout, ``<data_root>/<split>/<class>/<image>``: any set of class folders.

    The classes are the class folders, sorted by name. If there is a split ``train``, the others must have the same
    classes. A sample has ``img_path``, ``gt_label`` and ``num_classes``.

    Args:
        data_root: the folder of the splits.
        split: ``train``, ``val`` or any other folder of class folders.
        pipeline: transforms.
        metainfo: such as ``name``, the data set's name in a file of operating points.
        indices: the number of images to take from the start, or the indices of images; all by default.
        lazy_init: list the folders when the first image is requested.

    Raises:
        MissingFileError: a folder is missing.
        DataError: a class folder has no images or another file, or the classes differ from those of ``train``.
    """

    def __init__(
        self,
        data_root: str,
        split: str,
        pipeline: Sequence[dict | Callable] = (),
        metainfo: dict[str, Any] | None = None,
        indices: int | Sequence[int] | None = None,
        lazy_init: bool = False,
    ) -> None:
        self.split = split
        # No refetch: an image that cannot be read is an error, and no other image takes its place.
        super().__init__(
            data_root=data_root,
            data_prefix=dict(img_path=split),
            pipeline=list(pipeline),
            metainfo=metainfo,
            indices=indices,
            lazy_init=lazy_init,
            max_refetch=0,
        )

    def load_data_list(self) -> list[dict[str, Any]]:
        folder = Path(self.data_prefix["img_path"])
        classes = _classes(folder)
        train = Path(self.data_root) / "train"
        if train.is_dir() and (expected := _classes(train)) != classes:
            missing, unknown = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
            raise DataError(
                f"{folder} must have the class folders of {train}: "
                f"{len(missing)} are missing ({join_names(missing, 3) or 'none'}), "
                f"{len(unknown)} are not among them ({join_names(unknown, 3) or 'none'})"
            )
        self._metainfo["classes"] = classes
        return [
            dict(img_path=path, gt_label=label, num_classes=len(classes))
            for label, name in enumerate(classes)
            for path in _images(folder / name)
        ]


def _classes(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a split's folder, sorted."""
    if not folder.is_dir():
        raise MissingFileError(
            f"no folder {folder}; data_root must be the folder of train/<class>/<image> and val/<class>/<image>"
        )
    names = sorted(os.listdir(folder))
    for name in names:
        if name.startswith(".") or not (folder / name).is_dir():
            raise DataError(f"{folder / name}: expected only class folders in {folder}")
    if not names:
        raise DataError(f"{folder}: expected a folder for each class, found nothing")
    return tuple(names)


def _images(folder: Path) -> list[str]:
    """Paths of the images in a class folder, sorted."""
    names = sorted(os.listdir(folder))
    for name in names:
        if name.startswith(".") or not name.lower().endswith(SUFFIXES):
            raise DataError(f"{folder / name}: expected only images ({', '.join(SUFFIXES)}) in a class folder")
    if not names:
        raise DataError(f"{folder}: the class has no images")
    return [os.path.join(folder, name) for name in names]
