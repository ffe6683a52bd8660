"""What a program without torch must do to a picture, and real images to compare exports on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor

from mmsnnet.datasets.folders import IMAGE_SUFFIXES
from mmsnnet.engine.runner.stitch_loops import use_checked_image_loader
from mmsnnet.errors import MissingFileError, SettingError
from mmsnnet.registry import DATASETS, TRANSFORMS


def preprocessing(config: Config) -> dict[str, Any]:
    """The preprocessing of a config's test pipeline as plain data.

    Keys: ``resize`` is None, or ``scale`` (width, height) and ``keep_ratio`` of mmcv's ``Resize``, or ``short_side`` of
    timm's; ``crop`` is the side of a central square, or None; ``interpolation``; ``mean`` and ``std`` for each channel,
    of values from 0 to 255; ``channels``: ``'rgb'``, ``'bgr'`` or their number; ``others``: transforms that only the
    toolbox can apply.
    """
    resize, crop, interpolation, others = None, None, "bilinear", []
    for step in _pipeline(config):
        name = _name(step)
        if name == "Resize":
            scale = step["scale"]
            scale = [scale, scale] if isinstance(scale, int) else list(scale)
            resize = dict(scale=scale, keep_ratio=bool(step.get("keep_ratio", False)))
        elif name == "TimmTransform":
            crop, interpolation = step["input_size"], step.get("interpolation", "bilinear")
            resize = dict(short_side=int(crop / step.get("crop_pct", 0.875)))
        elif not name.startswith(("Load", "Pack")) and name != "mmsnnet":
            others.append(name)
    settings = config.model.get("data_preprocessor") or {}
    mean, std = (list(map(float, settings.get(key) or default)) for key, default in (("mean", [0]), ("std", [1])))
    pillow = any(_name(step) == "LoadPillowImage" for step in _pipeline(config))
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
    """Real images (number, C, H, W), normalised and resized to ``size`` (height, width).

    Args:
        config, model: of the export.
        source: a folder of images, or an image; None takes the first images of the test set.
        number: how many; fewer images are repeated.

    Raises:
        MissingFileError: there is no image.
        DataError: an image cannot be read.
    """
    loader = next((step for step in _pipeline(config) if "Image" in _name(step)), None)
    if loader is None:
        raise SettingError("test_dataloader.dataset.pipeline loads no image: it needs LoadImageFromFile")
    load = TRANSFORMS.build(use_checked_image_loader(dict(loader)))
    paths = _test_images(config, number) if source is None else list_images(source)[:number]
    images = []
    for path in paths:
        array = np.asarray(load(dict(img_path=str(path)))["img"])
        array = array[..., None] if array.ndim == 2 else array
        inputs = torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))
        inputs = model.data_preprocessor(dict(inputs=[inputs], data_samples=None))["inputs"]
        inputs = inputs[0] if isinstance(inputs, list | tuple) else inputs.reshape(-1, *inputs.shape[-2:])
        images.append(F.interpolate(inputs[None].float(), size=size, mode="bilinear", antialias=True)[0])
    return torch.stack([images[index % len(images)] for index in range(number)])


def list_images(source: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder, in the order of their names; or a file itself.

    Raises:
        MissingFileError: there is none.
    """
    path = Path(source)
    if path.is_file():
        return [path]
    images = sorted(file for file in path.glob("**/*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise MissingFileError(f"there is no image in {path}: give a folder with images")
    return images


def _test_images(config: Config, number: int) -> list[str]:
    try:
        dataset = DATASETS.build(config.test_dataloader.dataset)
        return [dataset.get_data_info(index)["img_path"] for index in range(min(number, len(dataset)))]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(
            f"the export is compared on images of the test set, which is missing ({error}): set --images to a folder "
            "of images, or data_root"
        ) from error


def _pipeline(config: Config) -> Sequence[Mapping[str, Any]]:
    dataset = config.test_dataloader.dataset
    while "pipeline" not in dataset and "dataset" in dataset:
        dataset = dataset["dataset"]
    return dataset.get("pipeline") or ()


def _name(step: Mapping[str, Any]) -> str:
    type_ = step.get("type")
    return type_.__name__ if isinstance(type_, type) else str(type_).rpartition(".")[2]
