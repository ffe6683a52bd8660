from __future__ import annotations

import argparse
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.logging import MMLogger
from mmengine.runner import BaseLoop

from mmsnnet.errors import UserError

# What a mistake in a config raises while what it names is built or loaded: model, data sets, optimizer, pretrained
# weights, folders. OSError is also what a network says from which weights do not come; an assertion is how the
# toolboxes refuse a setting, and RuntimeError how torch does.
MISTAKES = (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


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
    """What an error says; with its kind and place where a library or Python itself wrote the message."""
    text = " ".join(_of_worker(error).split())
    if isinstance(error, UserError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    foreign = f"{os.sep}site-packages{os.sep}" in place.filename and f"{os.sep}mmsnnet{os.sep}" not in place.filename
    by_library = isinstance(error, AssertionError | RuntimeError | KeyError | TypeError) or (
        isinstance(error, ValueError) and foreign
    )
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        by_library = error.strerror == os.strerror(error.errno)
    if by_library:
        built = f", building {name}" if (name := _being_built(error)) else ""
        return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno}{built})"
    return text


def _of_worker(error: Exception) -> str:
    """The message of an error; of one that a data loader's worker raised, without the traceback that torch adds."""
    text = str(error)
    if not text.startswith(f"Caught {type(error).__name__} in"):
        return text
    parts = re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)
    return parts[-1]


def _being_built(error: Exception) -> str | None:
    """The ``type`` of the innermost setting that mmengine was building when an error was raised."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "build_from_cfg" and "obj_type" in frame.f_locals:
            kind = frame.f_locals["obj_type"]
            found = kind if isinstance(kind, str) else getattr(kind, "__name__", None)
    return found


@contextmanager
def mistakes_answered(command: argparse.ArgumentParser) -> Iterator[None]:
    """Ends a tool as its parser does, with one line, where a user's mistake is raised inside."""
    try:
        yield
    except Exception as error:
        if not is_mistake(error):
            raise
        _log_traceback(error)
        command.error(in_one_line(error))


def _log_traceback(error: Exception) -> None:
    """Write the traceback of an error to the log file of the run, if it has one: the line may not tell enough."""
    cause = (type(error), error, error.__traceback__)
    record = logging.LogRecord("mmsnnet", logging.ERROR, __file__, 0, str(error), None, cause)
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)
