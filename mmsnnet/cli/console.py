"""What the tools print: what a user can use; the log file has everything."""

from __future__ import annotations

import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from logging.handlers import MemoryHandler
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.runner import FlexibleRunner, Runner

# Patterns of messages that are kept off the console: long ones, and those about what no user can change.
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
            # mmengine, of its own files
            r'"FileClient" will be deprecated',
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
            # torch and timm, called by the above
            r"torch\.meshgrid: in an upcoming release",
            r"`?torch\.(?:cuda\.)?amp\.\w+(?:\(.{0,40}\))?`? is deprecated",
            r"No pretrained configuration specified for ",
            r"Overwriting \S+ in registry",
            r"pkg_resources is deprecated",
        )
    )
    + ")"
)


class ConsoleFilter(logging.Filter):
    """Keeps messages of ``LOG_FILE_ONLY`` from a handler. Errors always pass."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or LOG_FILE_ONLY.match(record.getMessage()) is None


@contextmanager
def short_console() -> Iterator[None]:
    """Around what a tool does: messages of ``LOG_FILE_ONLY``, logged or warned, do not reach the console.

    All warnings, and what is logged before there is a runner, are also written to the log file of the runner that
    :func:`mmsnnet.apis.build_runner` builds inside.
    """
    logger = MMLogger.get_instance("mmengine")  # which serves until a runner has its own
    until_then = MemoryHandler(capacity=1, flushLevel=logging.CRITICAL + 1)  # keeps all while it has no target
    kept = ConsoleFilter()
    consoles = _console_handlers(logger)
    for handler in consoles:
        handler.addFilter(kept)
    logger.addHandler(until_then)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _showing(warnings.showwarning, logger.name, until_then)
            yield
    finally:
        logger.removeHandler(until_then)
        for handler in consoles:
            handler.removeFilter(kept)


def with_short_console(kind: type[Runner] | type[FlexibleRunner], quiet: bool = False) -> Any:
    """A runner class like ``kind`` that logs to the console what a user can use, or, if ``quiet``, warnings and errors
    alone.

    mmengine logs environment and config in the constructor, as soon as there is a logger: a filter that is added later
    comes too late.
    """

    def _log_env(self: Any, *args: Any, **kwargs: Any) -> None:
        for handler in _console_handlers(self.logger):
            if not any(isinstance(known, ConsoleFilter) for known in handler.filters):
                handler.addFilter(ConsoleFilter())
            if quiet:
                handler.setLevel(max(handler.level, logging.WARNING))
        _write_what_was_kept(self.logger)
        kind._log_env(self, *args, **kwargs)
        self.logger.info(f"Environment and config are in {self.logger.log_file}")

    return type(kind.__name__, (kind,), {"_log_env": _log_env, "__module__": kind.__module__})


def import_toolbox(config: Config) -> None:
    """Import a toolbox's data sets before the runner does: they print that an optional package is missing."""
    toolbox = config.get("default_scope")
    if toolbox in ("mmseg", "mmdet") and find_spec(toolbox) is not None:
        with redirect_stdout(io.StringIO()):
            importlib.import_module(f"{toolbox}.datasets")


def _console_handlers(logger: MMLogger) -> list[logging.Handler]:
    return [
        h for h in logger.handlers if isinstance(h, logging.StreamHandler) and not isinstance(h, logging.FileHandler)
    ]


def _write_what_was_kept(logger: MMLogger) -> None:
    """Gives the log file of a runner what :func:`short_console` has kept, and from now on all warnings."""
    files = [handler for handler in logger.handlers if isinstance(handler, logging.FileHandler)]
    for handler in MMLogger.get_instance("mmengine").handlers:
        if isinstance(handler, MemoryHandler) and files:
            handler.setTarget(files[0])
            handler.flush()


def _showing(show: Callable[..., None], name: str, log: logging.Handler) -> Callable[..., None]:
    """A ``warnings.showwarning`` that writes to a log, and shows by ``show`` what belongs on the console."""

    def show_and_log(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
        log.handle(logging.LogRecord(name, logging.WARNING, filename, lineno, text, None, None))
        if LOG_FILE_ONLY.match(str(message)) is None:
            show(message, category, filename, lineno, file, line)

    return show_and_log
