"""The image size of a backbone: its setting, and warnings about images of other sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mmengine.logging import print_log


def parse_image_size(size: float | Sequence[float]) -> tuple[int, int]:
    """Read height and width from a setting; one number stands for both."""
    sides = (size, size) if isinstance(size, int | float) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int | float) and side == int(side) > 0 for side in sides):
        raise ValueError(f"img_size is the height and width of images in pixels, or the side of a square; got {size!r}")
    return int(sides[0]), int(sides[1])


def warn_of_training_size(image_size: tuple[int, int], img_size: tuple[int, int]) -> None:
    """Warn that training images of ``image_size`` are not of the setting ``img_size``."""
    print_log(
        f"Training on images of {' x '.join(map(str, image_size))}, while StitchedViT's img_size is "
        f"{' x '.join(map(str, img_size))}: position embeddings are stored and FLOPs counted for it. Set "
        "it to the size to which the training pipeline crops or pads.",
        logger="current",
        level=logging.WARNING,
    )


def warn_of_padding(image_size: tuple[int, int], padded: tuple[int, int]) -> None:
    """Warn that maps cover ``padded``, which is more than the image."""
    print_log(
        f"Images of {image_size[0]} x {image_size[1]} are not whole patches: the backbone's maps cover "
        f"{padded[0]} x {padded[1]}, and a head that resizes its maps to the image squeezes predictions. Set "
        "model.type to mmsnnet.EncoderDecoder or mmsnnet.DepthEstimator, which pad and crop, or let the data "
        "preprocessor pad (size_divisor, pad_size_divisor). Detection heads count in strides, so their "
        "predictions are correct without either.",
        logger="current",
        level=logging.WARNING,
    )
