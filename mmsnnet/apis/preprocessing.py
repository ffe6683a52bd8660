"""What a program without torch must do to a picture, and real images to compare exports on."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from timm.data.constants import DEFAULT_CROP_PCT
from torch import Tensor

from mmsnnet.apis.images import ImageLike, ImageLoader, inner_dataset, list_images, transform_name
from mmsnnet.apis.predictor import MAX_PIXELS
from mmsnnet.errors import MissingFileError
from mmsnnet.registry import DATASETS

# Options of transforms that a program without torch does not know, with the values that change nothing.
RESIZE = (("interpolation", "bilinear"), ("backend", "cv2"), ("scale_factor", None), ("clip_object_border", True))
TIMM = (("crop_mode", "center"), ("is_training", False))
LOAD = (("exif", "apply"), ("max_value", None))


def preprocessing(config: Config) -> dict[str, Any]:
    """The preprocessing of a config's test pipeline as plain data.

    Keys: ``resize`` is None, or ``scale`` (width, height) and ``keep_ratio`` of mmcv's ``Resize``, or ``short_side`` of
    timm's; ``crop`` is the side of a central square, or None; ``interpolation``; ``mean`` and ``std`` for each channel,
    of values from 0 to 255; ``channels``: ``'rgb'``, ``'bgr'`` or their number; ``others``: transforms that only the
    toolbox can apply.
    """
    resize, crop, interpolation, others = None, None, "bilinear", []
    for step in inner_dataset(config)["pipeline"]:
        name, options = transform_name(step), {key: value for key, value in step.items() if key != "type"}
        understood = {"Resize": RESIZE, "TimmTransform": TIMM, "LoadImageFromFile": LOAD, "LoadImage": LOAD}.get(name)
        if understood is not None and not all(options.get(key, known) in (known, None) for key, known in understood):
            others.append(f"{name}({', '.join(f'{key}={options[key]!r}' for key, _ in understood if key in options)})")
        elif name == "Resize" and "scale" in options:
            scale = options["scale"]
            scale = [scale, scale] if isinstance(scale, int) else list(scale)
            resize = dict(scale=scale, keep_ratio=bool(options.get("keep_ratio", False)))
        elif name == "TimmTransform" and options.get("interpolation", "bilinear") in ("bilinear", "bicubic"):
            crop, interpolation = options["input_size"], options.get("interpolation", "bilinear")
            resize = dict(short_side=int(crop / (options.get("crop_pct") or DEFAULT_CROP_PCT)))
        elif not name.startswith(("Load", "Pack")):
            others.append(name)
    settings = config.model.get("data_preprocessor") or {}
    mean, std = (list(map(float, settings.get(key) or default)) for key, default in (("mean", [0]), ("std", [1])))
    pillow = any(transform_name(step) == "LoadPillowImage" for step in inner_dataset(config)["pipeline"])
    swapped = bool(settings.get("bgr_to_rgb") or settings.get("rgb_to_bgr"))
    channels: str | int = "rgb" if pillow != swapped else "bgr"
    number = config.model.backbone.anchors[0].get("in_chans", 3)
    return dict(
        resize=resize,
        crop=crop,
        interpolation=interpolation,
        mean=mean,
        std=std,
        channels=channels if number == 3 else number,
        others=others,
    )


def comparison_images(
    config: Config, model: BaseModel, source: str | os.PathLike[str] | None, number: int, size: tuple[int, int]
) -> Tensor:
    """Up to ``number`` real images (N, C, H, W), normalised and resized to ``size`` (height, width).

    Args:
        config, model: of the export.
        source: an image, a folder or a glob pattern; None takes the first images of the test set.
        number: how many at most.

    Raises:
        MissingFileError: there is no image.
        DataError: an image cannot be read.
    """
    load = ImageLoader(config, MAX_PIXELS)
    listed: Iterable[ImageLike] = _test_images(config, number) if source is None else list_images(os.fspath(source))[0]
    images = []
    for path in islice(listed, number):
        _, packed = load(path)
        inputs = model.data_preprocessor(dict(inputs=[packed["inputs"]], data_samples=None))["inputs"]
        inputs = inputs[0] if isinstance(inputs, list | tuple) else inputs.reshape(-1, *inputs.shape[-2:])
        images.append(F.interpolate(inputs[None].float(), size=size, mode="bilinear", antialias=True)[0])
    return torch.stack(images)


def _test_images(config: Config, number: int) -> list[str]:
    try:
        dataset = DATASETS.build(config.test_dataloader.dataset)
        return [dataset.get_data_info(index)["img_path"] for index in range(min(number, len(dataset)))]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"the export is compared on images of the test set, which is missing ({error}): set --images to a folder "
            "of images, or data_root"
        ) from error
