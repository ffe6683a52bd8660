"""Repeated augmentation: copies of an image side by side over the ranks, as many samples as the data set has."""

from collections import Counter
from typing import Any

import pytest
from mmengine.dataset import sampler as mmengine_samplers
from mmengine.registry import DATA_SAMPLERS
from timm.data.distributed_sampler import RepeatAugSampler as TimmSampler

from mmsnnet.datasets.samplers import RepeatAugSampler
from mmsnnet.errors import SettingError


def ranks(size: int, world_size: int, epoch: int = 0, seed: int = 5, **settings: Any) -> list[list[int]]:
    """What each rank draws in an epoch."""
    drawn = []
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mmengine_samplers, "get_dist_info", lambda rank=rank: (rank, world_size))
            sampler = RepeatAugSampler(range(size), seed=seed, **settings)
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
        assert len(drawn[-1]) == len(sampler)
    return drawn


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [1, 7, 24])
def test_ranks_share_copies_of_a_part_of_the_images(size: int, world_size: int, repeats: int) -> None:
    shares = ranks(size, world_size, num_repeats=repeats)
    stream = [index for step in zip(*shares, strict=True) for index in step]
    assert len(stream) == -(-size // world_size) * world_size  # the data set's size, rounded up for the ranks
    copies = [stream[start : start + repeats] for start in range(0, len(stream), repeats)]
    assert all(len(set(group)) == 1 for group in copies)
    counts = Counter(group[0] for group in copies)
    assert len(counts) == min(size, len(copies)) and set(stream) <= set(range(size))


def test_an_epoch_is_timms_of_the_same_order() -> None:
    """Where timm's sampler draws the same permutation, at sizes at which it rounds nothing."""
    for rank, drawn in enumerate(ranks(512, 4, seed=0, epoch=3)):
        theirs = TimmSampler(range(512), num_replicas=4, rank=rank)
        theirs.set_epoch(3)
        assert drawn == list(theirs)


def test_order_follows_from_seed_and_epoch() -> None:
    assert ranks(24, 2) == ranks(24, 2)
    assert len({str(ranks(24, 2, epoch, seed)) for epoch in (0, 1) for seed in (5, 7)}) == 4


def test_a_config_builds_it() -> None:
    sampler = DATA_SAMPLERS.build(dict(type="mmsnnet.RepeatAugSampler", dataset=range(4), seed=1))
    assert (sampler.num_repeats, sampler.seed) == (3, 1)


@pytest.mark.parametrize("repeats", [0, -1, 2.5, "3"])
def test_a_number_of_copies_that_cannot_be(repeats: Any) -> None:
    with pytest.raises(SettingError, match="num_repeats must be a whole number above 0"):
        RepeatAugSampler(range(4), num_repeats=repeats)
