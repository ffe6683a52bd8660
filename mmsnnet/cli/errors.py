"""How the tools report errors: a user's mistake in one line, any other error with its traceback.

A :class:`UserError` is always a user's mistake. An error of a library is one while a config is read and a model, data
or a runner is built: there :func:`user_errors` turns it into a ``UserError``.
"""

from __future__ import annotations

import argparse
import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner

from mmsnnet.errors import UserError

# The toolboxes refuse a setting by an assertion, torch by RuntimeError; OSError comes from files and the network.
LIBRARY_ERRORS = (AssertionError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
PACKAGE = Path(__file__).parents[1]


class LoopStartHook(Hook):
    """Record that the training or test loop has started."""

    priority = "HIGHEST"

    def __init__(self) -> None:
        self.started = False

    def before_train(self, runner: Runner | FlexibleRunner) -> None:
        self.started = True

    before_test = before_train


@contextmanager
def user_errors() -> Iterator[LoopStartHook]:
    """Turn the errors of libraries into a :class:`UserError` until a loop starts.

    Yields a hook to register with the runner. mmengine builds optimizer and data in ``runner.train()``; the hook marks
    where the building ends. Errors of a loop pass unchanged: they need their traceback.
    """
    hook = LoopStartHook()
    try:
        yield hook
    except UserError:
        raise
    except LIBRARY_ERRORS as error:
        if hook.started:
            raise
        raise UserError(describe(error)) from error


def describe(error: Exception) -> str:
    """The message of an error in one line, with type and place if Python or a library wrote it."""
    text = " ".join(str(error).split())
    place = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, OSError | ValueError) and Path(place.filename).is_relative_to(PACKAGE):
        return text  # our own words
    return f"{type(error).__name__}: {text} ({place.filename}, line {place.lineno})"


@contextmanager
def exit_on_user_error(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the tool with status 2 and one line on a :class:`UserError`; the log file gets every traceback."""
    try:
        yield
    except Exception as error:
        _log_traceback(error)
        if not isinstance(error, UserError):
            raise
        parser.error(" ".join(_without_worker_traceback(error).split()))


def _without_worker_traceback(error: UserError) -> str:
    """The message of an error, without the traceback that torch adds in a worker of a data loader."""
    text = str(error)
    if not text.startswith(f"Caught {type(error).__name__} in"):
        return text
    return re.split(rf"^(?:[\w.]+\.)?{type(error).__name__}: ", text, flags=re.MULTILINE)[-1]


def _log_traceback(error: Exception) -> None:
    """Write the traceback of an error to the log file of the run, if there is one."""
    raised = (type(error), error, error.__traceback__)
    record = logging.LogRecord("mmsnnet", logging.ERROR, __file__, 0, str(error), None, raised)
    for handler in MMLogger.get_current_instance().handlers:
        if isinstance(handler, logging.FileHandler):
            with suppress(OSError):  # the error that ends the run is printed
                handler.handle(record)
