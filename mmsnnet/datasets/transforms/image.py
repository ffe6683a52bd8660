"""Checked loading of images, for any toolbox."""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import ConfigDict

from mmsnnet.datasets.transforms.headers import check_pixels, read_image
from mmsnnet.datasets.transforms.orientation import (
    PENDING_ORIENTATION,
    annotation_file,
    annotation_is_upright,
    rotate_upright,
    stated_size,
)
from mmsnnet.datasets.transforms.pixels import check_backend, check_max_value, decode, to_byte_range
from mmsnnet.errors import DataError, SettingError
from mmsnnet.registry import TRANSFORMS

_IGNORE = "_ignore_orientation"
COLOR_TYPES = ("color", "grayscale", "unchanged", f"color{_IGNORE}", f"grayscale{_IGNORE}")


def with_checked_loader(setting: Any) -> Any:
    """A setting, such as a pipeline, with ``mmsnnet.LoadImage`` in the place of ``LoadImageFromFile``.

    The errors of ``mmsnnet.LoadImage`` name the file. Configs name ``LoadImageFromFile`` in their test pipelines,
    because the toolboxes' inferencers look for it there.
    """
    if isinstance(setting, dict):
        inner = {key: with_checked_loader(value) for key, value in setting.items()}
        type_ = setting.get("type")  # a name, or the class itself in a pure-Python config
        name = type_.__name__ if isinstance(type_, type) else str(type_).rpartition(".")[2]
        if name == "LoadImageFromFile":
            inner["type"] = "mmsnnet.LoadImage"
            for option, unset in (("ignore_empty", False), ("file_client_args", None)):  # LoadImage lacks these
                if option in inner and inner[option] == unset:
                    del inner[option]
        return ConfigDict(inner)
    return type(setting)(map(with_checked_loader, setting)) if isinstance(setting, list | tuple) else setting


@TRANSFORMS.register_module()
class LoadImage(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, which refuses values without a clear meaning.

    Adds ``img``, (H, W, C) or (H, W), blue first, and its ``img_shape`` and ``ori_shape``. 8-bit values stay uint8;
    others are scaled to 0..255 in float32. docs/datasets.md lists accepted files.

    A sample may have its image already: ``img``, decoded pixels, blue first and upright, or ``img_bytes``, the contents
    of a file. Then ``img_path`` is a name for messages.

    Use it in training pipelines, and in test pipelines that need ``exif`` or ``max_value``. The toolboxes' inferencers
    look for ``LoadImageFromFile`` in a test pipeline by its name.

    Args:
        to_float32, color_type, imdecode_backend, backend_args: as in ``LoadImageFromFile``. There is no
            ``ignore_empty``, which skips unreadable images.
        exif: ``'apply'`` rotates each image by its EXIF orientation, ``'ignore'`` none. By default the annotation
            decides: an image is rotated if it has no annotation, or if its label map, its depth map or the size in a
            COCO file fits only the rotated image. If sizes cannot decide, that is an error.
        max_value: the value of white in images that do not have 8 bits: 4095 for 12 bits, 65535 for 16, 1.0 for
            floating-point values up to 1. Without it, such images are errors.
        max_pixels: the most pixels that an image may have. Larger ones are refused before they are decoded.

    Raises:
        SettingError: a setting has an unknown value, or two contradict each other.
        MissingFileError: the file does not exist.
        DataError: the file cannot be read or decoded, is empty, has values without a clear meaning, or another size
            than its annotation.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = "color",
        imdecode_backend: str = "cv2",
        *,
        backend_args: dict | None = None,
        exif: str | None = None,
        max_value: float | None = None,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__(to_float32, color_type, imdecode_backend, backend_args=backend_args)
        if color_type not in COLOR_TYPES:
            raise SettingError(f"LoadImage: color_type must be one of {', '.join(COLOR_TYPES)}; got {color_type!r}")
        if exif not in (None, "apply", "ignore"):
            raise SettingError(f"LoadImage: exif must be 'apply', 'ignore' or None; got {exif!r}")
        check_backend(imdecode_backend, "LoadImage")
        if color_type.endswith(_IGNORE):
            if exif == "apply":
                raise SettingError(f"LoadImage: exif='apply' contradicts color_type={color_type!r}: remove one")
            exif = "ignore"
        check_max_value(max_value, "LoadImage")
        self.exif = exif
        self.max_value = max_value
        self.max_pixels = max_pixels

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        color = self.color_type.removesuffix(_IGNORE)
        if "img" in results:
            image, orientation = results["img"], 1
            check_pixels(image.shape[:2], path, self.max_pixels)
            _check_channels(image, path, color)
        else:
            content, header = read_image(results, self.backend_args, self.max_pixels)
            image, orientation = decode(content, header, path, self.imdecode_backend, color), header.orientation
        image = to_byte_range(image, path, self.max_value, color)
        if orientation != 1 and (
            self.exif == "apply"
            or (self.exif is None and annotation_is_upright(results, orientation, image.shape[:2], self.backend_args))
        ):
            image, orientation = rotate_upright(image, orientation), 1
        size = stated_size(results)
        if size is not None and image.shape[:2] != tuple(size):
            raise DataError(
                f"{annotation_file(results)} states {tuple(size)} (height, width) for {path}, which is "
                f"{image.shape[:2]}{f' with exif={self.exif!r}' if self.exif else ''}: boxes and masks would not fit; "
                "correct the file's height and width, or its annotations"
            )
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        results[PENDING_ORIENTATION] = orientation
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(to_float32={self.to_float32}, color_type={self.color_type!r}, "
            f"imdecode_backend={self.imdecode_backend!r}, backend_args={self.backend_args}, exif={self.exif!r}, "
            f"max_value={self.max_value}, max_pixels={self.max_pixels})"
        )


def _check_channels(image: np.ndarray, path: str, color: str) -> None:
    if color != "unchanged" and image.ndim == 3 and image.shape[2] not in (3, 4):
        raise DataError(
            f"{path} has {image.shape[2]} channels: color_type={color!r} of LoadImage takes (height, width) or 3 or 4 "
            "channels (blue, green, red, alpha)"
        )
