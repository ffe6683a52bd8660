from __future__ import annotations

import argparse
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.runner import BaseLoop

from mmsnnet.errors import UserError

# What a mistake in a config raises while what it names is built: model, data sets, optimizer, pretrained weights,
# folders. OSError is also what a network says from which weights do not come.
MISTAKES = (ImportError, KeyError, OSError, TypeError, ValueError)


def is_mistake(error: Exception) -> bool:
    """Whether one line answers an error: a ``UserError`` from anywhere, or one of ``MISTAKES`` raised before a loop
    runs. Other errors need their traceback."""
    if isinstance(error, UserError):
        return True
    inside = any(
        frame.f_code.co_name == "run" and isinstance(frame.f_locals.get("self"), BaseLoop)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return isinstance(error, MISTAKES) and not inside


def in_one_line(error: Exception) -> str:
    """What an error says; its kind and place too, where Python itself wrote the message, which says little."""
    text = " ".join(str(error).split())
    by_python = isinstance(error, KeyError | TypeError) and not isinstance(error, ValueError)
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        by_python = error.strerror == os.strerror(error.errno)
    if by_python:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno})"
    return text


@contextmanager
def mistakes_answered(command: argparse.ArgumentParser) -> Iterator[None]:
    """Ends a tool as its parser does, with one line, where a user's mistake is raised inside."""
    try:
        yield
    except Exception as error:
        if not is_mistake(error):
            raise
        command.error(in_one_line(error))
