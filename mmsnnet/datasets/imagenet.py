from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset

from mmsnnet.errors import DataError, MissingFileError
from mmsnnet.registry import DATASETS

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")


@DATASETS.register_module()
class ImageNet(BaseDataset):
    """Images in ImageNet's layout, ``<data_root>/<split>/<class>/<image>``: any set of class folders.

    The class folders, sorted by name, are the classes. A split has those of ``train``, where there is a ``train``.
    A sample is ``img_path``, ``gt_label`` and ``num_classes``.

    Args:
        data_root: the folder of the splits.
        split: ``train``, ``val`` or any other folder of class folders.
        pipeline: of transforms.
        metainfo: such as ``name``, the data set's name in a file of operating points.
        indices: the first so many images, or those with these indices; all by default.
        lazy_init: look into the folders when the data set is first asked for an image.

    Raises:
        MissingFileError: a folder is missing.
        DataError: a class folder has no images, a file is none of an image's, or the classes differ from the training
            set's.
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
        # No refetch: an image that cannot be had is an error, not another image.
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
        trained_on = Path(self.data_root) / "train"
        if trained_on.is_dir() and (expected := _classes(trained_on)) != classes:
            lacking, more = sorted(set(expected) - set(classes)), sorted(set(classes) - set(expected))
            raise DataError(
                f"{folder} is to have the class folders of {trained_on}: {len(lacking)} are missing ({_few(lacking)}), "
                f"{len(more)} are not among them ({_few(more)})"
            )
        self._metainfo["classes"] = classes
        return [
            dict(img_path=path, gt_label=label, num_classes=len(classes))
            for label, name in enumerate(classes)
            for path in _images(folder / name)
        ]


def _classes(folder: Path) -> tuple[str, ...]:
    """The names of the class folders in a split's folder, sorted."""
    if not folder.is_dir():
        raise MissingFileError(
            f"there is no folder {folder}; data_root is the folder of train/<class>/<image> and val/<class>/<image>"
        )
    names = sorted(os.listdir(folder))
    for name in names:
        if name.startswith(".") or not (folder / name).is_dir():
            raise DataError(f"{folder / name}: expected nothing but a folder for each class in {folder}")
    if not names:
        raise DataError(f"{folder}: expected a folder for each class, found nothing")
    return tuple(names)


def _images(folder: Path) -> list[str]:
    """The paths of the images in a class folder, sorted."""
    names = sorted(os.listdir(folder))
    for name in names:
        if name.startswith(".") or not name.lower().endswith(SUFFIXES):
            raise DataError(f"{folder / name}: expected nothing but images ({', '.join(SUFFIXES)}) in a class folder")
    if not names:
        raise DataError(f"{folder}: the class has no images")
    return [os.path.join(folder, name) for name in names]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") or "none"
