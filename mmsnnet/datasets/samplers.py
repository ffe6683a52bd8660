"""Samplers that mmengine lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sized

import torch
from mmengine.dataset import DefaultSampler

from mmsnnet.errors import SettingError
from mmsnnet.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class RepeatAugSampler(DefaultSampler):
    """Repeated augmentation (arXiv 1901.09335), as in DeiT: several augmented copies of an image in one batch.

    An epoch has as many samples as the data set, so it reads a part of 1 / ``num_repeats`` of the images. The copies of
    an image are neighbours in the order over all ranks, so ranks get different copies of one image.

    Args:
        dataset: the data set.
        num_repeats: the number of copies.
        seed: as of mmengine's ``DefaultSampler``; the runner sets it.

    Raises:
        SettingError: ``num_repeats`` is no whole number above 0.
    """

    def __init__(self, dataset: Sized, num_repeats: int = 3, seed: int | None = None) -> None:
        if not isinstance(num_repeats, int) or num_repeats < 1:
            raise SettingError(f"RepeatAugSampler's num_repeats must be a whole number above 0, got {num_repeats!r}")
        super().__init__(dataset, seed=seed)
        self.num_repeats = num_repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator()
        generator.manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()
        places = range(self.rank, self.total_size, self.world_size)
        return iter([order[place // self.num_repeats % len(order)] for place in places])
