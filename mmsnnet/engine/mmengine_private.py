"""The private attributes of mmengine that the engine needs: one function each, and the reason."""

from __future__ import annotations

from typing import Any, TypeAlias

from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmengine.runner import BaseLoop, FlexibleRunner, Runner

AnyRunner: TypeAlias = Runner | FlexibleRunner


def training_loop(runner: AnyRunner) -> BaseLoop | None:
    """The training loop, None where the runner does not train: ``runner.train_loop`` would build one."""
    return runner._train_loop if isinstance(runner._train_loop, BaseLoop) else None


def resumes(runner: AnyRunner) -> bool:
    """Whether the runner resumes: no public attribute says so."""
    return bool(runner._resume)


def load_from(runner: AnyRunner) -> str | None:
    """The checkpoint that the config names, in a FlexibleRunner perhaps by ``resume``: no public attribute has it."""
    return runner._resume if isinstance(runner._resume, str) else runner._load_from


def set_load_from(runner: AnyRunner, checkpoint: str | None) -> None:
    """Set the checkpoint to load after the runner is built: its constructor alone takes it."""
    runner._load_from = checkpoint


def accumulative_counts(wrapper: OptimWrapper) -> int:
    """The number of iterations whose gradients an optimizer step adds up: no public attribute has it."""
    return wrapper._accumulative_counts


def randomness(runner: AnyRunner) -> dict[str, Any]:
    """The config's ``randomness`` of a Runner: ``runner.seed`` has a random seed where the config has none."""
    return getattr(runner, "_randomness_cfg", {})


def uses_default_keys(hook: CheckpointHook) -> bool:
    """Whether a CheckpointHook was given neither ``greater_keys`` nor ``less_keys``: mmengine keeps the defaults."""
    return hook.greater_keys is hook._default_greater_keys and hook.less_keys is hook._default_less_keys
