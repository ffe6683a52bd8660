"""Checked loading of label maps in mmseg's pipelines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from mmseg.datasets.transforms import LoadAnnotations

from mmsnnet.datasets.transforms.headers import Header, read_picture
from mmsnnet.datasets.transforms.orientation import check_map
from mmsnnet.datasets.transforms.pixels import check_backend, decode, describe
from mmsnnet.errors import DataError, SettingError
from mmsnnet.registry import TRANSFORMS

IGNORED = 255
"""Label that mmseg's losses and metrics skip."""
_WRONG = 254
"""Label of an unknown value while a map is looked up; no class has it."""


@TRANSFORMS.register_module()
class LoadSegLabels(LoadAnnotations):
    """mmseg's ``LoadAnnotations`` with checked values.

    Adds ``gt_seg_map``, uint8 (H, W): labels from 0, and 255 for pixels without a label. The data set decides whether
    the file's labels start from 1 (``reduce_zero_label``) and which classes are used. A sample without
    ``seg_map_path``, which mmseg's inference functions make, passes unchanged.

    Args:
        num_classes: number of classes of the data set, at most 254.
        backend_args: arguments of mmengine's file backend.
        imdecode_backend: of ``mmcv.imfrombytes``.
        values: the file's value of each class, in order, such as ``(0, 255)`` for masks of 0 and 255. By default
            0, 1, 2 and so on, or 1, 2, 3 and so on with ``reduce_zero_label``. 255 means "no label" unless listed.

    Raises:
        SettingError: an impossible number of classes, values or backend, or ``values`` with ``reduce_zero_label``.
        MissingFileError: an image has no label map.
        DataError: a label map cannot be decoded, has another size or frame than its image, several channels, values
            that are not integers, or a label outside the classes.
    """

    def __init__(
        self,
        num_classes: int,
        backend_args: dict | None = None,
        imdecode_backend: str = "pillow",
        values: Sequence[int] | None = None,
    ) -> None:
        super().__init__(backend_args=backend_args, imdecode_backend=imdecode_backend)
        if not 1 <= num_classes <= _WRONG:
            raise SettingError(f"num_classes must be 1 to {_WRONG}, because labels are bytes; got {num_classes}")
        check_backend(imdecode_backend, "LoadSegLabels")
        if values is not None:
            integers = all(isinstance(value, int) and not isinstance(value, bool) for value in values)
            if not integers or len(set(values)) < len(values) or not num_classes <= len(values) <= _WRONG:
                raise SettingError(
                    f"LoadSegLabels: values must have a different integer for each class of the file, for "
                    f"num_classes={num_classes}; got {values!r}"
                )
        self.num_classes = num_classes
        self.values = None if values is None else tuple(values)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return super().transform(results) if results.get("seg_map_path") else results

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results["seg_map_path"]
        stored, header = self._read(path, results["img_path"])
        check_map(path, "label map", stored.shape, header, results, self.backend_args)
        labels = _look_up(stored, self._label_of_value(results))
        wrong = labels == _WRONG
        if wrong.any():
            values = np.unique(stored[wrong])
            raise DataError(
                f"{path}: a label map must have {self._expected(results)}; "
                f"found {', '.join(str(value) for value in values[:5])}{', ...' * (len(values) > 5)}"
            )
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")

    def stored_values(self, path: str, image: str) -> np.ndarray:
        """Read the values (H, W) of a label map before they become labels.

        Args:
            path: of the label map.
            image: path of its image, for messages.

        Raises:
            MissingFileError: the file does not exist.
            DataError: it cannot be decoded, has several channels, or values that are not integers.
        """
        return self._read(path, image)[0]

    def _labels(self, results: dict[str, Any]) -> list[int]:
        """Label of each class of the file; a user's choice of classes renumbers them."""
        label_map = results.get("label_map")
        return list(label_map.values()) if label_map else list(range(self.num_classes))

    def _label_of_value(self, results: dict[str, Any]) -> dict[int, int]:
        """Label of each value that a file may hold."""
        labels = self._labels(results)
        if len(labels) > _WRONG:
            raise SettingError(f"LoadSegLabels: files have at most {_WRONG} classes, the data set's have {len(labels)}")
        if self.values is None:
            first = 1 if results["reduce_zero_label"] else 0
            return {IGNORED: IGNORED, **dict.fromkeys(range(first), IGNORED), **dict(enumerate(labels, first))}
        if results["reduce_zero_label"]:
            raise SettingError(
                f"LoadSegLabels: values={self.values} sets the class of each value, and reduce_zero_label=True of the "
                "data set would shift them: set reduce_zero_label=False"
            )
        if len(self.values) != len(labels):
            raise SettingError(
                f"LoadSegLabels: values={self.values} has {len(self.values)} values, and the data set's files have "
                f"{len(labels)} classes"
            )
        return {IGNORED: IGNORED, **dict(zip(self.values, labels, strict=True))}

    def _expected(self, results: dict[str, Any]) -> str:
        number = len(self._labels(results))
        if self.values is not None:
            ignored = "" if IGNORED in self.values else f" and {IGNORED} for no label"
            return f"values={self.values} for its {number} classes{ignored}"
        first = 1 if results["reduce_zero_label"] else 0
        return (
            f"{first} to {first + number - 1} for its {number} classes (num_classes) and {'0 or ' * first}{IGNORED} "
            f"for no label (reduce_zero_label={bool(first)})"
        )

    def _read(self, path: str, image: str) -> tuple[np.ndarray, Header]:
        content, header = read_picture(path, self.backend_args, "label map", image)
        if content[:2] == b"\xff\xd8":
            raise DataError(
                f"{path} is a JPEG, which changes the values of a label map: write label maps as PNG, from the "
                "original labels, and set seg_map_suffix"
            )
        expected = "a label map (a PNG of one channel)"
        values = decode(content, header, path, self.imdecode_backend, "unchanged", expected)
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[..., 0]
        if values.ndim != 2:
            raise DataError(f"{path}: a label map must have one channel, found an array of shape {values.shape}")
        if values.dtype.kind not in "biu":
            raise DataError(
                f"{path}: a label map must have integer values; write it as uint8; found {describe(values)}"
            )
        if header.tiff is not None and header.tiff.zero_is_white:
            raise DataError(
                f"{path} is a TIFF with 0 as white (MINISWHITE), which some programs invert: write label maps with "
                "photometric='minisblack'"
            )
        if header.is_gray and header.bits in (2, 4):
            raise DataError(
                f"{path}: a label map of {header.bits} bits a pixel has no clear values, because decoders stretch them "
                "to 0..255: write it with 8 bits"
            )
        # Decoders return a set bit as True, 1 or 255.
        return ((values != 0).astype(np.uint8) if header.is_gray and header.bits == 1 else values), header

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_classes={self.num_classes}, imdecode_backend={self.imdecode_backend!r}, "
            f"backend_args={self.backend_args}, values={self.values})"
        )


def _look_up(values: np.ndarray, label_of_value: dict[int, int]) -> np.ndarray:
    """Label of each value, ``_WRONG`` for unknown ones. No value is cast to a type that cannot hold it."""
    if values.dtype != np.uint8 and values.size and (values.min() < 0 or values.max() > 255):
        distinct, places = np.unique(values, return_inverse=True)
        labels = np.array([label_of_value.get(int(value), _WRONG) for value in distinct], np.uint8)
        return labels[places].reshape(values.shape)
    table = np.array([label_of_value.get(value, _WRONG) for value in range(256)], np.uint8)
    return cv2.LUT(values.astype(np.uint8, copy=False), table)  # ten times as fast as indexing
