"""Transforms for classification: images of Pillow, augmented by timm."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from mmengine.structures import BaseDataElement
from PIL import Image, ImageOps, UnidentifiedImageError
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import Compose, RandomCrop, Resize

from mmsnnet.datasets.transforms.headers import check_pixels, read_image
from mmsnnet.datasets.transforms.orientation import rotate_upright
from mmsnnet.datasets.transforms.pixels import check_max_value, decode, to_byte_range
from mmsnnet.errors import DataError, SettingError
from mmsnnet.registry import TRANSFORMS

CROP_MODES = ("rrc", "rkrc", "rkrr", "src")
# Options of timm.data.create_transform that have an effect here, in training and in evaluation. timm ignores others.
CROP_OPTIONS = ("scale", "ratio")
TRAINING_OPTIONS = (
    *("hflip", "vflip", "color_jitter", "color_jitter_prob", "grayscale_prob"),
    *("gaussian_blur_prob", "auto_augment", "interpolation"),
)
EVALUATION_OPTIONS = ("crop_pct", "crop_mode", "crop_border_pixels", "interpolation")


@TRANSFORMS.register_module()
class LoadPillowImage:
    """Read ``img_path`` into ``img``, an upright RGB image of Pillow.

    The EXIF orientation is always applied, because a class label has no frame. Alpha is dropped. A sample may have its
    image already, as for ``LoadImage``.

    Args:
        max_value: the value of white in images that do not have 8 bits, as in ``LoadImage``. They are scaled to 0..255
            and rounded. Without it, such images are errors.
        max_pixels: as of ``LoadImage``.

    Raises:
        SettingError: ``max_value`` is not a finite number above 0.
        MissingFileError: the file does not exist.
        DataError: the file cannot be decoded completely, or has values or bands without a clear meaning.
    """

    def __init__(self, max_value: float | None = None, max_pixels: int | None = None) -> None:
        check_max_value(max_value, "LoadPillowImage")
        self.max_value = max_value
        self.max_pixels = max_pixels

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        if "img" in results:
            check_pixels(results["img"].shape[:2], path, self.max_pixels)
            results["img"] = self._to_pillow(results["img"], path)
            return results
        content, header = read_image(results, max_pixels=self.max_pixels)
        tiff = header.tiff
        if header.has_unknown_band:
            raise DataError(f"{path} has bands that are neither colours nor alpha: LoadPillowImage reads three colours")
        if header.bits > 8 or (tiff is not None and (tiff.kind != "u" or tiff.extra_bands or tiff.pages > 1)):
            # Pillow keeps more than 8 bits in gray images only.
            backend = "pillow" if header.is_gray else "cv2"
            pixels = rotate_upright(decode(content, header, path, backend, "color"), header.orientation)
            results["img"] = self._to_pillow(pixels, path)
            return results
        try:
            with Image.open(BytesIO(content)) as image:
                # Pillow rotates a TIFF by itself.
                is_rotated = header.orientation != 1 and tiff is None
                results["img"] = (ImageOps.exif_transpose(image) if is_rotated else image).convert("RGB")
        except (Image.DecompressionBombError, UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise DataError(f"{path}: expected an image, found a file that cannot be decoded ({error})") from error
        return results

    def _to_pillow(self, pixels: np.ndarray, path: str) -> Image.Image:
        """Convert decoded pixels, blue first, to an RGB image of Pillow."""
        values = to_byte_range(pixels, path, self.max_value, "color")
        return Image.fromarray(np.rint(values).astype(np.uint8)[..., ::-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_value={self.max_value}, max_pixels={self.max_pixels})"


@TRANSFORMS.register_module()
class TimmTransform:
    """Apply ``timm.data.create_transform`` to the Pillow image ``img``, giving a uint8 tensor (3, H, W).

    Args:
        train_crop_mode: timm's modes, or ``'src'``, DeiT-III's simple random crop (arXiv 2204.07118): resize the
            shorter side to the crop's, pad 4 pixels by reflection, crop at a random place. For training only.
        options: of ``timm.data.create_transform``: ``auto_augment`` (``'3a'`` is DeiT-III's three-augment),
            ``color_jitter``, ``interpolation``, ``crop_pct`` and so on. The model's ``data_preprocessor`` normalises,
            and ``erasing`` of ``StitchedClassifier`` erases afterwards.

    Raises:
        SettingError: an unknown ``train_crop_mode``, or one without ``is_training=True``; an option that timm would
            ignore.
    """

    def __init__(
        self, input_size: int, is_training: bool = False, train_crop_mode: str | None = None, **options: Any
    ) -> None:
        if train_crop_mode not in (None, *CROP_MODES):
            raise SettingError(f"train_crop_mode must be one of {', '.join(CROP_MODES)}; got {train_crop_mode!r}")
        if train_crop_mode is not None and not is_training:
            raise SettingError(
                f"train_crop_mode={train_crop_mode!r} crops at random, for training: set is_training=True, or remove "
                "it for evaluation"
            )
        simple = train_crop_mode == "src"
        _check_options(options, is_training, simple)
        transform = create_transform(
            input_size,
            is_training=is_training,
            train_crop_mode=None if simple else train_crop_mode,
            normalize=False,
            **options,
        )
        if simple:
            crop = [
                Resize(input_size, str_to_interp_mode(options.get("interpolation", "bilinear"))),
                RandomCrop(input_size, padding=4, padding_mode="reflect"),
            ]
            # timm's first training transform is its random crop.
            transform = Compose([*crop, *transform.transforms[1:]])
        self.transform = transform

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        results["img"] = self.transform(results["img"])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transform})"


def _check_options(options: Mapping[str, Any], is_training: bool, simple_crop: bool) -> None:
    if erasing := sorted(name for name in options if name.startswith("re_")):
        raise SettingError(
            f"TimmTransform's {', '.join(erasing)} would have no effect, because the model normalises: set "
            "model.erasing=dict(probability=0.25, mode='pixel') of mmsnnet.StitchedClassifier"
        )
    allowed = (*TRAINING_OPTIONS, *(() if simple_crop else CROP_OPTIONS)) if is_training else EVALUATION_OPTIONS
    if ignored := sorted(set(options) - set(allowed)):
        case = f"is_training={is_training}" + " and train_crop_mode='src'" * simple_crop
        raise SettingError(
            f"TimmTransform's {', '.join(ignored)} would have no effect with {case}: leave it out, or set one of "
            f"{', '.join(allowed)}"
        )
    policy = options.get("auto_augment")
    jitter = [name for name in ("color_jitter", "color_jitter_prob") if options.get(name) is not None]
    if policy and "3a" not in policy and jitter:
        raise SettingError(
            f"timm leaves out colour jitter beside auto_augment={policy!r}: remove {' and '.join(jitter)} from "
            "TimmTransform"
        )


@TRANSFORMS.register_module()
class PackClsInputs:
    """Pack ``img`` as ``inputs``, and ``gt_label``, ``num_classes`` and ``img_path`` as ``data_samples``.

    The label stays a Python number, so a model can read it without waiting for the GPU. Images for prediction have no
    label.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        meta = {name: results[name] for name in ("img_path", "num_classes") if name in results}
        label = {name: results[name] for name in ("gt_label",) if name in results}
        return dict(inputs=results["img"], data_samples=BaseDataElement(metainfo=meta, **label))
