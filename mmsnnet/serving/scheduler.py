"""The queue of one device: which requests are accepted, which batch runs next, and how slow the device is now.

Pure arithmetic: the caller passes the time, in milliseconds since any moment. A replica of the server and the
simulation of ``benchmarks/serving.py`` run the same code.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from mmsnnet.serving.policy import Choice, Load, Policy
from mmsnnet.serving.speed import Speed

T = TypeVar("T")

# A request of an unknown kind may take the device for this many deadlines, by its guess.
MOST_PROBE = 3


@dataclass(order=True)
class Request(Generic[T]):
    """A request in the queue.

    Attributes:
        due: the time that orders the queue: the deadline, or a later time if the deadline can no longer be met.
        number: of arrival.
        arrival: when it came.
        deadline: when its answer should leave the device.
        kind: requests of one kind can share a batch, such as images of one size.
        guess: the cost of its kind, as long as it was not measured.
        item: what the caller knows it by.
    """

    due: float
    number: int
    arrival: float = field(compare=False)
    deadline: float = field(compare=False)
    kind: Hashable = field(compare=False)
    guess: float = field(compare=False)
    item: T = field(compare=False)


@dataclass(frozen=True)
class Batch(Generic[T]):
    """Requests that run together.

    Attributes:
        stitch: the name of the stitch.
        choice: of the policy.
        requests: the most urgent first.
        started: when.
    """

    stitch: str
    choice: Choice
    requests: tuple[Request[T], ...]
    started: float


class Scheduler(Generic[T]):
    """The queue of a device that runs one batch after the other.

    Args:
        policy: chooses stitch and batch size.
        deadline_ms: the usual time from arrival to deadline. Demand is measured over as long.
        max_waiting: the longest queue.
        base: the kind of requests that the policy's latencies are for.

    Attributes:
        speed: what was learned about the device.
    """

    def __init__(self, policy: Policy, deadline_ms: float, max_waiting: int = 128, base: Hashable = None) -> None:
        self.policy, self.deadline_ms, self.max_waiting = policy, deadline_ms, max_waiting
        self.speed = Speed(base)
        self._waiting: list[Request[T]] = []
        self._arrivals: deque[float] = deque()
        self._running: Batch[T] | None = None
        self._count = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def arrived(self, now: float) -> None:
        """Count a request in the demand, whether it will be accepted, refused, or sent to another replica then."""
        self._arrivals.append(now)
        self._forget_arrivals(now)

    def offer(
        self, item: T, now: float, deadline: float, kind: Hashable = None, guess: float = 1.0
    ) -> Request[T] | None:
        """Put a request into the queue, if its deadline and those of all others can be met.

        The first request of a kind whose cost is unknown is let in as if it cost 1, to measure its cost. It is not if
        its guess says that it would block the device for several deadlines: a batch that runs cannot be ended.

        Args:
            item: what the caller knows it by.
            now: the time.
            deadline: when its answer should leave the device.
            kind, guess: as of :class:`Request`.

        Returns:
            The request, or None if the queue is full or even the cheapest stitch would be too slow.
        """
        cost = self.speed.cost(kind, now)
        if cost is None:
            running = self._running.requests if self._running else ()
            is_known = any(request.kind == kind for request in (*self._waiting, *running))
            blocks = self.least_ms(now, kind, guess) > MOST_PROBE * self.deadline_ms
            cost = guess if is_known or blocks else min(1.0, guess)
        if not self.accepts(now, deadline, cost=cost):
            return None
        request = Request(deadline, self._count, now, deadline, kind, guess, item)
        self._count += 1
        insort(self._waiting, request)
        return request

    def accepts(self, now: float, deadline: float, *, beside: int = 0, cost: float = 0.0) -> bool:
        """Whether a request with this deadline could be put into the queue.

        Args:
            now: the time.
            deadline: of the request.
            beside: requests with the usual deadline that will come before it.
            cost: of the request; 0 asks for its place alone.
        """
        if len(self._waiting) + beside >= self.max_waiting:
            return False
        dues = [*(request.due for request in self._waiting), *[now + self.deadline_ms] * beside, deadline]
        costs = [*(self._cost(request, now) for request in self._waiting), *[1.0] * beside, cost]
        slowness = self.speed.slowness(now)[0]
        # The mean below would hide one image that alone takes longer than its time.
        if slowness * cost * self.policy.table.ms[self.policy.cheapest][1] > deadline - now:
            return False
        slowness *= sum(costs) / len(costs)
        load = Load(sorted(due - now for due in dues), slowness=slowness)
        return self.policy.table.meets_all(self.policy.cheapest, load, delay=self._busy_ms(now))

    def withdraw(self, request: Request[T]) -> None:
        """Take a request out of the queue, if it is there, as when its client has gone."""
        self._waiting = [other for other in self._waiting if other is not request]

    def drained_ms(self, now: float) -> float:
        """The time until the cheapest stitch has emptied the queue."""
        table, stitch = self.policy.table, self.policy.cheapest
        costs = sum(self._cost(request, now) for request in self._waiting)
        return self._busy_ms(now) + costs * self.speed.slowness(now)[1] / table.throughput(stitch)

    def least_ms(self, now: float, kind: Hashable, guess: float) -> float:
        """The time of the cheapest stitch for one request of a kind."""
        known = self.speed.cost(kind, now)
        cost = guess if known is None else known
        return self.speed.slowness(now)[0] * cost * self.policy.table.ms[self.policy.cheapest][1]

    def next_batch(self, now: float) -> Batch[T]:
        """Take the next batch out of the queue, which must not be empty."""
        self._postpone_late(now)
        load = self._load(now)
        choice = self.policy.choose(load)
        kind = self._waiting[0].kind
        chosen = tuple(request for request in self._waiting if request.kind == kind)[: choice.batch_size]
        numbers = {request.number for request in chosen}
        ms = self.speed.slowness(now)[0] * self._cost(chosen[0], now) * self.policy.table.ms[choice.stitch][len(chosen)]
        self._waiting = [request for request in self._waiting if request.number not in numbers]
        choice = Choice(choice.stitch, len(chosen), ms)
        self._running = Batch(self.policy.table.names[choice.stitch], choice, chosen, now)
        return self._running

    def finished(self, batch: Batch[T], now: float) -> None:
        """Learn from the time that a batch has taken."""
        predicted = self.policy.table.ms[batch.choice.stitch][len(batch.requests)]
        self.speed.observe(batch.requests[0].kind, (now - batch.started) / predicted, now)
        self._running = None

    def failed(self) -> None:
        """A batch has ended without result."""
        self._running = None

    def _busy_ms(self, now: float) -> float:
        """The predicted rest of the batch that runs; of one that is long overdue, as long as it is overdue."""
        if self._running is None:
            return 0.0
        rest = self._running.started + self._running.choice.ms - now
        return -rest if -rest > min(self._running.choice.ms, self.deadline_ms) else max(0.0, rest)

    def _cost(self, request: Request[T], now: float) -> float:
        known = self.speed.cost(request.kind, now)
        return request.guess if known is None else known

    def _load(self, now: float) -> Load:
        self._forget_arrivals(now)
        costs = [self._cost(request, now) for request in self._waiting]
        mean_cost = sum(costs) / len(costs)
        slacks = [request.due - now for request in self._waiting]
        demand = (len(self._arrivals) + len(slacks) - 1) / self.deadline_ms
        slowness, mean_slowness = self.speed.slowness(now)
        # The next batch has the kind of the first request, which may cost more than the others.
        return Load(slacks, demand, max(costs[0], mean_cost) * slowness, mean_cost * mean_slowness, self.deadline_ms)

    def _forget_arrivals(self, now: float) -> None:
        while self._arrivals and self._arrivals[0] <= now - self.deadline_ms:
            self._arrivals.popleft()

    def _postpone_late(self, now: float) -> None:
        """Let requests whose deadline cannot be met wait for those whose deadline can, but only once.

        They would delay the others, which would then be late, too.
        """
        fastest = self.speed.slowness(now)[0] * self.policy.table.ms[self.policy.cheapest][1]
        for request in self._waiting:
            if request.due == request.deadline < now + fastest * self._cost(request, now):
                request.due = now + self.deadline_ms
        self._waiting.sort()
