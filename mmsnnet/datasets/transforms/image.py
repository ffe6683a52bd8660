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
        to_float32, color_type, imdecode_backend, backend_args: as of ``LoadImageFromFile``. There is no
            ``ignore_empty``, which skips images that cannot be had.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read or decoded, or is empty.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = "color",
        imdecode_backend: str = "cv2",
        *,
        backend_args: dict | None = None,
    ) -> None:
        super().__init__(to_float32, color_type, imdecode_backend, backend_args=backend_args)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        try:
            return super().transform(results)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no image {path}") from None
        # An assertion of mmcv's is OpenCV's way to say that it could not decode.
        except (AssertionError, OSError, SyntaxError, ValueError, cv2.error) as error:
            raise ValueError(
                f"{path} cannot be decoded by {self.imdecode_backend!r} ({str(error).strip()}): expected an image "
                "(JPEG, PNG, ...), found one that is damaged or cut short, or another kind of file"
            ) from error
