"""The pipeline of classification: Pillow's images through timm's transforms."""

from __future__ import annotations

from typing import Any

from mmengine.structures import BaseDataElement
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision.transforms import Compose, RandomCrop, Resize

from mmsnnet.registry import TRANSFORMS

CROP_MODES = ("rrc", "rkrc", "rkrr", "src")


@TRANSFORMS.register_module()
class LoadPillowImage:
    """Reads ``img_path`` into ``img``, an RGB image of Pillow's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be decoded, or not to its end.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        path = results["img_path"]
        try:
            with Image.open(path) as image:
                results["img"] = image.convert("RGB")
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no image {path}") from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: expected an image, found a file that cannot be decoded ({error})") from error
        return results


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
        ValueError: a ``train_crop_mode`` that is none, or one without ``is_training=True``.
    """

    def __init__(self, input_size: int, train_crop_mode: str | None = None, **options: Any) -> None:
        if train_crop_mode not in (None, *CROP_MODES):
            raise ValueError(f"train_crop_mode is one of {', '.join(CROP_MODES)}; got {train_crop_mode!r}")
        if train_crop_mode is not None and not options.get("is_training"):
            raise ValueError(
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
