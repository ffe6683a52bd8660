"""The pipeline of classification: Pillow's images through timm's transforms."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.structures import BaseDataElement
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import Compose, RandomCrop, Resize

from mmsnnet.datasets.transforms.headers import read_header
from mmsnnet.datasets.transforms.orientation import turned
from mmsnnet.datasets.transforms.pixels import check_max_value, decode, to_byte_range
from mmsnnet.errors import DataError, MissingFileError, SettingError
from mmsnnet.registry import TRANSFORMS

CROP_MODES = ("rrc", "rkrc", "rkrr", "src")


@TRANSFORMS.register_module()
class LoadPillowImage:
    """Reads ``img_path`` into ``img``, an upright RGB image of Pillow's.

    The EXIF orientation is applied: a label has no frame to fit. Alpha is dropped.

    Args:
        max_value: what stands for white in images that do not have 8 bits, as of ``LoadImage``. They are scaled to
            0..255 and rounded. Without it, such images are errors.

    Raises:
        SettingError: ``max_value`` is not a finite number above 0.
        MissingFileError: there is no such file.
        DataError: it cannot be decoded, or not to its end, or has values or bands without a clear meaning.
    """

    def __init__(self, max_value: float | None = None) -> None:
        check_max_value(max_value, "LoadPillowImage")
        self.max_value = max_value

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        try:
            content = Path(path).read_bytes()
        except FileNotFoundError:
            raise MissingFileError(f"there is no image {path}") from None
        except OSError as error:
            raise DataError(f"{path}: expected an image, found a file that cannot be read ({error})") from error
        header = read_header(content, path)
        tiff = header.tiff
        if header.has_unknown_band:
            raise DataError(f"{path} has bands that are neither colours nor alpha: LoadPillowImage reads three colours")
        if header.bits > 8 or (tiff is not None and (tiff.kind != "u" or tiff.extra_bands or tiff.pages > 1)):
            # Pillow keeps the bits of one channel alone.
            backend = "pillow" if header.is_gray else "cv2"
            values = to_byte_range(decode(content, header, path, backend, "color"), path, self.max_value, "color")
            pixels = turned(np.rint(values).astype(np.uint8), header.orientation)
            results["img"] = Image.fromarray(pixels[..., ::-1])
            return results
        try:
            with Image.open(BytesIO(content)) as image:
                if header.orientation != 1 and tiff is None:  # Pillow turns a TIFF by itself
                    image = ImageOps.exif_transpose(image)
                results["img"] = image.convert("RGB")
        except (Image.DecompressionBombError, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: expected an image, found a file that cannot be decoded ({error})") from error
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_value={self.max_value})"


@TRANSFORMS.register_module()
class TimmTransform:
    """``img``, an image of Pillow's, through ``timm.data.create_transform``, to a uint8 tensor (3, H, W).

    Args:
        train_crop_mode: as timm's, and ``'src'``, DeiT-III's simple random crop (arXiv 2204.07118): the shorter side
            is resized to the crop's, 4 pixels of reflection go around, and the crop is taken anywhere. For training
            alone.
        options: of ``timm.data.create_transform``: ``input_size``, ``is_training``, ``auto_augment`` (``'3a'`` is
            DeiT-III's three-augment), ``color_jitter``, ``interpolation``, ``crop_pct`` and so on. The model's
            ``data_preprocessor`` normalises.

    Raises:
        SettingError: a ``train_crop_mode`` that is none, or one without ``is_training=True``.
    """

    def __init__(self, input_size: int, train_crop_mode: str | None = None, **options: Any) -> None:
        if train_crop_mode not in (None, *CROP_MODES):
            raise SettingError(f"train_crop_mode is one of {', '.join(CROP_MODES)}; got {train_crop_mode!r}")
        if train_crop_mode is not None and not options.get("is_training"):
            raise SettingError(
                f"train_crop_mode={train_crop_mode!r} crops at random, for training: set is_training=True, or leave it "
                "out for evaluation"
            )
        simple = train_crop_mode == "src"
        transform = create_transform(
            input_size, train_crop_mode=None if simple else train_crop_mode, normalize=False, **options
        )
        if simple:
            crop = [
                Resize(input_size, str_to_interp_mode(options.get("interpolation", "bilinear"))),
                RandomCrop(input_size, padding=4, padding_mode="reflect"),
            ]
            # The first of timm's training transforms is its random crop.
            transform = Compose([*crop, *transform.transforms[1:]])
        self.transform = transform

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["img"] = self.transform(results["img"])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"


@TRANSFORMS.register_module()
class PackClsInputs:
    """``img`` as ``inputs``; ``gt_label``, ``num_classes`` and ``img_path`` as the ``data_samples`` of a classifier.

    The label stays a Python number: a model can look at it without waiting for the GPU.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        meta = {name: results[name] for name in ("img_path", "num_classes") if name in results}
        return dict(inputs=results["img"], data_samples=BaseDataElement(metainfo=meta, gt_label=results["gt_label"]))
