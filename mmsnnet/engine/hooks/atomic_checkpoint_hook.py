from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections import defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapperDict
from mmengine.runner import BaseLoop, FlexibleRunner, Runner
from torch import Tensor, nn
from torch.optim import Optimizer

import mmsnnet.engine.atomic_backend  # noqa: F401  writes of mmengine's become atomic
from mmsnnet.engine.hooks.best_metric_hook import BestMetricHook
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.latest_checkpoint import (
    LAST_CHECKPOINT,
    checkpoint_folder,
    choose_checkpoint,
    latest_checkpoint,
    name_pattern,
)
from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.sharding import is_sharded
from mmsnnet.errors import UserError
from mmsnnet.files.writing import abandoned_files, write_atomically
from mmsnnet.registry import HOOKS

AnyRunner = Runner | FlexibleRunner

# What a checkpoint takes beside its numbers, in bytes: for each tensor a record and its name, once the config and the
# like, and for each iteration what is logged of it: 20 scalars of 16 bytes, of a million iterations at most.
TENSOR_RECORD = 512
RECORDS = 2**20
HISTORY = 20 * 16
LONGEST_HISTORY = 1_000_000


class CheckpointFolderError(UserError, OSError):
    """Checkpoints cannot be written where they are to go, or do not fit there."""


class CheckpointWriteError(UserError, OSError):
    """A checkpoint cannot be written in the midst of training, by whichever rank: all ranks say the same."""


