"""Private attributes of mmengine that the engine needs, and why."""

from __future__ import annotations

from typing import Any, TypeAlias

from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, FlexibleRunner, Runner

AnyRunner: TypeAlias = Runner | FlexibleRunner


def training_loop(runner: AnyRunner) -> BaseLoop | None:
    """The training loop or None: ``runner.train_loop`` would build one."""
    return runner._train_loop if isinstance(runner._train_loop, BaseLoop) else None


def resumes(runner: AnyRunner) -> bool:
    """Whether the runner resumes: no public attribute says so."""
    return bool(runner._resume)


def load_from(runner: AnyRunner) -> str | None:
    """The checkpoint that the config names: no public attribute has it."""
    # A FlexibleRunner's ``resume`` may be a path.
    return runner._resume if isinstance(runner._resume, str) else runner._load_from


def set_load_from(runner: AnyRunner, checkpoint: str | None) -> None:
    """Set the checkpoint to load: only the constructor takes it."""
    runner._load_from = checkpoint


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """The iterations in an optimizer step: no public attribute has them."""
    return wrapper._accumulative_counts


def randomness(runner: AnyRunner) -> dict[str, Any]:
    """The config's ``randomness``: ``runner.seed`` may be a drawn one."""
    return getattr(runner, "_randomness_cfg", {})


def uses_default_keys(hook: CheckpointHook) -> bool:
    """Whether a hook has the default ``greater_keys`` and ``less_keys``: these are private."""
    return hook.greater_keys is hook._default_greater_keys and hook.less_keys is hook._default_less_keys
