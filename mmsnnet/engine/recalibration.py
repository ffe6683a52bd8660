"""Recalibrate batch norms over images of a config's training set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import nn

from mmsnnet.engine.training_images import sample_batches, sample_indices
from mmsnnet.errors import SettingError
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.models.recalibration import NormStatistics, batch_norms, recalibrate
from mmsnnet.stitching import Stitch

SEED = 0  # of the sample and its augmentation


def check_recalibration(config: Config, model: nn.Module, num_images: int) -> None:
    """Check that a model can be recalibrated, before any data is read.

    Raises:
        SettingError: the model has no batch norms, the config no training set, or ``num_images`` is no positive number.
    """
    if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < 1:
        raise SettingError(f"recalibrate is a number of training images, at least 1; got {num_images!r}")
    batch_norms(model)
    if not config.get("train_dataloader"):
        raise SettingError("recalibrate takes training images, and the config has no train_dataloader: add one")


def recalibrate_on_training_images(
    config: Config, model: nn.Module, stitches: Sequence[Stitch], num_images: int, prefix_reuse: bool = True
) -> dict[Stitch, NormStatistics]:
    """The statistics of batch norms on each stitch alone; see :func:`mmsnnet.models.recalibration.recalibrate`.

    The images are a sample of the training set that depends on ``num_images`` alone, and have the augmentation of
    training, but are not mixed. Batches are as large as in training. Every rank runs all of them, so all ranks get the
    statistics that one process gets.

    Args:
        config: with ``train_dataloader``.
        model: with or without wrappers, with weights.
        stitches, prefix_reuse: as of ``recalibrate``.
        num_images: in total.

    Raises:
        SettingError: as :func:`check_recalibration`; the training set has fewer images.
    """
    check_recalibration(config, model, num_images)
    start = time.monotonic()
    dataset = _training_set(config.train_dataloader.dataset)
    if num_images > len(dataset):
        raise SettingError(f"recalibrate={num_images}, but the training set has {len(dataset)} images: take fewer")
    # Of equal size, because a norm would normalise the rest of a division with the statistics of a few images.
    number = -(-num_images // config.train_dataloader.get("batch_size", 1))
    indices = [part.tolist() for part in np.array_split(sample_indices(len(dataset), num_images, SEED), number)]
    batches = sample_batches(dataset, model, indices, SEED)
    statistics = recalibrate(unwrapped_model(model), stitches, batches, prefix_reuse)
    seconds = time.monotonic() - start
    print_log(
        f"Recalibrated the batch norms for {len(stitches)} stitch(es) over {num_images} images in {seconds:.1f} s",
        "current",
    )
    return statistics


def _training_set(dataset: Any) -> Any:
    built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    if hasattr(built, "full_init"):
        built.full_init()
    return built