@HOOKS.register_module()
class AtomicCheckpointHook(BestMetricHook):
    """mmengine's ``CheckpointHook`` that at no moment leaves a run without a whole checkpoint.

    A new checkpoint is written first, atomically; then ``last_checkpoint`` names it; then those that ``max_keep_ckpts``
    drops are removed, the best one before likewise. So for a moment there is room needed for one more. What a resumed
    checkpoint records of others is taken for names in this run's folder, and only what has a name that this hook gives
    is ever removed.

    Before anything is trained, the folder is tried, and what the checkpoints of the run will take is held against what
    is free. Where that or a write fails on one rank, all ranks end with its error. Of a run that resumes without
    ``load_from``, the hook chooses the checkpoint: see :func:`mmsnnet.engine.latest_checkpoint.latest_checkpoint`.

    What ``save_best``, early stopping and plateau schedules monitor is checked before anything is trained, and so is
    whether the validation set has labels.

    Before a checkpoint is made, ``before_checkpoint(runner)`` of other hooks is called on all ranks.

    Args:
        args, kwargs: as of mmengine's ``CheckpointHook``, but for ``save_best``: see :class:`BestMetricHook`.

    Raises:
        SettingError: before training: no metric has the name that is monitored, or validation has no labels.
        CheckpointFolderError: before training: the folder cannot be written to, or has not enough room.
        CheckpointWriteError: a checkpoint cannot be written; the message says which is the last whole one.
    """

    # How far the run is, for the checkpoint that is being saved.
    _progress: Mapping[str, int] = {}

    def before_run(self, runner: AnyRunner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):  # it does not train
            return
        with fail_together():
            self.check_validation(runner)
        choose_checkpoint(runner)
        weights, optimizer = _checkpoint_size(runner)
        with fail_together():
            if is_main_process():
                self._check_folder(runner, weights, optimizer)

    def after_load_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        if not _has_resume_hook(runner):
            ResumeHook().after_load_checkpoint(runner, checkpoint)

    def before_train(self, runner: AnyRunner) -> None:
        hub = runner.message_hub
        recorded = hub.runtime_info.get("keep_ckpt_ids")
        kept = [step for step in recorded if type(step) is int and step >= 0] if isinstance(recorded, list) else []
        if self.max_keep_ckpts > 0:
            # mmengine would remove at once what is too many. Here the next checkpoint is written first.
            hub.update_info("keep_ckpt_ids", kept[-self.max_keep_ckpts :])
        super().before_train(runner)
        self.keep_ckpt_ids = deque(kept)
        for key, path in self._best().items():
            if path is not None:
                self._set_best(key, own := self._own_best(key, path))
                suffix = "" if len(self.key_indicators) == 1 else f"_{key}"
                hub.update_info(f"best_ckpt{suffix}", own)
                if own is None:  # the best by another metric, say, whose value this one cannot be compared with
                    hub.pop_info(f"best_score{suffix}", None)

    def before_save_checkpoint(self, runner: AnyRunner, checkpoint: dict[str, Any]) -> None:
        # A FlexibleRunner counts on from what the hook tells it, which is right in the midst of an iteration alone.
        checkpoint["meta"].update(self._progress)
        if not _has_resume_hook(runner):
            ResumeHook().before_save_checkpoint(runner, checkpoint)

    def _save_checkpoint(self, runner: AnyRunner) -> None:
        runner.call_hook("before_checkpoint")
        super()._save_checkpoint(_SavingTogether(runner, self))

    def _save_best_checkpoint(self, runner: AnyRunner, metrics: Mapping[str, Any]) -> None:
        if not self.save_best:
            return
        runner.call_hook("before_checkpoint")
        before = self._best()
        for key in before:
            self._set_best(key, None)  # mmengine would remove it before it writes the new one
        super()._save_best_checkpoint(_SavingTogether(runner, self), metrics)
        with fail_together():
            # In the same order; 'auto' has become the name of a metric.
            for old, (key, new) in zip(before.values(), self._best().items(), strict=True):
                if new is None:
                    self._set_best(key, old)
                elif old not in (None, new):
                    self._remove(old)

    def _save_checkpoint_with_step(self, runner: AnyRunner, step: int, meta: dict[str, Any]) -> None:
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        steps = [*(kept for kept in self.keep_ckpt_ids if kept != step), step]
        if self.max_keep_ckpts > 0:
            # With those that are removed below: if the process is killed before, the one that goes on removes them.
            runner.message_hub.update_info("keep_ckpt_ids", steps)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        last = Path(runner.work_dir) / LAST_CHECKPOINT
        with fail_together(), self._writing(last, runner):
            if is_main_process():
                write_atomically(last, str(self.last_ckpt).encode())
        with fail_together():
            if self.max_keep_ckpts > 0:
                while len(steps) > self.max_keep_ckpts:
                    dropped = self.filename_tmpl.format(steps.pop(0))
                    self._remove(self.file_backend.join_path(self.out_dir, dropped))
                self.keep_ckpt_ids = deque(steps)
                runner.message_hub.update_info("keep_ckpt_ids", steps)

    @contextmanager
    def _writing(self, path: str | Path, runner: AnyRunner) -> Iterator[None]:
        """Has the error of a write say what is left, and what to do."""
        try:
            yield
        except OSError as error:
            try:
                whole, _ = latest_checkpoint(runner.work_dir, self.out_dir, self.filename_tmpl)
            except (OSError, ValueError):
                whole = None
            left = "There is no whole checkpoint yet" if whole is None else f"The last whole one is {whole}"
            raise CheckpointWriteError(
                error.errno,
                f"{path} cannot be written ({error.strerror or error}). {left}: see to the folder and go on with "
                "--resume",
            ) from error

    def _remove(self, path: str) -> None:
        """Removes a checkpoint, which is a folder where each rank writes a file of its own."""
        if is_main_process() and self.file_backend.isfile(path):
            self.file_backend.remove(path)
        elif is_main_process() and self.file_backend.isdir(path):
            self.file_backend.rmtree(path)

    def _best(self) -> dict[str, str | None]:
        """Where the best checkpoint by each metric is."""
        if not self.save_best:
            return {}
        if len(self.key_indicators) > 1:
            return dict(self.best_ckpt_path_dict)
        return {self.key_indicators[0]: self.best_ckpt_path}

    def _set_best(self, key: str, path: str | None) -> None:
        if len(self.key_indicators) > 1:
            self.best_ckpt_path_dict[key] = path
        else:
            self.best_ckpt_path = path

    def _own_best(self, key: str, path: Any) -> str | None:
        """The best checkpoint that another run, or this one elsewhere, has recorded, as it is called in this folder;
        None if it is no name that this hook gives."""
        metric = r".+" if key == "auto" else re.escape(key.replace("/", "_"))
        name = os.path.basename(path) if isinstance(path, str) else ""
        if not re.fullmatch(rf"best_{metric}_{name_pattern(self.filename_tmpl)}", name):
            return None
        return self.file_backend.join_path(self.out_dir, name)

    def _check_folder(self, runner: AnyRunner, weights: int, optimizer: int) -> None:
        """Tries the folder, and sees to it that what is kept at once fits there."""
        folder = checkpoint_folder(self, runner.work_dir)
        if self.file_client_args or not isinstance(
            get_file_backend(folder, backend_args=self.backend_args), LocalBackend
        ):
            return  # of other kinds of storage nothing is known
        try:
            os.makedirs(folder, exist_ok=True)
            for path in abandoned_files(folder):
                path.unlink(missing_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"0")
            names = os.listdir(folder) if runner._resume else []
            usage = shutil.disk_usage(folder)
        except OSError as error:
            raise CheckpointFolderError(
                error.errno,
                f"checkpoints cannot be written to {folder} ({error.strerror}): make it a folder that can be written "
                "to, or give another one by --work-dir or default_hooks.checkpoint.out_dir",
            ) from error
        whole = weights + optimizer * self.save_optimizer
        needed = self._room(runner, names, whole, weights)
        # A file system that does not know its size, as some of storage elsewhere, says 0.
        if needed > usage.free and usage.total:
            raise CheckpointFolderError(
                errno.ENOSPC,
                f"the checkpoints of this run take up to {needed:,} more bytes in {folder}, about {whole:,} each, and "
                f"{usage.free:,} are free: free some, give another folder by --work-dir or "
                "default_hooks.checkpoint.out_dir, or keep fewer by default_hooks.checkpoint.max_keep_ckpts",
            )

    def _room(self, runner: AnyRunner, names: Collection[str], whole: int, weights: int) -> int:
        """The most bytes that checkpoints will take beside those that the run has written before it was resumed."""
        due = self._due(runner)
        kept = min(due, self.max_keep_ckpts) if self.max_keep_ckpts > 0 else due
        best = len(self.save_best or ())
        pattern = name_pattern(self.filename_tmpl)
        has_kept = sum(re.fullmatch(pattern, name) is not None for name in names)
        has_best = sum(re.fullmatch(f"best_.+_{pattern}", name) is not None for name in names)
        room = max(kept - has_kept, 0) * whole + max(best - has_best, 0) * weights
        if due > kept or best or has_kept:  # one is written before another is removed or replaced
            room += whole if due else weights
        return room

    def _due(self, runner: AnyRunner) -> int:
        """How many checkpoints are still to be written, the best ones not counted."""
        now, end = (runner.epoch, runner.max_epochs) if self.by_epoch else (runner.iter, runner.max_iters)
        steps = range(0)
        if self.interval > 0:
            first = self.save_begin + ceil(max(now + 1 - self.save_begin, 0) / self.interval) * self.interval
            steps = range(first, end + 1, self.interval)
        return len(steps) + (self.save_last and now < end and end not in steps)


