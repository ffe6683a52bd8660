"""The image size of a backbone: its setting, and what is checked of images."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from mmengine.logging import print_log

from mmsnnet.stitching import StitchedNetwork


def parse_image_size(size: float | Sequence[float]) -> tuple[int, int]:
    """Read height and width from a setting; one number stands for both."""
    sides = (size, size) if isinstance(size, int | float) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int | float) and side == int(side) > 0 for side in sides):
        raise ValueError(f"img_size is the height and width of images in pixels, or the side of a square; got {size!r}")
    return int(sides[0]), int(sides[1])


class PaddingWarning:
    """Warn once if a backbone's maps cover more than the image."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, image_size: tuple[int, int], padded: tuple[int, int]) -> None:
        # Traced and compiled programs have no sizes to compare.
        if self.warned or torch.jit.is_tracing() or torch.compiler.is_compiling() or padded == image_size:
            return
        self.warned = True
        warn(
            f"Images of {image_size[0]} x {image_size[1]} are not whole patches: the backbone's maps cover "
            f"{padded[0]} x {padded[1]}, and a head that resizes its maps to the image squeezes predictions. Set "
            "model.type to mmsnnet.EncoderDecoder or mmsnnet.DepthEstimator, which pad and crop, or let the data "
            "preprocessor pad (size_divisor, pad_size_divisor). Detection heads count in strides, so their "
            "predictions are correct without either."
        )


def check_first_draw(network: StitchedNetwork, image_size: tuple[int, int], img_size: tuple[int, int]) -> None:
    """Check the first training step of a backbone; sizes are (height, width).

    Raises:
        RuntimeError: the stitching layers are neither initialised nor loaded.
    """
    if image_size != img_size:
        warn(
            f"Training on images of {' x '.join(map(str, image_size))}, while StitchedViT's img_size is "
            f"{' x '.join(map(str, img_size))}: position embeddings are stored and FLOPs counted for it. Set "
            "it to the size to which the training pipeline crops or pads."
        )
    if not network.initialized:
        raise RuntimeError(
            "the stitching layers are neither initialised nor loaded, and random layers would waste the pretrained "
            "anchors: add dict(type='mmsnnet.StitchInitHook') to custom_hooks, or load a checkpoint"
        )
    if network.anchor(-1).compiled:
        print_log("Blocks are compiled when a stitch first runs them, which can take minutes", logger="current")


def warn(text: str) -> None:
    """Log a warning."""
    print_log(text, logger="current", level=logging.WARNING)
