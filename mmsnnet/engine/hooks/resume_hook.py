from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import EMAHook, Hook

from mmsnnet.engine.latest_checkpoint import loaded_checkpoint
from mmsnnet.engine.mmengine_private import AnyRunner, resumes, training_loop
from mmsnnet.engine.resuming.difference import Difference, Verdict, noted
from mmsnnet.engine.resuming.optimizers import compare_optimizers, lay_out_states, named_wrappers
from mmsnnet.engine.resuming.records import (
    RECORD,
    check_progress,
    compare_classes,
    compare_records,
    compare_seed,
    describe_run,
)
from mmsnnet.engine.resuming.schedules import compare_progress, compare_schedules, drop_functions
from mmsnnet.engine.resuming.settings import compare_settings
from mmsnnet.engine.resuming.weights import compare_averages, compare_weights, summarize_partial_load
from mmsnnet.errors import SettingError
from mmsnnet.files.reading import join_names, nonfinite_names
from mmsnnet.registry import HOOKS


@HOOKS.register_module()
class ResumeHook(Hook):
    """Compare a checkpoint with the run that goes on from it.

    Our training loops add the hook to their runner; with mmengine's own loops, add it to ``custom_hooks``.

    - ``--resume``: refuses a checkpoint of weights alone, and one whose state does not fit the run. Each other
      difference is one warning that says whether the checkpoint's value is used or the config's. A run without a
      difference logs nothing.
    - ``load_from`` alone: refuses a checkpoint without any fitting tensor; one warning lists what is not loaded.

    Raises:
        SettingError: the checkpoint does not fit the run; the message lists all differences that keep it from fitting.
    """

    # Before EMAHook loads its averages: torch's message for another shape does not name the setting.
    priority = "VERY_HIGH"

    _record: dict[str, Any] | None = None

    def before_run(self, runner: AnyRunner) -> None:
        # Later, a loop that trains several stitches in a step changes the count of accumulated gradients.
        if training_loop(runner) is not None:
            self._record = describe_run(runner)

    def before_save_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        checkpoint["meta"][RECORD] = self._record or describe_run(runner)
        drop_functions(checkpoint.get("param_schedulers"))

    def after_load_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        if training_loop(runner) is None:
            return
        source = loaded_checkpoint(runner)
        if bad := nonfinite_names(checkpoint.get("state_dict", {})):
            raise SettingError(f"checkpoint {source!r} has NaN or infinity in {join_names(bad, 3)}: choose another one")
        if not resumes(runner):
            if summary := summarize_partial_load(runner.model, checkpoint, source):
                runner.logger.warning(summary)
            return
        hub = checkpoint.get("message_hub")
        if not isinstance(hub, dict) or not {"epoch", "iter"} <= checkpoint.get("meta", {}).keys():
            raise SettingError(
                f"checkpoint {source!r} has weights alone, without the progress and the optimizer state of its run: "
                "leave out --resume, or load_from to go on with the latest checkpoint of the work folder"
            )
        try:
            differences = list(_differences(runner, checkpoint, source))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise SettingError(
                f"checkpoint {source!r} has records that no run writes ({type(error).__name__}: {error}): choose "
                "another one"
            ) from error
        new_run = f"load_from={source!r} without --resume starts a new run from its weights"
        if refusals := [difference.text for difference in differences if difference.verdict is Verdict.REFUSED]:
            raise SettingError(
                f"checkpoint {source!r} cannot be resumed with this config. {'; '.join(refusals)}. Set the config as "
                f"it was, or: {new_run}"
            )
        for difference in differences:
            runner.logger.warning(difference.text)
        if any(difference.verdict is Verdict.KEPT for difference in differences):
            runner.logger.warning(f"To train with the config's values instead: {new_run}")
        for setting, wrapper in named_wrappers(runner.optim_wrapper).items():
            state = checkpoint["optimizer"]
            lay_out_states(wrapper.optimizer, state if setting == "optim_wrapper" else state[setting.partition(".")[2]])
        if "ema_state_dict" in checkpoint and not _has_averages(runner):
            _restore_trained_weights(checkpoint)


def _differences(runner: AnyRunner, checkpoint: dict[str, Any], source: str) -> Iterator[Difference]:
    meta = checkpoint["meta"]
    record = meta.get(RECORD, {})
    if wrong := list(check_progress(runner, checkpoint)):  # what follows computes with it
        yield from wrong
        return
    weights = list(compare_weights(runner.model, checkpoint, source))
    yield from weights
    yield from compare_classes(runner, meta)
    if weights:  # the optimizer's state differs in the same way
        return
    if averaged := checkpoint.get("ema_state_dict"):
        if _has_averages(runner):
            yield from compare_averages(runner.model, averaged)
        else:
            yield noted(
                "custom_hooks: the checkpoint has averaged weights, the config has no EMAHook: goes on with the "
                "trained weights, without averages"
            )
    optimizers = compare_optimizers(
        runner.model, runner.optim_wrapper, checkpoint.get("optimizer"), record.get("optimizer", {}), meta["iter"]
    )
    schedules = compare_schedules(
        runner.param_schedulers, checkpoint.get("param_schedulers"), record.get("param_scheduler", {})
    )
    state = [*optimizers, *schedules]
    yield from state
    if not any(difference.verdict is Verdict.REFUSED for difference in state):
        yield from compare_progress(runner, checkpoint)
    yield from compare_seed(runner, meta)
    yield from compare_records(runner, record.get("facts", {}))
    yield from compare_settings(runner.cfg, record.get("settings", {}))


def _has_averages(runner: AnyRunner) -> bool:
    return any(isinstance(hook, EMAHook) for hook in runner.hooks)


def _restore_trained_weights(checkpoint: dict[str, Any]) -> None:
    """Undo ``EMAHook``, which saves its averages in place of trained weights."""
    for name, value in checkpoint["ema_state_dict"].items():
        if name.startswith("module."):
            checkpoint["state_dict"][name.removeprefix("module.")] = value
