"""Training batches: order and augmentations follow from the seed and the place in the run, and from nothing else."""

import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dataset import sampler as mmengine_samplers
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from mmsnnet.datasets.samplers import RepeatAugSampler
from mmsnnet.engine.runner.seeded_loading import SeededBatch, seeded_loader

SIZE = 11  # no multiple of a batch, nor of the ranks


class Noisy(Dataset):
    """Samples that draw from each of the three global generators; counts what was loaded."""

    def __init__(self) -> None:
        self.metainfo = dict(name="noisy")
        self.pipeline = "stock"
        self.dataset = "what it repeats"  # as mmengine's RepeatDataset has it
        self.loaded: Counter[int] = Counter()

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:
        self.loaded[index] += 1
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))

    def get_data_info(self, index: int) -> dict[str, int]:
        return dict(width=1 + index % 3, height=2)


class FetchesBatches(Noisy):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        numbers = [indices[position] for position in range(len(indices))]  # as a Subset or StackDataset of torch's does
        return [self[index] for index in numbers]


class DrawsAsItGoes(Sampler):
    """Draws each index from a global generator, as mmdet's ``GroupMultiSourceSampler`` draws the groups of batches."""

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[int]:
        while True:
            yield int(np.random.randint(SIZE))


Samples = list[list[tuple[int, float, float, float]]]


def as_it_is(samples: list[Any]) -> list[Any]:
    return samples


def make_loader(
    sampler: type[Sampler] = InfiniteSampler,
    batch_size: int = 2,
    rank: int = 0,
    world_size: int = 1,
    endless: bool = True,
    batch_sampler: Callable[..., Any] | None = None,
    dataset: Dataset | None = None,
    drop_last: bool = False,
    **kwargs: Any,
) -> DataLoader:
    dataset = Noisy() if dataset is None else dataset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mmengine_samplers, "get_dist_info", lambda: (rank, world_size))
        drawn = sampler(dataset) if sampler is RandomSampler else sampler(dataset, seed=5)
    batches = (batch_sampler or BatchSampler)(drawn, batch_size, drop_last)
    loader = DataLoader(dataset, batch_sampler=batches, **{"collate_fn": as_it_is, **kwargs})
    seeded, batch_sampler = seeded_loader(loader, rank, world_size, endless)
    batch_sampler.seed = 7
    return seeded


def batches(number: int, epoch: int = 0, skip: int = 0, **kwargs: Any) -> Samples:
    loader = make_loader(**kwargs)
    loader.batch_sampler.epoch, loader.batch_sampler.skip = epoch, skip
    iterator = iter(loader)
    found = list(islice(iterator, number))
    if loader.num_workers:  # left to the garbage collector it takes 5 s for each worker
        iterator._shutdown_workers()
    return found


def aspect_ratio(sampler: Sampler, batch_size: int, drop_last: bool) -> BatchSampler:
    from mmdet.datasets.samplers import AspectRatioBatchSampler

    return AspectRatioBatchSampler(sampler, batch_size, drop_last)


def indices(samples: Samples) -> list[list[int]]:
    return [[index for index, *_ in batch] for batch in samples]


@pytest.mark.parametrize("sampler", [InfiniteSampler, DefaultSampler, RepeatAugSampler])
def test_two_ranks_draw_what_one_process_with_the_doubled_batch_draws(sampler: type[Sampler]) -> None:
    one = batches(12, sampler=sampler, batch_size=6, drop_last=sampler is not InfiniteSampler)
    shares = [
        batches(12, sampler=sampler, batch_size=3, rank=rank, world_size=2, drop_last=sampler is not InfiniteSampler)
        for rank in range(2)
    ]
    # Of a finite sampler an epoch's last samples are those that fill up the ranks' shares.
    whole = 12 if sampler is InfiniteSampler else 1
    for together, first, second in list(zip(one, *shares, strict=True))[:whole]:
        assert [sample for pair in zip(first, second, strict=True) for sample in pair] == together
    assert len({noise for share in shares for batch in share for _, noise, *_ in batch}) == 2 * sum(map(len, shares[0]))


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("sampler", [InfiniteSampler, DefaultSampler, RepeatAugSampler])
def test_the_number_of_workers_changes_nothing(workers: int, sampler: type[Sampler]) -> None:
    alone = batches(8, sampler=sampler, skip=3)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    assert batches(8, sampler=sampler, skip=3, num_workers=workers, persistent_workers=True) == alone


@pytest.mark.parametrize("skip", [0, 1, 5, 6, 14])
@pytest.mark.parametrize(
    ("sampler", "batch_sampler", "drop_last"),
    [
        (InfiniteSampler, None, False),
        (DefaultSampler, None, False),
        (DefaultSampler, None, True),
        (RepeatAugSampler, None, True),
        (RandomSampler, None, False),
        (DrawsAsItGoes, None, False),
        (InfiniteSampler, aspect_ratio, False),
        (DefaultSampler, aspect_ratio, False),
        (DefaultSampler, aspect_ratio, True),
    ],
)
def test_what_is_skipped_is_drawn_and_not_loaded(
    skip: int, sampler: type[Sampler], batch_sampler: Any, drop_last: bool
) -> None:
    kwargs = dict(sampler=sampler, batch_sampler=batch_sampler, drop_last=drop_last)
    whole = batches(20, **kwargs)
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    dataset = Noisy()
    rest = batches(20 - skip, skip=skip, dataset=dataset, **kwargs)
    assert rest == whole[skip:]
    assert dataset.loaded == Counter(index for batch in indices(rest) for index in batch)


