"""Checked loading of label maps in mmseg's pipelines."""

from __future__ import annotations

from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine import fileio
from mmseg.datasets.transforms import LoadAnnotations

from mmsnnet.registry import TRANSFORMS

IGNORED = 255
"""What mmseg's losses and metrics leave out."""
_WRONG = 254


@TRANSFORMS.register_module()
class LoadSegLabels(LoadAnnotations):
    """mmseg's ``LoadAnnotations``, with a check of what was read.

    Adds ``gt_seg_map``, uint8 (H, W), labels from 0 and 255 for pixels without one. Whether the file's labels start
    from 1, ``reduce_zero_label``, and which of the classes are wanted, is for the data set to say. A sample without
    ``seg_map_path``, as the inference functions of mmseg make them, goes through unchanged.

    Args:
        num_classes: the classes of the data set, at most 254.
        backend_args: of mmengine's file backend.
        imdecode_backend: of ``mmcv.imfrombytes``.

    Raises:
        FileNotFoundError: an image has no label map.
        ValueError: a label map cannot be decoded, is not of its image's size, has several channels, or has a label that
            is none of the classes.
    """

    def __init__(self, num_classes: int, backend_args: dict | None = None, imdecode_backend: str = "pillow") -> None:
        super().__init__(backend_args=backend_args, imdecode_backend=imdecode_backend)
        if not 1 <= num_classes <= _WRONG:
            raise ValueError(f"num_classes is from 1 to {_WRONG}, for labels are bytes; got {num_classes}")
        self.num_classes = num_classes

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        return super().transform(results) if "seg_map_path" in results else results

    def _load_seg_map(self, results: dict[str, Any]) -> None:
        path = results["seg_map_path"]
        values = self._read(path, results["img_path"])
        if values.ndim != 2:
            raise ValueError(f"{path}: a label map has one channel, found an array of shape {values.shape}")
        if "ori_shape" in results and values.shape != tuple(results["ori_shape"]):
            raise ValueError(
                f"{path}: a label map is as large as its image, found {values.shape} for {results['img_path']} of "
                f"{tuple(results['ori_shape'])} (height, width)"
            )
        # With classes of the user's choice, those of the file, each with its new label.
        label_map = results.get("label_map")
        new_labels = list(label_map.values()) if label_map else list(range(self.num_classes))
        first = 1 if results["reduce_zero_label"] else 0
        table = np.full(256, _WRONG, np.uint8)
        table[first : first + len(new_labels)] = new_labels
        table[[IGNORED, *range(first)]] = IGNORED
        # More than a byte holds would wrap around, to the label of a class perhaps.
        wrong = values[values > IGNORED] if values.dtype != np.uint8 else values[:0]
        labels = cv2.LUT(values.astype(np.uint8, copy=False), table)  # ten times as fast as indexing
        if wrong.size or (labels == _WRONG).any():
            found = np.unique(wrong if wrong.size else values[labels == _WRONG])
            raise ValueError(
                f"{path}: a label map has {first} to {first + len(new_labels) - 1} for its {len(new_labels)} classes "
                f"(num_classes) and {'0 or ' * first}{IGNORED} for what has none (reduce_zero_label={bool(first)}); "
                f"found {', '.join(str(value) for value in found[:5])}{', ...' * (len(found) > 5)}"
            )
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")

    def _read(self, path: str, image: str) -> np.ndarray:
        try:
            content = fileio.get(path, backend_args=self.backend_args)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no label map {path} for the image {image}") from None
        try:
            values = mmcv.imfrombytes(content, flag="unchanged", backend=self.imdecode_backend)
            if values is None:  # as OpenCV says it
                raise ValueError("no image")
        except (OSError, SyntaxError, ValueError, cv2.error) as error:
            raise ValueError(
                f"{path} cannot be decoded by {self.imdecode_backend!r} ({str(error).strip()}): expected a label map "
                "(a PNG of one channel), found one that is damaged or cut short, or another kind of file"
            ) from error
        return values.squeeze()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(num_classes={self.num_classes}, imdecode_backend={self.imdecode_backend!r}, "
            f"backend_args={self.backend_args})"
        )
