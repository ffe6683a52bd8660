"""Which checkpoint a run goes on from: the newest one in its folder that is whole.

mmengine takes the one that the file ``last_checkpoint`` names, whatever became of it: cut off where a disk was full,
left behind where a work folder was moved, one before the newest where the process was killed between the two files.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import FlexibleRunner, Runner

from mmsnnet.models.checkpoint import read_model_checkpoint

# The file in which mmengine's hook names the checkpoint that it wrote last.
LAST_CHECKPOINT = "last_checkpoint"
# How mmengine names checkpoints unless it is told otherwise.
TEMPLATES = ("epoch_{}.pth", "iter_{}.pth")


def choose_checkpoint(runner: Runner | FlexibleRunner) -> None:
    """Sets which checkpoint a runner resumes from, where it is to resume and no ``load_from`` says from which: the
    newest whole one of its folder, the same on all ranks, with a warning for each that is passed over. Where there is
    none at all, the runner starts anew, which mmengine logs.

    Raises:
        FileNotFoundError: checkpoints were written, and none is there any more.
        ValueError: there are some, of which none is whole.
    """
    folder, template = _of_hook(runner)
    named = isinstance(runner._resume, str) or runner._load_from is not None  # a FlexibleRunner's may be a path
    if not runner._resume or named or "://" in folder:
        return
    # One rank looks: ranks that find different files would train different models.
    found: list[str | Exception | None] = [None]
    if is_main_process():
        try:
            path, passed_over = latest_checkpoint(runner.work_dir, folder, template)
            for told in passed_over:
                runner.logger.warning(told)
            found = [None if path is None else str(path)]
        except Exception as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], Exception):
        raise found[0]
    runner._load_from = found[0]


def checkpoint_folder(hook: CheckpointHook | None, work_dir: str) -> str:
    """Where a hook of mmengine's that has not begun to train will write checkpoints."""
    if hook is None or hook.out_dir is None or str(hook.out_dir) == work_dir:
        return work_dir
    return os.path.join(str(hook.out_dir), os.path.basename(work_dir.rstrip(os.sep)))


def latest_checkpoint(
    work_dir: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, template: str | None = None
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run.

    What ``last_checkpoint`` names is the newest unless one with a higher number was written after it; of others, by how
    many iterations or epochs they have been trained tells nothing, for they may be of another run in the same folder.
    It is looked for under its name in ``folder`` first: work folders are moved and copied.

    Args:
        work_dir: where ``last_checkpoint`` lies.
        folder: where the checkpoints are, by default ``work_dir``.
        template: how they are named, ``'step_{}.pth'`` say; mmengine's names, and those like the one that
            ``last_checkpoint`` has, are known.

    Returns:
        The path, None if the run has not written a checkpoint yet; and for each newer one what is wrong with it.

    Raises:
        FileNotFoundError: ``last_checkpoint`` names one, and there is none.
        ValueError: none is whole.
    """
    named = _named(Path(work_dir))
    templates = dict.fromkeys(filter(None, (named and _template(named), template, *TEMPLATES)))
    folder = Path(folder or work_dir)
    candidates = _newest_first(folder, named, templates, Path(work_dir))
    if not candidates and named is not None and named.exists():
        candidates = _newest_first(named.parent, named, templates, Path(work_dir))
    if not candidates and (Path(work_dir) / LAST_CHECKPOINT).exists():
        raise FileNotFoundError(
            f"{Path(work_dir) / LAST_CHECKPOINT} names {named or 'nothing'}, and there is no checkpoint, neither there "
            f"nor in {folder}: put it back, or leave out --resume to start anew"
        )
    passed_over = []
    for path in candidates:
        if (wrong := damage(path)) is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} is passed over: {wrong}")
    if candidates:
        raise ValueError(
            f"none of the checkpoints in {candidates[0].parent} is whole ({'; '.join(passed_over)}): leave out "
            "--resume to start anew"
        )
    return None, []


def damage(path: Path) -> str | None:
    """What keeps a checkpoint from being whole, None if nothing does. Of a zip file, which ``torch.save`` writes, it is
    the list of its contents at its end that tells; one in an older format of torch's has to be read."""
    if path.is_dir():  # of a strategy that shards: one file for each rank
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return next(
            (f"{file.name}: {wrong}" for file in files if (wrong := damage(file))), None if files else "it is empty"
        )
    with path.open("rb") as file:
        start = file.read(2)
    if not start:
        return "it is empty"
    if start == b"PK":
        try:
            zipfile.ZipFile(path).close()
        except (zipfile.BadZipFile, EOFError, ValueError):
            return "it is cut short"
        return None
    try:
        read_model_checkpoint(path)
    except ValueError as error:
        return str(error)
    return None


def name_pattern(template: str) -> str:
    """A regular expression for the names that a template gives; its one group is the number."""
    before, after = re.split(r"\{.*?\}", template, maxsplit=1)
    return rf"{re.escape(before)}(\d+){re.escape(after)}"


def _of_hook(runner: Runner | FlexibleRunner) -> tuple[str, str | None]:
    """The folder and the names of a runner's checkpoints."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    return checkpoint_folder(hook, runner.work_dir), hook and hook.filename_tmpl


def _named(work_dir: Path) -> Path | None:
    try:
        text = (work_dir / LAST_CHECKPOINT).read_text().strip()
    except FileNotFoundError:
        return None
    return Path(text) if text else None


def _template(path: Path) -> str | None:
    """The template that a checkpoint has its name by: the last number in it is the one that goes up."""
    match = re.fullmatch(r"(.*?)\d+(\D*)", path.name)
    return f"{match[1]}{{}}{match[2]}" if match else None


def _newest_first(folder: Path, named: Path | None, templates: Iterable[str], work_dir: Path) -> list[Path]:
    """The checkpoints in a folder, without those that an earlier and longer run left there."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        for template in templates:
            if match := re.fullmatch(name_pattern(template), path.name):
                found.append((path, template, int(match[1]), path.stat().st_mtime_ns))
                break
    if named is None:
        return [path for path, *_ in sorted(found, key=lambda one: (one[2], one[3]), reverse=True)]
    template = _template(named)
    last = int(re.findall(r"\d+", named.name)[-1]) if template else 0
    written = (work_dir / LAST_CHECKPOINT).stat().st_mtime_ns
    higher = [one for one in found if one[1] == template and one[2] > last]
    newer = [one for one in higher if one[3] >= written]
    others = [one for one in found if one not in higher and one[0].name != named.name]
    return [
        *(path for path, *_ in sorted(newer, key=lambda one: one[2], reverse=True)),
        *(path for path in [folder / named.name] if path.exists()),
        *(path for path, *_ in sorted(others, key=lambda one: (one[3], one[2]), reverse=True)),
    ]
