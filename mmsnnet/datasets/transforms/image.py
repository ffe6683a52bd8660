"""Checked loading of images, for any toolbox."""

from __future__ import annotations

from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile

from mmsnnet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, with errors that name the file and what was expected.

    For training pipelines: the toolboxes' inferencers look for ``LoadImageFromFile`` in a test pipeline by its name.

    Args:
        args, kwargs: as of ``LoadImageFromFile``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded, or is empty.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        path = results["img_path"]
        try:
            return super().transform(results)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no image {path}") from None
        except (AssertionError, OSError, cv2.error) as error:
            raise ValueError(
                f"{path} cannot be decoded by {self.imdecode_backend!r}: expected an image (JPEG, PNG, ...), found one "
                "that is damaged or cut short, or another kind of file"
            ) from error
