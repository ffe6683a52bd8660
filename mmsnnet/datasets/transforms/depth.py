"""Depth maps in mmseg's pipelines: checked loading, and the augmentations of NYUv2 that mmseg lacks.

mmseg's ``RandomFlip``, ``RandomRotate``, ``RandomCrop`` and ``Resize`` treat a depth map as a label map: they move it
with the image, by nearest neighbour, and keep its values. If they pad, ``seg_pad_val`` must be 0 (not measured).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmcv.transforms.utils import cache_randomness
from mmseg.datasets.transforms import LoadDepthAnnotation

from mmsnnet.datasets.transforms.headers import read_picture
from mmsnnet.datasets.transforms.orientation import check_map
from mmsnnet.datasets.transforms.pixels import decode, describe
from mmsnnet.errors import DataError, SettingError
from mmsnnet.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadDepth(LoadDepthAnnotation):
    """mmseg's ``LoadDepthAnnotation`` for 16-bit PNGs, with checked values.

    Adds ``gt_depth_map``, float32 (H, W) in metres, 0 for unmeasured pixels. A sample without ``depth_map_path``,
    which mmseg's inference functions make, passes unchanged.

    Args:
        depth_rescale_factor: metres per step of the file's values; 1e-3 for millimetres.
        max_depth: in metres. At least one pixel must be measured below it. Values above it are kept, because the head
            and the metric have their own ranges.
        backend_args: arguments of mmengine's file backend.

    Raises:
        MissingFileError: the file does not exist.
        DataError: the file is not a 16-bit PNG of one channel, has another size or frame than its image, or no measured
            pixel.
    """

    def __init__(
        self, depth_rescale_factor: float = 1e-3, max_depth: float = 10.0, backend_args: dict | None = None
    ) -> None:
        super().__init__(depth_rescale_factor=depth_rescale_factor, backend_args=backend_args)
        self.max_depth = max_depth

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results.get("depth_map_path")
        if not path:
            return results
        content, header = read_picture(path, self.backend_args, "depth map", results["img_path"])
        values = decode(content, header, path, "cv2", "unchanged", "a depth map (a 16-bit PNG of one channel)")
        if values.dtype != np.uint16 or values.ndim != 2:
            raise DataError(f"{path}: a depth map must be a 16-bit PNG of one channel, found {describe(values)}")
        check_map(path, "depth map", values.shape, header, results, self.backend_args)
        depth = values.astype(np.float32) * np.float32(self.depth_rescale_factor)
        if not ((depth > 0) & (depth < self.max_depth)).any():
            raise DataError(
                f"{path}: a depth map must have pixels between 0 and {self.max_depth} m, found none: values from "
                f"{values.min()} to {values.max()}, in steps of {self.depth_rescale_factor} m"
            )
        results["gt_depth_map"] = depth
        results["seg_fields"].append("gt_depth_map")
        results["depth_rescale_factor"] = self.depth_rescale_factor
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(depth_rescale_factor={self.depth_rescale_factor}, max_depth={self.max_depth}, "
            f"backend_args={self.backend_args})"
        )


@TRANSFORMS.register_module()
class NYUCrop(BaseTransform):
    """Crop the blank border that the registration of colour and depth leaves in NYUv2's frames.

    Keeps rows 45 to 471 and columns 43 to 607 of 480 x 640, and the same share of another size.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        rows = slice(45 * height // 480, 472 * height // 480)
        columns = slice(43 * width // 640, 608 * width // 640)
        for key in ("img", *results["seg_fields"]):
            results[key] = results[key][rows, columns]
        results["img_shape"] = results["img"].shape[:2]
        return results


@TRANSFORMS.register_module()
class RandomColor(BaseTransform):
    """Change exposure and tint of an image, as BTS (arXiv 1907.10326) and its successors do on NYUv2.

    Computes ``clip(x ** gamma * brightness * color[c], 0, 1)`` with ``x`` from 0 to 1 in each channel ``c``. Gamma and
    brightness are drawn once for an image, the colour for each channel, all uniformly. The image is (H, W, C), with any
    number of channels, uint8 or float32 from 0 to 255.

    Args:
        prob: probability of a change.
        gamma, brightness, color: the lowest and the highest value.

    Raises:
        SettingError: a probability outside 0 to 1, or an empty or negative range.
        DataError: an image without channels, or of another type.
    """

    def __init__(
        self,
        prob: float = 0.5,
        gamma: tuple[float, float] = (0.9, 1.1),
        brightness: tuple[float, float] = (0.75, 1.25),
        color: tuple[float, float] = (0.9, 1.1),
    ) -> None:
        super().__init__()
        if not 0 <= prob <= 1:
            raise SettingError(f"RandomColor: prob must be 0 to 1, got {prob}")
        for name, (low, high) in (("gamma", gamma), ("brightness", brightness), ("color", color)):
            if not 0 < low <= high:
                raise SettingError(f"RandomColor: {name} must be (lowest, highest), both above 0, got {(low, high)}")
        self.prob = prob
        self.gamma, self.brightness, self.color = gamma, brightness, color

    @cache_randomness
    def draw(self, channels: int) -> tuple[float, np.ndarray] | None:
        """Draw gamma and the factor of each channel; None for no change."""
        # mmengine seeds NumPy's global generator in each worker, as mmcv's transforms expect.
        if np.random.rand() >= self.prob:
            return None
        gamma, brightness = np.random.uniform(*self.gamma), np.random.uniform(*self.brightness)
        return gamma, brightness * np.random.uniform(*self.color, size=channels)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results["img"]
        if image.ndim != 3 or image.dtype not in (np.uint8, np.float32):
            raise DataError(
                f"RandomColor: an image must be (H, W, channels), uint8 or float32, found {describe(image)} for "
                f"{results.get('img_path')}"
            )
        change = self.draw(image.shape[2])
        if change is None:
            return results
        gamma, factors = change
        if image.dtype == np.float32:
            results["img"] = (255 * ((image / 255) ** gamma * factors).clip(0, 1)).astype(np.float32)
            return results
        levels = (np.arange(256) / 255)[:, None] ** gamma * factors
        table = np.rint(255 * levels.clip(0, 1)).astype(np.uint8)
        results["img"] = np.stack([table[image[..., channel], channel] for channel in range(image.shape[2])], axis=-1)
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(prob={self.prob}, gamma={self.gamma}, brightness={self.brightness}, "
            f"color={self.color})"
        )
