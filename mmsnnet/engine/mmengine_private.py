"""The private names of mmengine that the engine needs, with the reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.optim import OptimWrapper
from mmengine.runner import Runner


def uses_rank_seeds(runner: Runner) -> bool:
    """Whether each rank has its own seed (``randomness.diff_rank_seed``).

    The runner has no public name for this setting.
    """
    return runner._randomness_cfg.get("diff_rank_seed", False)


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """After how many backward passes a wrapper makes a step, 1 for ``OptimWrapperDict``.

    The number has no public name.
    """
    return getattr(wrapper, "_accumulative_counts", 1)


@contextmanager
def sum_passes(wrapper: OptimWrapper, passes: int) -> Iterator[None]:
    """Inside, an iteration consists of several passes, whose gradients are summed.

    mmengine takes the mean over passes that it accumulates, and fixes their number at construction.
    """
    counts, scale_loss = wrapper._accumulative_counts, wrapper.scale_loss
    wrapper._accumulative_counts = counts * passes
    wrapper.scale_loss = lambda loss: scale_loss(loss * passes)
    try:
        yield
    finally:
        wrapper._accumulative_counts = counts
        del wrapper.scale_loss


def replace_clipping(wrapper: OptimWrapper, clip: Callable[[], None]) -> None:
    """Let a wrapper clip gradients by another function.

    The wrapper does not call its public ``clip_func`` where there is no gradient.
    """
    wrapper._clip_grad = clip
