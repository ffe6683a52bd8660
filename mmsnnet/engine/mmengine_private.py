"""Private names of mmengine and its toolboxes that the engine needs, each with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, FlexibleRunner, Runner

# The loops over stitches average the losses of each stitch exactly as mmengine's loops do.
from mmengine.runner.loops import _parse_losses as parse_losses  # noqa: F401
from mmengine.visualization import LocalVisBackend, Visualizer

AnyRunner: TypeAlias = Runner | FlexibleRunner


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


def set_drawn_images(hook: Any, count: int | None) -> None:
    """The counter of :func:`drawn_images` has to be set when another stitch continues."""
    hook._test_index = count


def image_folders(visualizer: Visualizer) -> list[str]:
    """The local backends write with OpenCV, which silently skips images whose folder does not exist."""
    backends = visualizer._vis_backends.values()
    return [backend.experiment._img_save_dir for backend in backends if isinstance(backend, LocalVisBackend)]


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


def channel_conversion(preprocessor: Any) -> bool | None:
    """Whether a data preprocessor reverses the channels; no public attribute says so. None if it has no such option."""
    conversion = getattr(preprocessor, "_channel_conversion", getattr(preprocessor, "channel_conversion", None))
    return None if conversion is None else bool(conversion)


def normalises(preprocessor: Any) -> bool | None:
    """Whether a data preprocessor normalises images; no public attribute says so. None if it has no such option."""
    return getattr(preprocessor, "_enable_normalize", None)


def replace_clipping(wrapper: OptimWrapper, clip: Callable[[], None]) -> None:
    """Let a wrapper clip gradients by another function.

    The wrapper does not call its public ``clip_func`` where there is no gradient.
    """
    wrapper._clip_grad = clip


def training_loop(runner: AnyRunner) -> BaseLoop | None:
    """The training loop or None: ``runner.train_loop`` would build one."""
    return runner._train_loop if isinstance(runner._train_loop, BaseLoop) else None


def validation_is_due(loop: Any, done: int) -> bool:
    """Whether a training loop of mmengine's validates after so many epochs or iterations; it has no method for it."""
    loop._decide_current_val_interval()
    end = loop.max_epochs if isinstance(loop, EpochBasedTrainLoop) else loop.max_iters
    return done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)


def resumes(runner: AnyRunner) -> bool:
    """Whether the runner resumes: no public attribute says so."""
    return bool(runner._resume)


def load_from(runner: AnyRunner) -> str | None:
    """The checkpoint that the config names: no public attribute has it."""
    # A FlexibleRunner's ``resume`` may be a path.
    return runner._resume if isinstance(runner._resume, str) else runner._load_from


def set_load_from(runner: AnyRunner, checkpoint: str | None, resume: bool | None = None) -> None:
    """Set the checkpoint to load, and whether to resume from it: only the constructor takes them."""
    runner._load_from = checkpoint
    if resume is not None:
        runner._resume = resume


def randomness(runner: AnyRunner) -> dict[str, Any]:
    """The config's ``randomness``: ``runner.seed`` may be a drawn one."""
    return getattr(runner, "_randomness_cfg", {})


def uses_default_keys(hook: CheckpointHook) -> bool:
    """Whether a hook has the default ``greater_keys`` and ``less_keys``: these are private."""
    return hook.greater_keys is hook._default_greater_keys and hook.less_keys is hook._default_less_keys
