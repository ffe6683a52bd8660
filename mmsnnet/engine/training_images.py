"""A sample of the training images, as a function of a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dataset import pseudo_collate
from torch import nn

from mmsnnet.engine.randomness import kept_generators, seed_generators
from mmsnnet.models.model_weights import unwrapped_model


def sample_indices(length: int, number: int, seed: int) -> list[int]:
    """The indices of ``number`` different images, or of all, out of ``length``."""
    return np.random.default_rng(seed).permutation(length)[:number].tolist()


def sample_batches(dataset: Any, model: nn.Module, batches: Sequence[Sequence[int]], seed: int) -> Iterator[Any]:
    """Yield batches of images, augmented and preprocessed as in training; random states are restored afterwards.

    Args:
        dataset: of training.
        model: with or without wrappers; its data preprocessor prepares the batches.
        batches: the indices of each batch.
        seed: of the augmentation, which for one image is the same in every batch.
    """
    preprocess = unwrapped_model(model).get_submodule("data_preprocessor")
    with kept_generators():
        for indices in batches:
            samples = []
            for index in indices:
                seed_generators(seed + index)
                samples.append(dataset[index])
            yield preprocess(pseudo_collate(samples), training=True)
