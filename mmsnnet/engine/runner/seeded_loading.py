"""Training batches whose order and augmentations follow from a run's seed and from where it stands."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mmsnnet.engine.randomness import hashed, seed_generators


@dataclass(frozen=True)
class SeededIndex:
    """An index of a data set, with the seed of the random states that its sample starts from."""

    index: Any
    seed: int


class SeededDataset(Dataset):
    """A data set that seeds the global generators for each sample, in whichever process; all else, attributes read and
    set included, is the data set's own.

    The states are left as the sample leaves them: what a collate function draws follows from the samples, too.
    """

    # torch would fetch a batch at once by the data set's own, and the samples would share one random state.
    __getitems__ = None

    def __init__(self, dataset: Dataset) -> None:
        object.__setattr__(self, "_seeded", dataset)

    @property
    def unwrapped(self) -> Dataset:
        """The data set itself."""
        return self._seeded

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, SeededIndex):
            seed_generators(index.seed)
            index = index.index
        return self._seeded[index]

    def __len__(self) -> int:
        return len(self._seeded)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_seeded":  # asked for while a copy of this is being made
            raise AttributeError(name)
        return getattr(self._seeded, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._seeded, name, value)


class SeededBatchSampler(Sampler):
    """The batches of a batch sampler, each index with the seed of its sample: a hash of the run's seed, the epoch, and
    the sample's number in the epoch over all ranks, its position in this rank's stream * ``world_size`` + ``rank``. So
    two ranks augment a batch as one process with both their shares does.

    Args:
        batch_sampler: of this rank; finite or not.
        rank, world_size: whose share of the samples it has.
        endless: go on with the next epoch where the batch sampler ends.

    Attributes:
        seed: the run's.
        epoch, skip: where the next iteration over this begins: after ``skip`` batches of the epoch or, of an endless
            one, of this epoch and those that follow it. Of these only indices are drawn; nothing is loaded.
    """

    def __init__(self, batch_sampler: Iterable[list], rank: int, world_size: int, endless: bool) -> None:
        self.batch_sampler = batch_sampler
        self.rank = rank
        self.world_size = world_size
        self.endless = endless
        self.seed = self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        epoch, skip, self.skip = self.epoch, self.skip, 0
        while True:
            if self.endless:  # otherwise it is for DistSamplerSeedHook to do
                for sampler in (self.sampler, self.batch_sampler):
                    if hasattr(sampler, "set_epoch"):
                        sampler.set_epoch(epoch)
            number = 0
            for batch in self._drawn(epoch):
                if skip:
                    skip -= 1
                else:
                    yield [SeededIndex(index, self._sample_seed(epoch, number + i)) for i, index in enumerate(batch)]
                number += len(batch)
            if not self.endless:
                return
            if not number:
                raise ValueError(
                    "the training set has no batch to give: lower train_dataloader.batch_size, or leave out drop_last"
                )
            epoch += 1

    def _drawn(self, epoch: int) -> Iterator[list]:
        """An epoch of the batch sampler. What draws from the global generators, torch's sampler its seed and mmdet's
        ``GroupMultiSourceSampler`` the group of each batch, finds them the same whatever went on in between."""
        seed_generators(hashed(self.seed, "order", epoch))
        batches = iter(self.batch_sampler)
        for number in count():
            seed_generators(hashed(self.seed, "order", epoch, number))
            if (batch := next(batches, None)) is None:
                return
            yield batch

    def _sample_seed(self, epoch: int, position: int) -> int:
        return hashed(self.seed, epoch, position * self.world_size + self.rank)

    def __len__(self) -> int:
        assert isinstance(self.batch_sampler, Sized)
        return len(self.batch_sampler)

    @property
    def sampler(self) -> Any:
        """What the batch sampler draws from, where ``DistSamplerSeedHook`` looks for it."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        return getattr(self.batch_sampler, "batch_size", None)


def seeded_loader(loader: DataLoader, rank: int, world_size: int, endless: bool) -> DataLoader:
    """A data loader with the samples of another in its order, as :class:`SeededDataset` and :class:`SeededBatchSampler`
    have them. All else is the other's, and so are its data set and samplers.

    Raises:
        TypeError: the data set has no indices, or the loader makes no batches.
        ValueError: the loader hands out batches in the order in which they get ready.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        what = "an iterable data set" if isinstance(loader.dataset, IterableDataset) else "batch_size=None"
        raise TypeError(
            f"train_dataloader with {what} has no batches of indices, from which a run could be resumed exactly: "
            "give it a map-style data set and a batch_size, or train with mmengine's own loops"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError("train_dataloader.in_order=False leaves the order of batches to chance: leave it out")
    seeded = copy.copy(loader)
    batches = SeededBatchSampler(loader.batch_sampler, rank, world_size, endless)
    # A data loader refuses to be changed once it is made, by its own __setattr__: its iterator would not notice.
    for name, value in dict(dataset=SeededDataset(loader.dataset), batch_sampler=batches, _iterator=None).items():
        object.__setattr__(seeded, name, value)
    return seeded
