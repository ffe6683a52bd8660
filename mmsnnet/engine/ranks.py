"""Errors that all ranks of a run raise together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.dist import all_gather_object

from mmsnnet.errors import UserError


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise the error of one rank on all: the others would wait."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    # Any other exception may not survive pickling.
    is_sent = error is None or isinstance(error, OSError | UserError)
    message = error if is_sent else RuntimeError(f"{type(error).__name__}: {error}")
    errors = [received for received in all_gather_object(message) if received is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
