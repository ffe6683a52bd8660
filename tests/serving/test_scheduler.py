"""The queue of a device: properties over random histories."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from mmsnnet.serving.policy import POLICIES, FixedStitch, LatencyTable, LookAhead, Policy
from mmsnnet.serving.recent import MEMORY_MS
from mmsnnet.serving.scheduler import Batch, Request, Scheduler
from tests.serving.random_loads import latencies, random_table

TABLE = LatencyTable(latencies((10, 12, 14, 16), (40, 70, 100, 130)))
DEADLINE_MS = 100.0
ROUNDING = 1e-6


def table_ms(scheduler: Scheduler[int], batch: Batch[int]) -> float:
    return scheduler.policy.table.ms[batch.choice.stitch][len(batch.requests)]


class Device:
    """Runs the batches of a scheduler, in simulated time.

    Args:
        scheduler: of the device.
        ms: the time that a batch takes; by default that of the table.

    Attributes:
        now: the time.
        answered: each request with the time of its answer, in this order.
        batches: all that ran.
    """

    def __init__(self, scheduler: Scheduler[int], ms: Callable[[Batch[int]], float] | None = None) -> None:
        self.scheduler, self.ms = scheduler, ms or (lambda batch: table_ms(scheduler, batch))
        self.now, self._end = 0.0, 0.0
        self._running: Batch[int] | None = None
        self.answered: list[tuple[Request[int], float]] = []
        self.batches: list[Batch[int]] = []

    def run_until(self, now: float) -> None:
        """Run what starts before a time."""
        while self._running and self._end <= now:
            self.now = self._end
            self.scheduler.finished(self._running, self.now)
            self.answered += [(request, self.now) for request in self._running.requests]
            self._running = None
            self.start()
        self.now = max(self.now, now) if now < np.inf else self.now

    def start(self) -> None:
        """Start a batch if none runs."""
        if self._running is None and len(self.scheduler):
            self._running = self.scheduler.next_batch(self.now)
            self._end = self.now + self.ms(self._running)
            self.batches.append(self._running)

    def offer(self, item: int, deadline: float, kind: str = "base", guess: float = 1.0) -> Request[int] | None:
        """Offer a request now."""
        self.scheduler.arrived(self.now)
        request = self.scheduler.offer(item, self.now, deadline, kind, guess)
        self.start()
        return request

    def late(self) -> list[int]:
        """The items of the requests that missed their deadlines."""
        return [request.item for request, end in self.answered if end > request.deadline + ROUNDING]


def device(
    policy: Policy | None = None, max_waiting: int = 128, ms: Callable[[Batch[int]], float] | None = None
) -> Device:
    return Device(Scheduler(policy or LookAhead(TABLE), DEADLINE_MS, max_waiting, "base"), ms)


def arrivals(rng: np.random.Generator, pattern: str, rate: float, deadline_ms: float) -> Sequence[float]:
    """Times of requests: a steady flow, a flow that rises, or many at once after a time with few."""
    waits = rng.exponential(1 / rate, 200)
    if pattern == "ramp":
        waits *= np.linspace(4, 0.2, len(waits))
    if pattern == "bursts":
        waits *= np.where(np.arange(len(waits)) // 25 % 2, 0.1, 4)
    if pattern == "together":
        waits = np.where(np.arange(len(waits)) % 20, 0, deadline_ms * rng.uniform(0.1, 2))
    return np.cumsum(waits).tolist()


@pytest.mark.parametrize("pattern", ["steady", "ramp", "bursts", "together"])
def test_look_ahead_keeps_each_accepted_deadline_if_batches_take_the_predicted_time(pattern: str) -> None:
    """Requests may name deadlines of their own. Some are withdrawn."""
    outcomes: Counter[str] = Counter()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        table = random_table(rng)
        deadline_ms = table.ms[-1][1] * rng.uniform(0.3, 5)
        simulated = Device(Scheduler(LookAhead(table), deadline_ms, base="base"))
        accepted = []
        for item, time in enumerate(arrivals(rng, pattern, table.throughput(0) * rng.uniform(0.2, 2), deadline_ms)):
            simulated.run_until(time)
            own = rng.uniform(0.2, 3) if rng.random() < 0.3 else 1.0
            request = simulated.offer(item, time + own * deadline_ms)
            accepted += [request] if request else []
            outcomes["refused"] += request is None
            if accepted and rng.random() < 0.05:
                simulated.scheduler.withdraw(accepted[rng.integers(len(accepted))])
        simulated.run_until(np.inf)
        assert simulated.late() == [], seed
        outcomes["answered"] += len(simulated.answered)
        outcomes["costlier"] += sum(batch.choice.stitch > 0 for batch in simulated.batches)
    assert min(outcomes[key] for key in ("refused", "answered", "costlier")) > 200, outcomes


def policies() -> list[Policy]:
    return [*(policy(TABLE) for policy in POLICIES.values()), FixedStitch(TABLE, 1)]


@pytest.mark.parametrize("policy", policies(), ids=[*POLICIES, "fixed"])
def test_each_accepted_request_runs_once_unless_it_was_withdrawn(policy: Policy) -> None:
    """Whatever the order of events; deadlines may have passed, batches may fail or take any time."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scheduler: Scheduler[int] = Scheduler(policy, DEADLINE_MS, int(rng.integers(1, 20)), "base")
        now, running = 0.0, None
        waiting: dict[int, Request[int]] = {}
        ran: Counter[int] = Counter()
        accepted: set[int] = set()
        withdrawn: set[int] = set()
        for item in range(300):
            now += rng.exponential(10)
            event = rng.choice(["offer", "offer", "withdraw", "batch", "end"])
            if event == "offer":
                scheduler.arrived(now)
                deadline = now + DEADLINE_MS * rng.uniform(-0.1, 3)
                request = scheduler.offer(item, now, deadline, str(rng.choice(["base", "a", "b"])), rng.uniform(0.2, 4))
                if request is not None:
                    waiting[item] = request
                    accepted.add(item)
            elif event == "withdraw" and accepted:
                gone = int(rng.choice(sorted(accepted)))  # it may wait, run, or have run
                if gone in waiting:
                    scheduler.withdraw(waiting.pop(gone))
                    withdrawn.add(gone)
            elif event == "batch" and running is None and len(scheduler):
                running = scheduler.next_batch(now)
                for request in running.requests:
                    ran[request.item] += 1
                    del waiting[request.item]
            elif event == "end" and running is not None:
                if rng.random() < 0.3:
                    scheduler.failed()
                else:
                    scheduler.finished(running, now)
                running = None
            assert len(scheduler) == len(waiting) <= scheduler.max_waiting
        if running is not None:
            scheduler.finished(running, now)
        while len(scheduler):
            running = scheduler.next_batch(now)
            ran.update(request.item for request in running.requests)
            scheduler.finished(running, now := now + 1)
        assert set(ran) == accepted - withdrawn and set(ran.values()) <= {1}, seed


