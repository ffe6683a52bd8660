"""Recent measurements, and what they say about the next one. Pure arithmetic, as the scheduler."""

from __future__ import annotations

from collections import deque

import numpy as np

# A high quantile, so that most measurements are below it. An old measurement says nothing about now.
QUANTILE, MOST, MEMORY_MS = 0.9, 32, 10_000.0


class Recent:
    """The last measurements of a quantity, for as long as they count.

    Args:
        default: what is expected without measurements.
    """

    def __init__(self, default: float) -> None:
        self.default = default
        self._measured: deque[tuple[float, float]] = deque(maxlen=MOST)

    def add(self, value: float, now: float) -> None:
        """Add a measurement; times are in ms."""
        self._measured.append((now, value))

    def high(self, now: float) -> float:
        """A high quantile."""
        values = self._values(now)
        return float(np.quantile(values, QUANTILE)) if values else self.default

    def mean(self, now: float) -> float:
        values = self._values(now)
        return sum(values) / len(values) if values else self.default

    def _values(self, now: float) -> list[float]:
        return [value for time, value in self._measured if time > now - MEMORY_MS]
