from __future__ import annotations

import argparse
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import BaseLoop

from mmsnnet.engine.hooks.atomic_checkpoint_hook import CheckpointFolderError
from mmsnnet.engine.runner import CannotResumeError

# What a mistake in a config raises while what it names is built: model, data sets, optimizer, pretrained weights.
MISTAKES = (FileNotFoundError, ImportError, KeyError, TypeError, ValueError)


def is_mistake(error: Exception) -> bool:
    """Whether an error is taken for a user's mistake, which one line answers: one of ``MISTAKES``, raised before a loop
    runs, or a folder that checkpoints cannot be written to. What a loop raises is not, but for a file that it cannot
    resume from: it needs its traceback."""
    if isinstance(error, CannotResumeError | CheckpointFolderError):
        return True
    inside = any(
        frame.f_code.co_name == "run" and isinstance(frame.f_locals.get("self"), BaseLoop)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return isinstance(error, MISTAKES) and not inside


def in_one_line(error: Exception) -> str:
    """What an error says; its kind and place too, where Python itself wrote the message, which says little."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyError | TypeError) and not isinstance(error, ValueError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno})"
    return text


@contextmanager
def mistakes_answered(command: argparse.ArgumentParser, *also: type[Exception]) -> Iterator[None]:
    """Ends a tool as its parser does, with one line, where a user's mistake is raised inside, or one of ``also``."""
    try:
        yield
    except Exception as error:
        if not (is_mistake(error) or isinstance(error, also)):
            raise
        command.error(in_one_line(error))
