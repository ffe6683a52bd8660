"""Replace attributes of objects for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def replaced_attributes(replacements: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes of objects, each given as (object, name, value); restore them afterwards."""
    with ExitStack() as stack:
        for target, name, value in replacements:
            undo = (setattr, target, name, vars(target)[name]) if name in vars(target) else (delattr, target, name)
            setattr(target, name, value)
            stack.callback(*undo)
        yield
