"""Private names of mmengine and its toolboxes that the engine needs, each with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

# The loops over stitches average the losses of each stitch exactly as mmengine's loops do.
from mmengine.runner.loops import _parse_losses as parse_losses  # noqa: F401
from mmengine.visualization import LocalVisBackend, Visualizer


def coco_annotations(metric: BaseMetric) -> Any | None:
    """mmdet's metrics have no public name for the annotations that they read, which may be empty."""
    return getattr(metric, "_coco_api", None)


def visualizer_of(hook: Hook) -> Visualizer | None:
    """The toolboxes' visualization hooks draw with a visualizer whose paths depend on the stitch."""
    visualizer = getattr(hook, "_visualizer", None)
    return visualizer if isinstance(visualizer, Visualizer) else None


def drawn_images(hook: Hook) -> int | None:
    """The toolboxes' visualization hooks number their pictures by a counter, and each stitch needs its own count."""
    count = getattr(hook, "_test_index", None)
    return count if isinstance(count, int) else None


def set_drawn_images(hook: Hook, count: int) -> None:
    """The counter of :func:`drawn_images` has to be set when another stitch continues."""
    hook._test_index = count


def image_folders(visualizer: Visualizer) -> list[str]:
    """OpenCV, which the local backends write images with, silently writes nothing into a folder that does not exist."""
    backends = visualizer._vis_backends.values()
    return [backend.experiment._img_save_dir for backend in backends if isinstance(backend, LocalVisBackend)]


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
