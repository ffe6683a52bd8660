from __future__ import annotations

import errno
import os
import re
import shutil
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.hooks import EMAHook
from torch import nn
from torch.optim import SGD

from mmsnnet.engine.hooks.best_metric_hook import BestMetricHook
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.latest_checkpoint import (
    LAST_CHECKPOINT,
    checkpoint_folder,
    choose_checkpoint,
    latest_checkpoint,
    name_pattern,
)
from mmsnnet.engine.mmengine_private import AnyRunner, resumes, training_loop
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.sharding import parameter_shapes
from mmsnnet.files.locking import locked
from mmsnnet.files.writing import (
    OutputError,
    check_output,
    output_errors,
    remove_path,
    rename_atomically,
    write_atomically,
)
from mmsnnet.registry import HOOKS

OPTIONS = "--work-dir or default_hooks.checkpoint.out_dir"


@HOOKS.register_module()
class AtomicCheckpointHook(BestMetricHook):
    """mmengine's ``CheckpointHook`` that leaves a complete checkpoint whenever a run ends.

    A checkpoint is written in three steps: the runner writes it under a temporary name, a rename gives it its name, and
    ``last_checkpoint`` names it. Only then are the checkpoints beyond ``max_keep_ckpts``, and the former best one,
    deleted. So there must be room for one more. The hook deletes only names that it gives, in its own folder, whatever
    a resumed checkpoint says.

    A rename works alike for ``Runner`` and for the strategies of ``FlexibleRunner``, which ignore ``backend_args``.
    Storage that is not local is written to as mmengine does.

    Before training, the hook checks that the folder can be written to and has room, and what :class:`BestMetricHook`
    checks. It locks the folder until the run ends, so that two runs cannot mix their checkpoints. If a run resumes
    without ``load_from``, it chooses the checkpoint (:func:`mmsnnet.engine.latest_checkpoint.choose_checkpoint`).
    Before each checkpoint, it calls ``before_checkpoint(runner)`` of the other hooks on all ranks.

    Args:
        args, kwargs: as of mmengine's ``CheckpointHook``, but for ``save_best``: see :class:`BestMetricHook`.

    Raises:
        SettingError: before training: no metric has the monitored name, or the validation set has no labels.
        LockedError: before training: another run trains in the folder.
        OutputError: before training: the folder cannot be written to, or has no room; in training: a checkpoint cannot
            be written. The message names the last complete one. An error of one rank ends all ranks.
    """

    # Epoch and iteration of the checkpoint that is being written.
    _progress: Mapping[str, int] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lock = ExitStack()

    def before_run(self, runner: AnyRunner) -> None:
        if training_loop(runner) is None:
            return
        with fail_together():
            self.check_validation(runner)
            if is_main_process():
                self._check_folder(runner)
        choose_checkpoint(runner)

    def after_run(self, runner: AnyRunner) -> None:
        self._lock.close()

    def after_load_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        if not _has_resume_hook(runner):
            ResumeHook().after_load_checkpoint(runner, checkpoint)

    def before_train(self, runner: AnyRunner) -> None:
        hub = runner.message_hub
        recorded = hub.runtime_info.get("keep_ckpt_ids")
        kept = [step for step in recorded if type(step) is int and step >= 0] if isinstance(recorded, list) else []
        if self.max_keep_ckpts > 0:
            # mmengine would delete the rest at once. Here the next checkpoint is written first.
            hub.update_info("keep_ckpt_ids", kept[-self.max_keep_ckpts :])
        super().before_train(runner)
        self.keep_ckpt_ids = deque(kept)
        # Without one, a new best checkpoint would not be followed by a regular one, which holds its score.
        if isinstance(last := hub.get_info("last_ckpt", None), str):
            self.last_ckpt = self.file_backend.join_path(self.out_dir, os.path.basename(last))
        for metric in self.key_indicators if self.save_best else ():
            if (recorded_path := self.best_checkpoint(metric)) is not None:
                path = self._path_in_folder(metric, recorded_path)
                self.set_best_checkpoint(runner, metric, path)
                if path is None:  # the best by another metric, perhaps, whose value does not compare
                    hub.pop_info(f"best_score{self.suffix(metric)}", None)

    def before_save_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        # FlexibleRunner adds one to epoch or iteration, which is wrong for a checkpoint after an evaluation.
        checkpoint["meta"].update(self._progress)
        if not _has_resume_hook(runner):
            ResumeHook().before_save_checkpoint(runner, checkpoint)

    def _save_checkpoint(self, runner: AnyRunner) -> None:
        runner.call_hook("before_checkpoint")
        super()._save_checkpoint(runner)

    def _save_best_checkpoint(self, runner: AnyRunner, metrics: Mapping[str, Any]) -> None:
        if self.save_best:
            runner.call_hook("before_checkpoint")
        super()._save_best_checkpoint(runner, metrics)

    def _save_checkpoint_with_step(self, runner: AnyRunner, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
        if self.max_keep_ckpts > 0:
            # With those to be deleted below: if the process is killed before, the resumed run deletes them.
            runner.message_hub.update_info("keep_ckpt_ids", steps)
        self.write_checkpoint(
            runner,
            name,
            meta,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            by_epoch=self.by_epoch,
            **self.args,
        )
        last = Path(runner.work_dir) / LAST_CHECKPOINT
        with fail_together(), self._explain_write_error(last, runner):
            if is_main_process():
                write_atomically(last, str(self.last_ckpt).encode())
        with fail_together():
            if self.max_keep_ckpts > 0:
                while len(steps) > self.max_keep_ckpts:
                    old = self.filename_tmpl.format(steps.pop(0))
                    self.remove_checkpoint(self.file_backend.join_path(self.out_dir, old))
                self.keep_ckpt_ids = deque(steps)
                runner.message_hub.update_info("keep_ckpt_ids", steps)

    def write_checkpoint(self, runner: AnyRunner, name: str, meta: dict[str, Any], **settings: Any) -> None:
        path = self.file_backend.join_path(self.out_dir, name)
        is_local = self._is_local(self.out_dir)
        # The same on all ranks, which may write into one folder.
        temporary = str(Path(name).with_name(f".{Path(name).name}.tmp")) if is_local else name
        self._progress = {key: meta[key] for key in ("epoch", "iter")}
        with fail_together(), self._explain_write_error(path, runner):
            try:
                super().write_checkpoint(runner, temporary, meta, **settings)
            except BaseException:
                if is_local and is_main_process():
                    remove_path(Path(self.out_dir, temporary))
                raise
            finally:
                self._progress = {}
        # In a block of its own: where each rank writes a file, all must have written before the rename.
        with fail_together(), self._explain_write_error(path, runner):
            if is_local and is_main_process():
                rename_atomically(Path(self.out_dir, temporary), Path(path))

    def _explain_write_error(self, path: str | Path, runner: AnyRunner) -> AbstractContextManager[None]:
        return output_errors(path, partial(resume_cure, runner.work_dir, self.out_dir, self.filename_tmpl))

    def _path_in_folder(self, metric: str, recorded_path: Any) -> str | None:
        """The path of a recorded best checkpoint, moved into this folder.

        The checkpoint that recorded it may come from another run or place. None if this hook gives no such name.
        """
        label = r".+" if metric == "auto" else re.escape(metric.replace("/", "_"))
        name = os.path.basename(recorded_path) if isinstance(recorded_path, str) else ""
        if not re.fullmatch(rf"best_{label}_{name_pattern(self.filename_tmpl)}", name):
            return None
        return self.file_backend.join_path(self.out_dir, name)

    def _is_local(self, folder: str) -> bool:
        """Whether checkpoints go to a local disk."""
        if self.file_client_args:
            return isinstance(FileClient.infer_client(self.file_client_args, folder).client, LocalBackend)
        return isinstance(get_file_backend(folder, backend_args=self.backend_args), LocalBackend)

    def _check_folder(self, runner: AnyRunner) -> None:
        """Lock the folder, check that it is writable and has room, and delete incomplete checkpoints."""
        folder = checkpoint_folder(self, runner.work_dir)
        if not self._is_local(folder):
            return
        for place in dict.fromkeys((runner.work_dir, folder)):  # the former has last_checkpoint
            check_output(place, OPTIONS, is_folder=True)
            self._lock.enter_context(locked(place, 0, OPTIONS, inside=True))
        name = rf"(best_.+_)?{name_pattern(self.filename_tmpl)}"
        for path in Path(folder).iterdir():
            if re.fullmatch(rf"\.{name}\.tmp", path.name):
                remove_path(path)
        existing = [path for path in Path(folder).iterdir() if re.fullmatch(name, path.name)]
        present = sum(path.stat().st_size for path in existing) if resumes(runner) else 0
        usage = shutil.disk_usage(folder)
        needed = self._needed_room(runner) - present
        if needed > usage.free and usage.total:  # some network file systems say that their size is 0
            raise OutputError(
                errno.ENOSPC,
                f"the checkpoints of this run take up to {needed:,} more bytes in {folder}, and {usage.free:,} are "
                f"free: make room, set another {OPTIONS}, or keep fewer by default_hooks.checkpoint.max_keep_ckpts",
            )

    def _needed_room(self, runner: AnyRunner) -> int:
        """An upper bound on the bytes of all checkpoints at any time."""
        end = runner.max_epochs if self.by_epoch else runner.max_iters
        steps = range(self.save_begin or self.interval, end + 1, self.interval) if self.interval > 0 else range(0)
        written = len(steps) + (self.save_last and end not in steps)
        kept = min(written, self.max_keep_ckpts) if self.max_keep_ckpts > 0 else written
        weights, moment = checkpoint_size(runner.model)
        optimizer = moment * _moments(runner.optim_wrapper)
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            weights *= 2
        regular = weights + optimizer * self.save_optimizer
        # A new checkpoint is written before an old one is deleted or, after an evaluation, replaced.
        spare = regular if kept and (written > kept or self.save_best) else 0
        return kept * regular + spare + (len(self.save_best) + 1 if self.save_best else 0) * weights


def resume_cure(work_dir: str, folder: str | None = None, template: str | None = None) -> str:
    """Name the last complete checkpoint, and what to do after a write has failed.

    Args:
        work_dir, folder, template: as of :func:`mmsnnet.engine.latest_checkpoint.latest_checkpoint`.
    """
    try:
        complete, _ = latest_checkpoint(work_dir, folder, template)
    except (OSError, ValueError):
        complete = None
    left = f"{work_dir} has no complete checkpoint yet" if complete is None else f"the last complete one is {complete}"
    return f"{left}; make room or allow writing there, and go on with --resume"


def checkpoint_size(model: nn.Module) -> tuple[int, int]:
    """Bytes of the weights, and of one moment for each trained parameter."""
    parameters = {
        parameter: prod(shape) * parameter.element_size() for parameter, shape in parameter_shapes(model).items()
    }
    weights = sum(parameters.values()) + sum(buffer.nbytes for buffer in model.buffers())
    return weights, sum(size for parameter, size in parameters.items() if parameter.requires_grad)


def _moments(optim_wrapper: Any) -> int:
    """How many moments an optimizer keeps of each parameter, at most: torch's SGD one or none, others two."""
    optimizer = getattr(optim_wrapper, "optimizer", None)  # an OptimWrapperDict has several
    return int(any(group["momentum"] for group in optimizer.param_groups)) if isinstance(optimizer, SGD) else 2


def _has_resume_hook(runner: AnyRunner) -> bool:
    """Whether the runner has a ResumeHook: mmengine's own loops add none."""
    return any(isinstance(hook, ResumeHook) for hook in runner.hooks)
