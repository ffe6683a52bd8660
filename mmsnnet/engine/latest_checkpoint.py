"""The latest complete checkpoint of a run, from which it resumes.

mmengine takes the one that the file ``last_checkpoint`` names. That one may be cut short (the disk was full), gone (the
work folder was moved), or not the newest (the process was killed between writing the two files).
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook

from mmsnnet.engine.mmengine_private import AnyRunner, load_from, resumes, set_load_from
from mmsnnet.engine.ranks import fail_together
from mmsnnet.errors import DataError, MissingFileError
from mmsnnet.models.checkpoint_reading import read_model_checkpoint

# The file in which mmengine's CheckpointHook names the last checkpoint that it wrote.
LAST_CHECKPOINT = "last_checkpoint"
# mmengine's names for checkpoints.
DEFAULT_TEMPLATES = ("epoch_{}.pth", "iter_{}.pth")


def choose_checkpoint(runner: AnyRunner) -> None:
    """Let a runner resume from the newest complete checkpoint in its folder.

    All ranks get the same one. Each newer, damaged one is a warning. Nothing changes where the runner does not resume
    or the config names the checkpoint. Without any checkpoint the runner starts a new run, and mmengine logs that.

    Raises:
        MissingFileError: the run has written checkpoints, and all are gone.
        DataError: all checkpoints are damaged.
    """
    folder, template = _folder_and_template(runner)
    if not resumes(runner) or load_from(runner) is not None or "://" in folder:
        return
    # Only rank 0 looks: ranks that found different files would train different models.
    result: list[str | None] = [None]
    with fail_together():
        if is_main_process():
            path, warnings = latest_checkpoint(runner.work_dir, folder, template)
            for warning in warnings:
                runner.logger.warning(warning)
            result = [None if path is None else str(path)]
    broadcast_object_list(result)
    set_load_from(runner, result[0])


def loaded_checkpoint(runner: AnyRunner) -> str:
    """The path of the checkpoint that a runner loads, for messages."""
    return str(load_from(runner) or _last_written(Path(runner.work_dir)) or runner.work_dir)


def checkpoint_folder(hook: CheckpointHook | None, work_dir: str) -> str:
    """The folder into which a hook will write, before training starts."""
    if hook is None or hook.out_dir is None or str(hook.out_dir) == work_dir:
        return work_dir
    return os.path.join(str(hook.out_dir), os.path.basename(work_dir.rstrip(os.sep)))


def latest_checkpoint(
    work_dir: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, template: str | None = None
) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint of a run.

    The newest is the one that ``last_checkpoint`` names, or one with a higher number that was written after
    ``last_checkpoint``. The others are ordered by time: their numbers may be of an earlier run in the same folder.

    Args:
        work_dir: the folder of ``last_checkpoint``.
        folder: the folder of the checkpoints, by default ``work_dir``. Since work folders are moved and copied, the
            function first looks there for the name in ``last_checkpoint``.
        template: the name of the run's checkpoints, such as ``'step_{}.pth'``. The function also finds mmengine's names
            and those like the name in ``last_checkpoint``.

    Returns:
        The path, None if the run has not written a checkpoint yet; and a warning for each newer, damaged checkpoint.

    Raises:
        MissingFileError: ``last_checkpoint`` names a checkpoint, and there is none.
        DataError: all checkpoints are damaged.
    """
    work_dir = Path(work_dir)
    folder = Path(folder or work_dir)
    last = _last_written(work_dir)
    templates = [one for one in (last and _template_of(last), template, *DEFAULT_TEMPLATES) if one]
    candidates = _newest_first(folder, last, templates, work_dir)
    if not candidates and last is not None and last.exists():
        candidates = _newest_first(last.parent, last, templates, work_dir)
    if not candidates and (work_dir / LAST_CHECKPOINT).exists():
        raise MissingFileError(
            f"{work_dir / LAST_CHECKPOINT} names {last or 'nothing'}, and there is no checkpoint, neither there nor in "
            f"{folder}: put it back, or leave out --resume to start a new run"
        )
    warnings: list[str] = []
    for path in candidates:
        if (fault := find_damage(path)) is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is skipped: {fault}")
    if candidates:
        raise DataError(
            f"all checkpoints in {candidates[0].parent} are damaged ({'; '.join(warnings)}): leave out --resume to "
            "start a new run"
        )
    return None, []


def find_damage(path: Path) -> str | None:
    """Say why a checkpoint cannot be read, None if it can. A folder has a file for each rank."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        faults = (f"{file.name}: {fault}" for file in files if (fault := find_damage(file)))
        return next(faults, None) if files else "it is empty"
    try:
        read_model_checkpoint(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.EIO:  # EIO: the disk fails
            raise
        return str(error).rpartition("cannot be read: ")[2]
    return None


def name_pattern(template: str) -> str:
    """A regular expression for a template's names; its group is the number."""
    before, after = re.split(r"\{.*?\}", template, maxsplit=1)
    return rf"{re.escape(before)}(\d+){re.escape(after)}"


def _folder_and_template(runner: AnyRunner) -> tuple[str, str | None]:
    """The folder and the name template of a runner's checkpoints."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    return checkpoint_folder(hook, runner.work_dir), hook and hook.filename_tmpl


def _last_written(work_dir: Path) -> Path | None:
    """The path in ``last_checkpoint``, None where there is none."""
    try:
        text = (work_dir / LAST_CHECKPOINT).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    return Path(text) if 0 < len(text) < 4096 and "\0" not in text else None


def _template_of(path: Path) -> str | None:
    """The template of a checkpoint's name, whose last number counts up."""
    match = re.fullmatch(r"(.*?)\d+(\D*)", path.name)
    return f"{match[1]}{{}}{match[2]}" if match else None


def _newest_first(folder: Path, last: Path | None, templates: Iterable[str], work_dir: Path) -> list[Path]:
    """The checkpoints in a folder, without those of an earlier, longer run."""
    checkpoints = []  # (path, template, number, time)
    for path in folder.iterdir() if folder.is_dir() else ():
        for template in templates:
            if match := re.fullmatch(name_pattern(template), path.name):
                checkpoints.append((path, template, int(match[1]), path.stat().st_mtime_ns))
                break
    if last is None:
        return [path for path, *_ in sorted(checkpoints, key=lambda one: (one[2], one[3]), reverse=True)]
    last_template = _template_of(last)
    last_number = int(re.findall(r"\d+", last.name)[-1]) if last_template else 0
    last_time = (work_dir / LAST_CHECKPOINT).stat().st_mtime_ns
    higher = [one for one in checkpoints if one[1] == last_template and one[2] > last_number]
    newer = [one for one in higher if one[3] >= last_time]
    others = [one for one in checkpoints if one not in higher and one[0].name != last.name]
    return [
        *(path for path, *_ in sorted(newer, key=lambda one: one[2], reverse=True)),
        *(path for path in [folder / last.name] if path.exists()),
        *(path for path, *_ in sorted(others, key=lambda one: (one[3], one[2]), reverse=True)),
    ]
