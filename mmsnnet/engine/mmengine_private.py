"""The private names of mmengine that the engine needs, each in one function that says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner


def uses_rank_seeds(runner: Runner) -> bool:
    """Whether each rank has a seed (``randomness.diff_rank_seed``): the runner keeps this setting nowhere else."""
    return runner._randomness_cfg.get("diff_rank_seed", False)


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """After how many backward passes a wrapper makes a step; it has no public attribute. 1 for ``OptimWrapperDict``."""
    return getattr(wrapper, "_accumulative_counts", 1)


@contextmanager
def accumulate_more(wrapper: OptimWrapper, factor: int) -> Iterator[None]:
    """Inside, steps need ``factor`` times as many backward passes; only the constructor takes that number."""
    counts = wrapper._accumulative_counts
    wrapper._accumulative_counts = counts * factor
    try:
        yield
    finally:
        wrapper._accumulative_counts = counts


def replace_clipping(wrapper: OptimWrapper, clip: Callable[[], None]) -> None:
    """Let a wrapper clip gradients by another function: its public ``clip_func`` is not called without gradients."""
    wrapper._clip_grad = clip