def test_a_batch_has_one_kind_the_most_urgent_first() -> None:
    """The first of the queue always runs, and no request waits for a later one of its kind."""
    mixed = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        scheduler: Scheduler[int] = Scheduler(LookAhead(TABLE), DEADLINE_MS, base="base")
        waiting = []
        for item in range(int(rng.integers(1, 20))):
            kind = str(rng.choice(["base", "a", "b"]))
            request = scheduler.offer(item, 0.0, 1000 * rng.uniform(0.5, 1), kind, 1.0)
            assert request is not None
            waiting.append(request)
        while waiting:
            waiting.sort(key=lambda request: request.deadline)
            batch = scheduler.next_batch(0.0)
            kind = waiting[0].kind
            of_kind = [request for request in waiting if request.kind == kind]
            assert list(batch.requests) == of_kind[: len(batch.requests)]
            mixed += len(of_kind) < len(waiting)
            waiting = [request for request in waiting if request not in batch.requests]
            scheduler.failed()
    assert mixed > 40


def test_a_costly_kind_in_front_gets_a_stitch_that_is_in_time() -> None:
    """Cheaper kinds behind it do not make it cheaper."""
    scheduler: Scheduler[int] = Scheduler(LookAhead(TABLE), 10 * DEADLINE_MS, base="base")
    scheduler.speed.observe("large", 2.5, 0.0)
    for item, kind in enumerate(["large", "base", "base", "base"]):
        assert scheduler.offer(item, 0.0, 90.0 + item, kind)
    batch = scheduler.next_batch(0.0)
    assert [request.kind for request in batch.requests] == ["large"]
    assert batch.choice.ms <= 90


