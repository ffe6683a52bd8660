"""What the processes of a run agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.dist import all_gather_object

from mmsnnet.errors import UserError


@contextmanager
def fail_together() -> Iterator[None]:
    """Let all ranks fail with the error of the one that does: they would wait for it, or go on without it."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    can_be_sent = error is None or isinstance(error, OSError | UserError)
    told = error if can_be_sent else RuntimeError(f"{type(error).__name__}: {error}")
    errors = [found for found in all_gather_object(told) if found is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
