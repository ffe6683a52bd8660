"""The answer of a replica to a request, and how often one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# How often a request is sent to a replica at most: it may have killed the first, or found it busy.
ATTEMPTS = 2


@dataclass(frozen=True)
class Answer:
    """The answer to a request, before it becomes HTTP.

    Attributes:
        status: of HTTP: 200; 400 for an image that cannot be read; 503 if the deadline cannot be met.
        content: for JSON.
        retry_after_s: with 503, when to try again.
    """

    status: int
    content: dict[str, Any]
    retry_after_s: float | None = None
