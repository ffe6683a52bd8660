"""Which stitch and how many images next: policies of a server under load. Pure arithmetic, without clock or threads.

A device runs batches one after the other, without interrupting them. When it is free, a policy reads the
:class:`Load` and returns a :class:`Choice`. All times are milliseconds, and rates are requests per millisecond.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mmsnnet.errors import SettingError

# Draining takes the smallest batches that reach this share of the highest throughput: larger ones delay the first image
# and gain nothing.
NEARLY_FASTEST = 0.95
# The demand that a stitch may have over its throughput: what waits has mostly come within the last deadline, so the
# demand counts it twice.
KEEPS_UP = 1.25
BUCKETS = 16
# Of a request or of a server.
LONGEST_DEADLINE_MS = 600_000


@dataclass(frozen=True)
class Load:
    """The work that waits for a device.

    Attributes:
        slacks: the time until the deadline of each waiting request, smallest first; negative where it has passed.
        demand: how many requests to answer over the time of one deadline, divided by this time: those that wait behind
            the first, and as many as came in the last one.
        slowness: measured over predicted latency of recent batches, a high quantile: predicts when a batch ends.
        mean_slowness: their mean: predicts the throughput.
        deadline_ms: the usual time from arrival to deadline.
    """

    slacks: Sequence[float]
    demand: float = 0.0
    slowness: float = 1.0
    mean_slowness: float = 1.0
    deadline_ms: float = math.inf


@dataclass(frozen=True)
class Choice:
    """The next batch.

    Attributes:
        stitch: the place of the stitch in the latency table.
        batch_size: how many requests, the most urgent first.
        ms: its predicted latency.
    """

    stitch: int
    batch_size: int
    ms: float


class LatencyTable:
    """The latency of a batch for each stitch and each batch size.

    Sizes between measured ones are interpolated. Measured times are noisy: neither a better stitch nor a larger batch
    counts as faster than a worse or smaller one.

    Args:
        latencies: the time of a batch by stitch name, worst stitch first, and by batch size, the same for all stitches.

    Attributes:
        names: of the stitches, worst first.
        max_batch: the largest batch.
        ms: by stitch and batch size; the time of an empty batch is 0.

    Raises:
        SettingError: there are no latencies, one is not positive and finite, or stitches have different batch sizes.
    """

    def __init__(self, latencies: Mapping[str, Mapping[int, float]]) -> None:
        self.names = tuple(latencies)
        sizes = sorted(next(iter(latencies.values()), {}))
        if not sizes or any(sorted(row) != sizes for row in latencies.values()):
            raise SettingError(
                "serving needs the latency of each stitch at the same batch sizes: "
                "tools/analysis_tools/benchmark.py CONFIG --batch-sizes 1,2,4,8 --out FILE.json measures them"
            )
        if sizes[0] < 1:
            raise SettingError(f"batch sizes are positive, got {sizes[0]}")
        for ms in (row[size] for row in latencies.values() for size in sizes):
            if not 0 < ms < math.inf:
                raise SettingError(f"latencies are positive, got {ms} ms")
        times = np.array([[row[size] for size in sizes] for row in latencies.values()], dtype=float)
        times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)
        self.max_batch = sizes[-1]
        # Below the smallest measured size a batch takes as long as one of that size.
        counts = range(1, self.max_batch + 1)
        self.ms = tuple((0.0, *np.interp(counts, sizes, row).tolist()) for row in times)
        self._throughputs = [max(count / row[count] for count in counts) for row in self.ms]
        self._drain_batches = [
            next(count for count in counts if count / row[count] >= NEARLY_FASTEST * throughput)
            for row, throughput in zip(self.ms, self._throughputs, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.names)

    def throughput(self, stitch: int) -> float:
        """Images per millisecond at the best batch size."""
        return self._throughputs[stitch]

    def drain_batch(self, stitch: int) -> int:
        """The batch size that empties a queue."""
        return self._drain_batches[stitch]

    def meets_all(self, stitch: int, load: Load, skip: int = 0, delay: float = 0.0) -> bool:
        """Whether a stitch meets the deadlines of all requests after the first ``skip``, starting after ``delay``."""
        batch, end = self.drain_batch(stitch), delay
        for first in range(skip, len(load.slacks), batch):
            end += load.slowness * self.ms[stitch][min(batch, len(load.slacks) - first)]
            if end > load.slacks[first]:
                return False
        return True


class Policy(Protocol):
    """Chooses the next batch."""

    @property
    def table(self) -> LatencyTable:
        """The latencies."""

    @property
    def cheapest(self) -> int:
        """The fastest stitch that the policy may choose: requests that it cannot answer in time are refused."""

    def choose(self, load: Load) -> Choice:
        """The next batch of at least one request; ``load`` has at least one."""


def _choice(table: LatencyTable, load: Load, stitch: int, batch_size: int) -> Choice:
    return Choice(stitch, batch_size, load.slowness * table.ms[stitch][batch_size])


def _largest_batch(table: LatencyTable, load: Load, stitch: int) -> int:
    """The largest batch that meets the deadline of the most urgent request; 0 if none does."""
    most = min(len(load.slacks), table.max_batch)
    return max(0, bisect_right(table.ms[stitch], load.slacks[0] / load.slowness, hi=most + 1) - 1)


def _drain(table: LatencyTable, load: Load, stitch: int) -> Choice:
    """The batch that empties the queue as fast as the stitch can, of one that meets the first deadline if possible."""
    batch = min(len(load.slacks), table.drain_batch(stitch))
    in_time = _largest_batch(table, load, stitch) if load.slacks[0] > 0 else 0
    return _choice(table, load, stitch, min(batch, in_time) if in_time > 0 else batch)


@dataclass(frozen=True)
class LookAhead:
    """The best stitch that keeps up: our policy.

    A stitch and a batch size are possible if

    1. the batch ends before the first deadline,
    2. the cheapest stitch could then meet all other deadlines, and
    3. the stitch's throughput, times ``KEEPS_UP``, covers the demand. The cheapest stitch need not: nothing is faster.

    The best possible stitch runs, with its largest possible batch. A batch of several images also leaves time for the
    cheapest stitch to answer a request that comes just after it has started. Where nothing is possible, the cheapest
    stitch empties the queue. A longer slack never leads to a worse stitch, and a single request without others gets the
    best stitch that meets its deadline.

    SuperServe's SlackFit (arXiv 2312.16733) reads only the slack of the most urgent request, so it reacts once waiting
    has used the slack up. The second and third conditions act before.
    """

    table: LatencyTable
    cheapest: int = 0

    def choose(self, load: Load) -> Choice:
        next_ms = load.slowness * self.table.ms[0][self.table.drain_batch(0)]
        for stitch in reversed(range(len(self.table))):
            if stitch > 0 and load.mean_slowness * load.demand > KEEPS_UP * self.table.throughput(stitch):
                continue
            for batch in range(_largest_batch(self.table, load, stitch), 0, -1):
                choice = _choice(self.table, load, stitch, batch)
                if stitch > 0 and batch > 1 and choice.ms + next_ms > load.deadline_ms:
                    continue
                if self.table.meets_all(0, load, batch, choice.ms):
                    return choice
        return _drain(self.table, load, 0)


class SlackFit:
    """SuperServe's policy (arXiv 2312.16733): buckets of latency, picked by the slack of the most urgent request.

    All pairs of stitch and batch size are sorted into buckets of equal width by their latency. The policy takes the
    highest bucket that ends before the first deadline, and in it the largest batch, then the best stitch. Pairs whose
    batch exceeds the queue are left out.

    Args:
        table: latencies.
        buckets: how many.
    """

    cheapest = 0

    def __init__(self, table: LatencyTable, buckets: int = BUCKETS) -> None:
        self.table = table
        pairs = [
            Choice(stitch, batch, table.ms[stitch][batch])
            for stitch in range(len(table))
            for batch in range(1, table.max_batch + 1)
        ]
        low, high = min(pair.ms for pair in pairs), max(pair.ms for pair in pairs)
        width = (high - low) / buckets or 1.0
        self._buckets: list[list[Choice]] = [[] for _ in range(buckets)]
        for pair in pairs:
            self._buckets[min(int((pair.ms - low) / width), buckets - 1)].append(pair)

    def choose(self, load: Load) -> Choice:
        for bucket in reversed(self._buckets):
            fitting = [
                pair
                for pair in bucket
                if pair.batch_size <= len(load.slacks) and load.slowness * pair.ms <= load.slacks[0]
            ]
            if fitting:
                pair = max(fitting, key=lambda pair: (pair.batch_size, pair.stitch))
                return _choice(self.table, load, pair.stitch, pair.batch_size)
        return _drain(self.table, load, 0)


@dataclass(frozen=True)
class Greedy:
    """The best stitch that meets the first deadline, with the largest batch that still does."""

    table: LatencyTable
    cheapest: int = 0

    def choose(self, load: Load) -> Choice:
        for stitch in reversed(range(len(self.table))):
            if (batch := _largest_batch(self.table, load, stitch)) > 0:
                return _choice(self.table, load, stitch, batch)
        return _drain(self.table, load, 0)


@dataclass(frozen=True)
class FixedStitch:
    """Always one stitch, with the largest batch that meets the first deadline: a model that does not adapt."""

    table: LatencyTable
    cheapest: int

    def choose(self, load: Load) -> Choice:
        batch = _largest_batch(self.table, load, self.cheapest)
        return _choice(self.table, load, self.cheapest, batch) if batch > 0 else _drain(self.table, load, self.cheapest)


POLICIES: dict[str, Callable[[LatencyTable], Policy]] = {
    "look-ahead": LookAhead,
    "slackfit": SlackFit,
    "greedy": Greedy,
}
