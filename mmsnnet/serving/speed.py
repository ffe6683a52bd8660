"""Measured over predicted latency of batches. Pure arithmetic, as the scheduler."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from mmsnnet.serving.recent import MEMORY_MS, Recent

# Costs to remember at most.
KINDS = 256
# The least weight of a new measurement in the cost of a kind.
LEAST_WEIGHT = 0.1


@dataclass
class _Cost:
    value: float
    batches: int
    measured: float


class Speed:
    """Learns the slowness of a device, and the costs of kinds of images.

    A batch takes ``slowness * cost * table``. The slowness is that of the device, for all images alike. The cost is
    that of images of one kind, such as one size, over those that the table was measured with. Without a new measurement
    both are forgotten, so that a request is let in again to measure them.

    Args:
        base: the kind whose cost is 1.
    """

    def __init__(self, base: Hashable = None) -> None:
        self.base = base
        self._ratios = Recent(1.0)
        self._costs: OrderedDict[Hashable, _Cost] = OrderedDict()

    def slowness(self, now: float) -> tuple[float, float]:
        """A high quantile and the mean over recent batches; 1 before anything was measured lately."""
        return self._ratios.high(now), self._ratios.mean(now)

    def cost(self, kind: Hashable, now: float) -> float | None:
        """The cost of a kind; None if it was not measured lately."""
        if kind == self.base:
            return 1.0
        known = self._costs.get(kind)
        return None if known is None or known.measured <= now - MEMORY_MS else known.value

    def observe(self, kind: Hashable, ratio: float, now: float) -> None:
        """Learn from a batch of one kind.

        Args:
            kind: of its images.
            ratio: its time over that of the table.
            now: the time when it ended.
        """
        cost = self.cost(kind, now)
        if cost is not None:
            self._ratios.add(ratio / cost, now)
        if kind == self.base:
            return
        measured = ratio / self.slowness(now)[1]
        if cost is None:
            self._costs[kind] = _Cost(measured, 1, now)
        else:
            known = self._costs[kind]
            known.batches += 1
            known.value += max(LEAST_WEIGHT, 1 / known.batches) * (measured - known.value)
            known.measured = now
        self._costs.move_to_end(kind)
        if len(self._costs) > KINDS:
            self._costs.popitem(last=False)
