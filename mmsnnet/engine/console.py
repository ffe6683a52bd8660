"""The console handlers of mmengine's logger."""

import logging

from mmengine.logging import MMLogger


def console_handlers(logger: MMLogger) -> list[logging.StreamHandler]:
    """The handlers of a logger that write to the console."""
    return [
        handler
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