def test_a_late_request_lets_those_pass_that_can_be_in_time_and_is_answered() -> None:
    """A device stops for a while with three requests in its queue. One is late after it, two are not."""
    stops = device(ms=lambda batch: 150.0 if batch.requests[0].item == 0 else 10.0)
    for item, deadline in enumerate([40.0, 60.0, 210.0, 220.0]):
        assert stops.offer(item, deadline)
    stops.run_until(np.inf)
    assert [request.item for request, _ in stops.answered] == [0, 2, 3, 1]
    assert stops.late() == [0, 1]


def test_a_late_request_waits_for_others_for_one_deadline() -> None:
    """It does not wait for ever, however many come."""
    stops = device(ms=lambda batch: 150.0 if batch.requests[0].item == 0 else 9.0)
    assert stops.offer(0, 40.0) and stops.offer(1, 60.0)
    item = 2
    for time in np.arange(100.0, 600.0, 8.0):
        stops.run_until(time)
        stops.offer(item, time + DEADLINE_MS)
        item += 1
    stops.run_until(np.inf)
    ends = {request.item: end for request, end in stops.answered}
    assert ends[1] <= 150 + 2 * DEADLINE_MS
    assert stops.late() == [0, 1]


def test_a_request_is_refused_if_the_cheapest_stitch_would_miss_a_deadline() -> None:
    busy = device()
    assert busy.offer(0, 9.9) is None
    assert busy.offer(0, 10.0)  # runs until 10
    assert busy.offer(1, 19.9) is None
    assert busy.offer(1, 25.0)
    assert busy.offer(2, 21.9) is None  # a batch of two takes 12
    assert busy.offer(2, 22.0)
    assert busy.offer(3, 23.0) is None  # a third would make the others late
    busy.run_until(np.inf)
    assert [request.item for request, _ in busy.answered] == [0, 2, 1]
    assert busy.late() == []


def test_a_batch_that_takes_far_longer_than_predicted_lets_no_more_in_than_can_be_answered() -> None:
    stuck = device(ms=lambda batch: np.inf)
    assert stuck.offer(0, 10.0)  # runs for 10, as predicted
    stuck.now = 15.0
    second = stuck.offer(1, 25.0)  # a little late: it can end at any time
    assert second
    stuck.now = 1000.0
    assert stuck.scheduler.drained_ms(1000.0) == 990 + 4
    assert stuck.offer(2, 1000 + DEADLINE_MS) is None
    stuck.scheduler.withdraw(second)
    stuck.scheduler.failed()
    assert stuck.offer(2, 1000 + DEADLINE_MS)


def test_a_fixed_stitch_refuses_what_it_cannot_answer_itself() -> None:
    assert device(FixedStitch(TABLE, 0)).offer(0, 39.0)
    assert device(FixedStitch(TABLE, 1)).offer(0, 39.0) is None


def test_a_full_queue_refuses() -> None:
    full = device(max_waiting=3)
    assert all(full.offer(item, 1e6) for item in range(4))  # one of them runs
    assert full.offer(4, 1e6) is None
    assert not full.scheduler.accepts(full.now, 1e6)
    full.run_until(130.0)
    assert full.offer(4, 1e6)


def test_places_are_kept_for_requests_that_come_first() -> None:
    scheduler: Scheduler[int] = Scheduler(LookAhead(TABLE), DEADLINE_MS, 4, "base")
    assert scheduler.accepts(0.0, DEADLINE_MS, beside=3)
    assert not scheduler.accepts(0.0, DEADLINE_MS, beside=4)
    assert not Scheduler(LookAhead(TABLE), 15.0, base="base").accepts(0.0, 15.0, beside=3, cost=1.0)  # four take 16 ms


def test_the_demand_counts_refused_requests_and_forgets() -> None:
    """A burst that is refused has the next request answered by a cheap stitch; after it, the best one answers."""
    bursts = device()
    for _ in range(20):
        assert bursts.offer(0, bursts.now + 1.0) is None
    bursts.offer(1, bursts.now + DEADLINE_MS)
    bursts.run_until(150.0)
    bursts.offer(2, bursts.now + DEADLINE_MS)
    bursts.run_until(np.inf)
    assert [batch.stitch for batch in bursts.batches] == ["0", "1"]


def test_arrivals_do_not_pile_up_while_all_are_refused() -> None:
    refuses = device()
    for time in range(5000):
        refuses.run_until(float(time))
        assert refuses.offer(time, time + 1.0) is None
    assert len(refuses.scheduler._arrivals) <= DEADLINE_MS


