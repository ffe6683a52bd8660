"""Replay a trace of arrivals through the server's scheduler in simulated time."""

import heapq
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, quantiles

from mmsnnet.serving.answers import ATTEMPTS
from mmsnnet.serving.policy import Policy
from mmsnnet.serving.scheduler import Batch, Scheduler

# The rate of arrivals at a part of a trace, from 0 to 1, as a share of what the cheapest stitch can answer on all
# replicas in its best batches. ``top`` is what the costliest stitch can answer, as the same share.
Rate = Callable[[float, float], float]


def steady(part: float, top: float) -> float:
    """The same load all the time: twice what the costliest stitch can answer, or half-way to the cheapest if less."""
    return min(2 * top, (1 + top) / 2)


def ramp(part: float, top: float) -> float:
    """From nothing to 0.9 of what the cheapest stitch can answer, and back."""
    return 0.9 * (1 - abs(2 * part - 1))


def burst(part: float, top: float) -> float:
    """Half of what the costliest stitch can answer, but in three bursts 0.85 of what the cheapest can.

    Each burst takes a thirtieth of the trace: two seconds of a minute.
    """
    return 0.85 if part * 3 % 1 > 0.9 else top / 2


def day(part: float, top: float) -> float:
    """A day in fast motion.

    The night has a tenth of what the costliest stitch can answer. The load rises from 6:00, to 0.6 of what the cheapest
    stitch can answer at 13:00, and falls until 20:00. From 18:00 to 18:30 a burst adds 0.25.
    """
    light = max(0.0, math.sin(math.pi * (part * 24 - 6) / 14)) if 6 < part * 24 < 20 else 0.0
    return 0.1 * top + 0.6 * light**2 + (0.25 if 18 < part * 24 < 18.5 else 0.0)


TRACES: dict[str, Rate] = dict(steady=steady, ramp=ramp, burst=burst, day=day)


def arrivals(rate: Rate, top: float, most: float, duration_ms: float, seed: int) -> Iterator[float]:
    """Yield the times of a Poisson process in ms, whose rate is ``rate`` times ``most`` requests per ms."""
    rng, now = random.Random(seed), 0.0
    while (now := now + rng.expovariate(most)) < duration_ms:
        if rng.random() < rate(now / duration_ms, top):
            yield now


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of a trace.

    Attributes:
        attained: the share that was answered before the deadline.
        quality: the mean quality of the stitches that answered; NaN without an answer.
        rejected, late: the shares that were refused at once, and answered after the deadline.
        p50, p99: percentiles of the times to the answer, in ms.
    """

    requests: int
    attained: float
    quality: float
    rejected: float
    late: float
    p50: float
    p99: float


def simulate(
    times: Sequence[float],
    policies: Sequence[Policy],
    qualities: Sequence[float],
    deadline_ms: float,
    *,
    noise: float = 0.05,
    seed: int = 0,
) -> Outcome:
    """Serve a trace with one replica for each policy.

    A request goes to the replica with fewer requests of two that are drawn, as Ray Serve routes, and a refused one once
    more, as the gateway does. A batch takes its latency times a log-normal factor.

    Args:
        times: of arrivals in ms, ascending.
        policies: of the replicas.
        qualities: of the stitches of their tables.
        deadline_ms: from arrival to answer.
        noise: the standard deviation of the factor's logarithm.
        seed: of routing and noise.
    """
    rng = random.Random(seed)
    replicas: list[Scheduler[float]] = [Scheduler(policy, deadline_ms) for policy in policies]
    running: list[Batch[float] | None] = [None] * len(replicas)
    ends: list[tuple[float, int]] = []
    waits: list[float] = []
    answered: list[float] = []
    rejected = in_time = 0

    def load(replica: int) -> int:
        batch = running[replica]
        return len(replicas[replica]) + (len(batch.requests) if batch else 0)

    def start(replica: int, now: float) -> None:
        batch = running[replica] = replicas[replica].next_batch(now)
        ms = policies[replica].table.ms[batch.choice.stitch][len(batch.requests)]
        heapq.heappush(ends, (now + ms * rng.lognormvariate(0, noise), replica))

    def finish_until(now: float) -> None:
        nonlocal in_time
        while ends and ends[0][0] <= now:
            end, replica = heapq.heappop(ends)
            batch = running[replica]
            assert batch is not None
            running[replica] = None
            replicas[replica].finished(batch, end)
            for request in batch.requests:
                waits.append(end - request.arrival)
                answered.append(qualities[batch.choice.stitch])
                in_time += end <= request.deadline
            if len(replicas[replica]):
                start(replica, end)

    for now in times:
        finish_until(now)
        for _ in range(min(ATTEMPTS, len(replicas))):
            drawn = rng.sample(range(len(replicas)), min(2, len(replicas)))
            replica = min(drawn, key=load)
            replicas[replica].arrived(now)
            if replicas[replica].offer(now, now, now + deadline_ms) is not None:
                if running[replica] is None:
                    start(replica, now)
                break
        else:
            rejected += 1
    finish_until(math.inf)
    cuts = quantiles(waits, n=100, method="inclusive") if len(waits) > 1 else [math.nan] * 99
    return Outcome(
        requests=len(times),
        attained=in_time / len(times),
        quality=mean(answered) if answered else math.nan,
        rejected=rejected / len(times),
        late=(len(answered) - in_time) / len(times),
        p50=cuts[49],
        p99=cuts[98],
    )