def _has_resume_hook(runner: AnyRunner) -> bool:
    """Whether a hook of the runner's compares checkpoints with it: mmengine's own loops add none."""
    return any(isinstance(hook, ResumeHook) for hook in runner.hooks)


class _SavingTogether:
    """A runner all of whose ranks fail where one cannot save a checkpoint."""

    def __init__(self, runner: AnyRunner, hook: AtomicCheckpointHook) -> None:
        self._runner, self._hook = runner, hook

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, meta: dict[str, Any], **kwargs: Any) -> None:
        self._hook._progress = {record: meta[record] for record in ("epoch", "iter")}
        path = self._hook.file_backend.join_path(out_dir, filename)
        with fail_together(), self._hook._writing(path, self._runner):
            try:
                self._runner.save_checkpoint(out_dir, filename, *args, meta=meta, **kwargs)
            finally:
                self._hook._progress = {}


def _checkpoint_size(runner: AnyRunner) -> tuple[int, int]:
    """About how many bytes of a checkpoint are weights and records, and how many the optimizer's state, which is not
    there yet."""
    tensors = [*runner.model.parameters(), *runner.model.buffers()]
    weights = sum(tensor.nbytes + TENSOR_RECORD for tensor in tensors)
    if any(isinstance(hook, EMAHook) for hook in runner.hooks):
        weights *= 2
    wrapper = runner.optim_wrapper
    wrappers = list(wrapper.values()) if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    optimizer = sum(_state_size(wrapper.optimizer) for wrapper in wrappers)
    if is_sharded(runner.model):
        weights, optimizer = map(sum, zip(*all_gather_object((weights, optimizer)), strict=True))
    records = RECORDS + HISTORY * min(runner.max_iters, LONGEST_HISTORY)
    return weights + records, optimizer


def _state_size(optimizer: Optimizer) -> int:
    """About how many bytes an optimizer's state will have, whatever its kind: by what a step makes of one small tensor
    in each group of parameters."""
    size = 0.0
    for group in optimizer.param_groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        if trained:
            share, tensors = _state_of_one(optimizer, group, trained[0])
            size += sum(share * parameter.nbytes + tensors * TENSOR_RECORD for parameter in trained)
    return ceil(size)


def _state_of_one(optimizer: Optimizer, group: Mapping[str, Any], like: nn.Parameter) -> tuple[float, int]:
    """How many times the bytes of a parameter its state has, and in how many tensors."""
    probe = nn.Parameter(torch.zeros(64, 64, dtype=like.dtype, device=like.device))
    probe.grad = torch.zeros_like(probe)
    twin = object.__new__(type(optimizer))
    state: dict[str, Any] = dict(defaults=dict(optimizer.defaults), state=defaultdict(dict))
    try:
        # As unpickling makes one: a constructor may want other arguments than its defaults.
        twin.__setstate__(state | dict(param_groups=[{**group, "params": [probe]}]))
        twin.step()
        tensors = [value for value in twin.state[probe].values() if isinstance(value, Tensor)]
    except Exception as error:  # whatever an optimizer of any kind may raise that needs more than that
        print_log(
            f"How large the state of {type(optimizer).__name__} will be could not be tried ({type(error).__name__}: "
            f"{error}): for the room that checkpoints need, it is taken for one of Adam's kind",
            logger="current",
            level=30,
        )
        return 2.0, 3
    return sum(tensor.nbytes for tensor in tensors) / probe.nbytes, len(tensors)