def test_the_first_of_an_unknown_kind_is_let_in_and_its_cost_learned_and_forgotten() -> None:
    """Large images are guessed to be hopeless, and cost twice as much as others."""

    def ms(batch: Batch[int]) -> float:
        return (2 if batch.requests[0].kind == "large" else 1) * table_ms(learns.scheduler, batch)

    learns = device(ms=ms)
    assert learns.offer(0, 15.0, "large", 25.0)  # a probe, as if it cost 1
    assert learns.offer(1, 1000.0, "large", 25.0)  # 20 ms of table, 25 times
    assert learns.offer(2, 240.0, "large", 25.0) is None
    learns.run_until(2000.0)
    assert learns.scheduler.speed.cost("large", learns.now) == pytest.approx(2)
    assert learns.scheduler.least_ms(learns.now, "large", 25.0) == pytest.approx(20)
    assert learns.offer(3, learns.now + 19.0, "large", 25.0) is None
    assert learns.offer(4, learns.now + 21.0, "large", 25.0)
    learns.run_until(2000.0 + 2 * MEMORY_MS)
    assert learns.scheduler.speed.cost("large", learns.now) is None
    assert learns.offer(5, learns.now + 19.0, "large", 25.0)
    learns.run_until(np.inf)
    assert learns.late() == [0, 5]
    assert {request.item for request, _ in learns.answered} == {0, 1, 4, 5}


def test_slowness_is_learned_and_forgotten() -> None:
    """A device that is three times as slow refuses more, and chooses a cheaper stitch."""
    slow = device(ms=lambda batch: 3 * table_ms(slow.scheduler, batch))
    assert slow.offer(0, 45.0)
    slow.run_until(1000.0)
    assert slow.batches[-1].stitch == "1"
    assert slow.offer(1, slow.now + 29.0) is None
    assert slow.scheduler.least_ms(slow.now, "base", 1.0) == pytest.approx(30)
    assert slow.offer(2, slow.now + 45.0)
    slow.run_until(2000.0 + MEMORY_MS)
    assert slow.batches[-1].stitch == "0"
    assert slow.offer(3, slow.now + 29.0)


def test_failed_batches_say_nothing_of_the_speed_and_free_the_device() -> None:
    scheduler: Scheduler[int] = Scheduler(LookAhead(TABLE), DEADLINE_MS, base="base")
    scheduler.offer(0, 0.0, DEADLINE_MS, "base")
    scheduler.next_batch(0.0)
    assert scheduler.drained_ms(0.0) == 40
    scheduler.failed()
    assert scheduler.drained_ms(1.0) == 0
    assert scheduler.speed.slowness(1.0) == (1, 1)


def test_the_time_to_empty_the_queue_is_that_of_the_cheapest_stitch() -> None:
    scheduler: Scheduler[int] = Scheduler(LookAhead(TABLE), DEADLINE_MS, base="base")
    for item in range(8):
        scheduler.offer(item, 0.0, 1000.0, "base")
    assert scheduler.drained_ms(0.0) == pytest.approx(32)  # two batches of four


def test_a_kind_that_would_block_the_device_is_not_tried() -> None:
    """By its guess: the cheapest stitch takes 10 ms, so 31 times as much is more than three deadlines."""
    policy = LookAhead(LatencyTable(dict(S={1: 10.0})))
    assert Scheduler[str](policy, 100.0).offer("a", 0.0, 100.0, "large", 29.0) is not None
    assert Scheduler[str](policy, 100.0).offer("a", 0.0, 100.0, "huge", 31.0) is None


def test_a_costly_request_does_not_slip_in_among_cheap_ones() -> None:
    """Batches of the others hardly cost more than one image, but the costly one runs alone."""
    scheduler = Scheduler[str](LookAhead(LatencyTable(dict(S={1: 10.0, 8: 12.0}))), 100.0)
    for name in "abcdefg":
        assert scheduler.offer(name, 0.0, 100.0) is not None
    assert scheduler.offer("guessed", 0.0, 100.0, "huge", 50.0) is None
    scheduler.speed.observe("measured", 11.0, 0.0)
    assert scheduler.offer("measured", 0.0, 100.0, "measured") is None
    assert scheduler.offer("in time", 0.0, 120.0, "measured") is not None