@pytest.mark.parametrize("batch_sampler", [None, aspect_ratio])
def test_an_epoch_goes_on_in_its_middle(batch_sampler: Any) -> None:
    for epoch in range(3):
        kwargs = dict(sampler=DefaultSampler, batch_sampler=batch_sampler, endless=False, epoch=epoch)
        whole = batches(99, **kwargs)
        assert len(whole) == 6
        assert batches(99, skip=4, **kwargs) == whole[4:]
        assert batches(99, skip=6, **kwargs) == []


def test_an_endless_loader_goes_through_the_epochs_of_a_finite_sampler() -> None:
    dataset = Noisy()
    sampler = DefaultSampler(dataset, seed=5)
    expected = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(BatchSampler(sampler, 2, False))
    drawn = batches(18, sampler=DefaultSampler)
    assert indices(drawn) == expected
    assert indices(drawn)[:6] != indices(drawn)[6:12]
    noise = [value for batch in drawn for _, *values in batch for value in values]
    assert len(set(noise)) == len(noise)  # a sample is augmented anew in each epoch


def test_the_order_is_that_of_the_sampler() -> None:
    expected = list(islice(BatchSampler(InfiniteSampler(Noisy(), seed=5), 2, False), 30))
    assert indices(batches(30)) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_collate_function_draws_follows_from_the_samples(workers: int) -> None:
    assert batches(6, collate_fn=draws, num_workers=workers) == batches(6, collate_fn=draws)
    assert len(set(batches(6, collate_fn=draws, num_workers=workers))) == 6


def draws(samples: list[Any]) -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_data_set_that_fetches_whole_batches_is_seeded_for_each_sample() -> None:
    assert batches(6, dataset=FetchesBatches()) == batches(6)


def test_a_batch_reaches_a_worker_without_a_draw() -> None:
    """torch pickles batches in a thread of the main process, whose generators that must not touch."""
    state = torch.get_rng_state()
    batch = pickle.loads(pickle.dumps(SeededBatch([3, 4], [1, 2])))
    assert torch.equal(torch.get_rng_state(), state)
    dataset = Noisy()
    samples = [dataset[index] for index in batch]
    assert [index for index, *_ in samples] == [3, 4]
    assert samples == [dataset[index] for index in batch]
    assert samples[1] == next(dataset[index] for index in SeededBatch([4], [2]))


@pytest.mark.parametrize("persistent", [False, True])
def test_pipelines_are_switched_by_mmdets_hook(persistent: bool) -> None:
    from mmdet.engine.hooks import PipelineSwitchHook

    class Piped(Noisy):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index) if self.pipeline == "stock" else self.pipeline({})

    kwargs = dict(num_workers=1, persistent_workers=True) if persistent else {}
    loader = make_loader(sampler=DefaultSampler, endless=False, dataset=Piped(), **kwargs)
    hook = PipelineSwitchHook(switch_epoch=1, switch_pipeline=[lambda results: "switched"])
    seen = []
    for epoch in range(2):
        hook.before_train_epoch(
            SimpleNamespace(epoch=epoch, train_dataloader=loader, logger=SimpleNamespace(info=lambda text: None))
        )
        seen.append([sample for batch in loader for sample in batch])
    assert "switched" not in seen[0] and set(seen[1]) == {"switched"}


def test_settings_and_data_set_are_kept_and_the_first_loader_is_left_alone() -> None:
    dataset = Noisy()
    loader = DataLoader(dataset, batch_size=3, num_workers=2, prefetch_factor=5, timeout=9, collate_fn=as_it_is)
    seeded, batch_sampler = seeded_loader(loader, 0, 1, endless=False)
    for name in ("dataset", "batch_size", "num_workers", "prefetch_factor", "timeout", "collate_fn", "sampler"):
        assert getattr(seeded, name) is getattr(loader, name)
    assert loader.dataset is dataset and isinstance(loader.batch_sampler, BatchSampler)
    assert len(seeded) == len(loader) == 4
    assert seeded.batch_sampler is batch_sampler and batch_sampler.batch_size == 3
    with pytest.raises(ValueError, match="should not be set"):
        seeded.dataset = dataset


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(range(9))


@pytest.mark.parametrize(
    ("dataset", "kwargs", "message"),
    [
        (Endless(), {}, "iterable data set"),
        (Noisy(), dict(batch_size=None), "batch_size=None"),
        (Noisy(), dict(num_workers=1, in_order=False), "in_order"),
    ],
)
def test_loaders_whose_order_is_not_known(dataset: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        seeded_loader(DataLoader(dataset, **kwargs), 0, 1, endless=True)


def test_a_set_without_a_batch_is_an_error_and_no_endless_loop() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        batches(1, sampler=DefaultSampler, batch_size=SIZE + 1, drop_last=True)
