"""Random latency tables and loads, for properties of policies."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmsnnet.serving.policy import LatencyTable, Load


@dataclass(frozen=True)
class Case:
    """A table with a load; ``rng`` draws what else a test needs."""

    table: LatencyTable
    load: Load
    rng: np.random.Generator


def random_table(rng: np.random.Generator) -> LatencyTable:
    """One to eight stitches with noisy latencies at one to four batch sizes; larger batches gain much or little."""
    sizes = sorted(rng.choice(np.arange(1, 13), rng.integers(1, 5), replace=False).tolist())
    overhead, each = rng.uniform(0, 20), rng.uniform(0.5, 10)
    latencies = {}
    for number in range(int(rng.integers(1, 9))):
        factor = 1 + number * rng.uniform(0, 1)
        latencies[f"stitch-{number}"] = {
            size: factor * (overhead + each * size) * rng.lognormal(0, 0.2) for size in sizes
        }
    return LatencyTable(latencies)


def random_load(rng: np.random.Generator, table: LatencyTable) -> Load:
    """Up to 30 requests, from hopeless to easy, with little demand or more than the table covers."""
    scale = table.ms[int(rng.integers(len(table)))][table.max_batch] * rng.uniform(0.1, 10)
    slacks = np.sort(rng.uniform(-0.1, 1, rng.integers(1, 31)) * scale).tolist()
    if rng.random() < 0.3:  # as many deadlines at once
        slacks = [max(slacks[0], scale / 2)] * len(slacks)
    mean_slowness = rng.lognormal(0, 0.3)
    demand = rng.uniform(0, 1.5) * table.throughput(0) * rng.integers(2)
    return Load(slacks, demand, mean_slowness * rng.uniform(1, 1.3), mean_slowness)


def cases(number: int = 400) -> Iterator[Case]:
    """Random cases, the same in each run."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        table = random_table(rng)
        yield Case(table, random_load(rng, table), rng)


def latencies(*times: tuple[float, ...]) -> dict[str, dict[int, float]]:
    """Latencies of stitches "0", "1", ... at the batch sizes 1, 2, ..."""
    return {str(number): dict(enumerate(row, 1)) for number, row in enumerate(times)}
