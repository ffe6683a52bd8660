"""The console of the tools: short; the log file has everything."""

from __future__ import annotations

import importlib
import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from logging.handlers import MemoryHandler
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner

from mmsnnet.engine.console import console_handlers
from mmsnnet.files.writing import DISK_ERRORS

# Messages that the console does not show: long ones, and those that no user can act on.
LOG_FILE_ONLY = re.compile(
    r"\s*(?:"
    + "|".join(
        (
            # mmengine's runners
            r"-{60}\s+System environment:",
            r"Config:\n",
            r"Hooks will be executed in the following order",
            r"Distributed training is not used, all SyncBatchNorm",
            r"Exp name: ",
            # mmengine, about its own files
            r'"FileClient" will be deprecated',
            r'"HardDiskBackend" is the alias',
            r".{1,200} is not a meta file, simply parsed as meta information",
            r"The prefix is not set in metric class",
            r"Failed to search registry with scope",
            r"set scope as .{1,40} when scope can not be inferred",
            # mmcv, mmseg and mmdet
            r"Fail to import ``MultiScaleDeformableAttention``",
            r"Default ``avg_non_ignore`` is False",
            r"The draw is False, it means that the hook for visualization",
            r"Could not import OneDL",
            r"`reduce_zero_label` will be deprecated",
            r"faster_coco_eval is not installed",
            # torch and timm, when the toolboxes call them
            r"torch\.meshgrid: in an upcoming release",
            r"`?torch\.(?:cuda\.)?amp\.\w+(?:\(.{0,40}\))?`? is deprecated",
            r"No pretrained configuration specified for ",
            r"Overwriting \S+ in registry",
            r"pkg_resources is deprecated",
        )
    )
    + ")"
)


def is_for_console(record: logging.LogRecord) -> bool:
    """Whether the console shows a message: none of ``LOG_FILE_ONLY``, but all errors."""
    return record.levelno >= logging.ERROR or LOG_FILE_ONLY.match(record.getMessage()) is None


@contextmanager
def short_console() -> Iterator[None]:
    """Keep messages and warnings of ``LOG_FILE_ONLY`` off the console.

    All warnings, and messages that are logged before there is a runner, are also written to the log file of the runner
    that :func:`mmsnnet.cli.runner.build_runner` builds in the block.
    """
    logger = MMLogger.get_instance("mmengine")  # the current logger until a runner creates one
    buffer = MemoryHandler(capacity=1, flushLevel=logging.CRITICAL + 1)  # keeps all records until it has a target
    handlers = console_handlers(logger)
    for handler in handlers:
        handler.addFilter(is_for_console)
    logger.addHandler(buffer)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _logging_showwarning(warnings.showwarning, logger.name, buffer)
            yield
    finally:
        logger.removeHandler(buffer)
        for handler in handlers:
            handler.removeFilter(is_for_console)


def with_short_console(runner_class: type[Runner] | type[FlexibleRunner], quiet: bool = False) -> Any:
    """A subclass of a runner whose console is short; if ``quiet``, it shows only warnings and errors.

    mmengine logs environment and config in the constructor, right after it has created the logger: a filter that is
    added later comes too late.
    """

    def _log_env(self: Any, *args: Any, **kwargs: Any) -> None:
        for handler in self.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = partial(_end_run, handler)  # type: ignore[method-assign]
        for handler in console_handlers(self.logger):
            handler.addFilter(is_for_console)
            if quiet:
                handler.setLevel(max(handler.level, logging.WARNING))
        _write_buffer(self.logger)
        runner_class._log_env(self, *args, **kwargs)
        self.logger.info(f"Environment and config are in {self.logger.log_file}")

    attributes = {"_log_env": _log_env, "__module__": runner_class.__module__}
    return type(runner_class.__name__, (runner_class,), attributes)


def _end_run(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Raise the error of a full disk: logging would print a traceback for each record."""
    error = sys.exc_info()[1]
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        raise error
    type(handler).handleError(handler, record)


def import_toolbox(config: Config) -> None:
    """Import a toolbox's data sets quietly: they print that an optional package is missing."""
    toolbox = config.get("default_scope")
    if toolbox in ("mmseg", "mmdet") and find_spec(toolbox) is not None:
        with redirect_stdout(io.StringIO()):
            importlib.import_module(f"{toolbox}.datasets")


def _write_buffer(logger: MMLogger) -> None:
    """Write what :func:`short_console` has buffered, and all later warnings, to the log file of a runner."""
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    for handler in MMLogger.get_instance("mmengine").handlers:
        if isinstance(handler, MemoryHandler) and files:
            handler.setTarget(files[0])
            handler.flush()


def _logging_showwarning(show: Callable[..., None], name: str, log: logging.Handler) -> Callable[..., None]:
    """A ``warnings.showwarning`` that logs each warning, and passes to ``show`` what the console shows."""

    def show_and_log(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
        log.handle(logging.LogRecord(name, logging.WARNING, filename, lineno, text, None, None))
        if LOG_FILE_ONLY.match(str(message)) is None:
            show(message, category, filename, lineno, file, line)

    return show_and_log
