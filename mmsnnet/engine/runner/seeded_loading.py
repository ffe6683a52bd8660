"""Training batches as a function of the seed and the place in the run."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mmsnnet.engine.randomness import hashed, seed_generators


@dataclass(frozen=True)
class SeededBatch:
    """The indices of a batch, with a seed for each sample.

    torch loads a batch by ``[dataset[index] for index in batch]``, in a worker or in the main process. Iterating seeds
    the global generators right before each sample, so a data set needs no wrapper. The generators stay as the last
    sample leaves them, so that the collate function's draws follow from the samples too.
    """

    indices: Sequence[Any]
    seeds: Sequence[int]

    def __iter__(self) -> Iterator[Any]:
        for index, seed in zip(self.indices, self.seeds, strict=True):
            seed_generators(seed)
            yield index


class SeededBatchSampler(Sampler):
    """The batches of a batch sampler, with a seed for each sample.

    The seed is a hash of the run's seed, the epoch, and the sample's number in the epoch over all ranks, which is its
    position in this rank's stream * ``world_size`` + ``rank``. So two ranks augment a batch as one process augments
    the batch of both.

    Args:
        batch_sampler: this rank's; finite or not.
        rank, world_size: this rank and the number of ranks.
        endless: continue with the next epoch where the batch sampler ends.

    Attributes:
        seed: the run's.
        epoch, skip: the next iteration over this starts after ``skip`` batches of the epoch; an endless one may skip
            into later epochs. It draws the indices of skipped batches, but nothing loads them.
    """

    def __init__(self, batch_sampler: Iterable[list], rank: int, world_size: int, endless: bool) -> None:
        self.batch_sampler = batch_sampler
        self.rank = rank
        self.world_size = world_size
        self.endless = endless
        self.seed = self.epoch = self.skip = 0

    def __iter__(self) -> Iterator[SeededBatch]:
        epoch, skip, self.skip = self.epoch, self.skip, 0
        while True:
            if self.endless:  # in a loop over epochs, DistSamplerSeedHook does it
                for sampler in (self.sampler, self.batch_sampler):
                    if hasattr(sampler, "set_epoch"):
                        sampler.set_epoch(epoch)
            position = 0
            for indices in self._batches_of(epoch):
                if skip:
                    skip -= 1
                else:
                    numbers = [(position + i) * self.world_size + self.rank for i in range(len(indices))]
                    yield SeededBatch(indices, [hashed(self.seed, epoch, number) for number in numbers])
                position += len(indices)
            if not self.endless:
                return
            if not position:
                raise ValueError(
                    "the training set is smaller than one batch: lower train_dataloader.batch_size, or omit drop_last"
                )
            epoch += 1

    def _batches_of(self, epoch: int) -> Iterator[list]:
        """The batches of an epoch.

        Some samplers draw from the global generators: torch's its seed, mmdet's ``GroupMultiSourceSampler`` the group
        of each batch. Seeding before each batch makes them independent of what runs between two batches.
        """
        seed_generators(hashed(self.seed, "order", epoch))
        batches = iter(self.batch_sampler)
        for number in count():
            seed_generators(hashed(self.seed, "order", epoch, number))
            if (batch := next(batches, None)) is None:
                return
            yield batch

    def __len__(self) -> int:
        assert isinstance(self.batch_sampler, Sized)
        return len(self.batch_sampler)

    @property
    def sampler(self) -> Any:
        """The batch sampler's sampler; ``DistSamplerSeedHook`` looks for it under this name."""
        return getattr(self.batch_sampler, "sampler", None)

    @property
    def batch_size(self) -> int | None:
        return getattr(self.batch_sampler, "batch_size", None)


class _OneByOne(Dataset):
    """A data set without its ``__getitems__``, which would load all samples of a batch from one random state.

    Attributes are those of the data set itself.
    """

    __getitems__ = None

    def __init__(self, dataset: Dataset) -> None:
        object.__setattr__(self, "_dataset", dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index]

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_dataset":  # a copy asks for them before it has any
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)


def seeded_loader(
    loader: DataLoader, rank: int, world_size: int, endless: bool
) -> tuple[DataLoader, SeededBatchSampler]:
    """A copy of a data loader with seeded samples in the same order, and its batch sampler.

    Raises:
        TypeError: the data set has no indices, or the loader makes no batches.
        ValueError: the loader returns batches in the order in which they get ready.
    """
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        setting = "an iterable data set" if isinstance(loader.dataset, IterableDataset) else "batch_size=None"
        raise TypeError(
            f"train_dataloader with {setting} has no batches of indices, so a run could not be resumed exactly: use "
            "a map-style data set and a batch_size, or train with mmengine's own loops"
        )
    if not getattr(loader, "in_order", True):
        raise ValueError("train_dataloader.in_order=False leaves the order of batches to chance: leave it out")
    seeded = copy.copy(loader)
    batches = SeededBatchSampler(loader.batch_sampler, rank, world_size, endless)
    dataset = _OneByOne(loader.dataset) if hasattr(loader.dataset, "__getitems__") else loader.dataset
    # Past the loader's own __setattr__, which refuses changes because an iterator would not notice them: there is none.
    for name, value in dict(dataset=dataset, batch_sampler=batches, _iterator=None).items():
        object.__setattr__(seeded, name, value)
    return seeded, batches
