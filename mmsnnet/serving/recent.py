"""Recent measurements, which predict the next one. Pure arithmetic, as the scheduler."""

from __future__ import annotations

from collections import deque

# A high quantile, so that most measurements are below it. An old measurement says nothing about now.
QUANTILE, MOST, MEMORY_MS = 0.9, 32, 10_000.0


class Recent:
    """The last measurements of a quantity, for as long as they count. Times are in ms and never go back.

    Args:
        default: what is expected without measurements.
    """

    def __init__(self, default: float) -> None:
        self.default = default
        self._measured: deque[tuple[float, float]] = deque(maxlen=MOST)
        self._high_and_mean: tuple[float, float] | None = None

    def add(self, value: float, now: float) -> None:
        """Add a measurement."""
        self._measured.append((now, value))
        self._high_and_mean = None

    def high(self, now: float) -> float:
        """A high quantile."""
        return self._summary(now)[0]

    def mean(self, now: float) -> float:
        """The arithmetic mean."""
        return self._summary(now)[1]

    def _summary(self, now: float) -> tuple[float, float]:
        """The high quantile and the mean, computed only after a change: they are asked for at each request."""
        while self._measured and self._measured[0][0] <= now - MEMORY_MS:
            self._measured.popleft()
            self._high_and_mean = None
        if not self._measured:
            return self.default, self.default
        if self._high_and_mean is None:
            values = sorted(value for _, value in self._measured)
            place = QUANTILE * (len(values) - 1)
            below = values[int(place)]
            above = values[min(int(place) + 1, len(values) - 1)]
            self._high_and_mean = below + (place % 1) * (above - below), sum(values) / len(values)
        return self._high_and_mean
