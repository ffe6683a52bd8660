"""Which stitch and how many images next: properties of the policies, over random tables and loads."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mmsnnet.errors import SettingError
from mmsnnet.serving.policy import (
    POLICIES,
    Choice,
    FixedStitch,
    Greedy,
    LatencyTable,
    Load,
    LookAhead,
    Policy,
    SlackFit,
)
from tests.serving.random_loads import Case, cases, latencies

# Products and quotients of the same times differ by rounding.
ROUNDING = 1e-9


def policies(case: Case) -> list[Policy]:
    """One of each class; a random fixed stitch."""
    table = case.table
    return [LookAhead(table), SlackFit(table), Greedy(table), FixedStitch(table, int(case.rng.integers(len(table))))]


def allowed(policy: Policy) -> list[int]:
    """The stitches that a policy may choose."""
    return [policy.cheapest] if isinstance(policy, FixedStitch) else list(range(len(policy.table)))


def in_time(case: Case, stitch: int, batch_size: int) -> bool:
    return case.load.slowness * case.table.ms[stitch][batch_size] <= case.load.slacks[0]


def test_no_policy_misses_the_first_deadline_if_it_can_be_met() -> None:
    possible: Counter[bool] = Counter()
    for case in cases():
        for policy in policies(case):
            choice = policy.choose(case.load)
            # One request is the fastest batch.
            can = any(in_time(case, stitch, 1) for stitch in allowed(policy))
            if can:
                assert choice.ms <= case.load.slacks[0] + ROUNDING, (policy, case)
            possible[can] += 1
    assert min(possible[True], possible[False]) > 100


def test_a_choice_is_within_the_queue_and_the_table_and_predicts_its_time() -> None:
    for case in cases():
        for policy in policies(case):
            choice = policy.choose(case.load)
            assert choice.stitch in allowed(policy)
            assert 1 <= choice.batch_size <= min(len(case.load.slacks), case.table.max_batch)
            expected = case.load.slowness * case.table.ms[choice.stitch][choice.batch_size]
            assert choice.ms == pytest.approx(expected)


def test_look_ahead_leaves_all_other_deadlines_possible_if_any_choice_does() -> None:
    left: Counter[bool] = Counter()
    for case in cases(800):
        table, load = case.table, case.load

        def leaves_all(stitch: int, batch: int, table: LatencyTable = table, load: Load = load) -> bool:
            return table.meets_all(0, load, batch, load.slowness * table.ms[stitch][batch] - ROUNDING)

        sizes = range(1, min(len(load.slacks), table.max_batch) + 1)
        # The cheapest stitch ends first.
        can = any(in_time(case, 0, batch) and leaves_all(0, batch) for batch in sizes)
        choice = LookAhead(table).choose(load)
        if can:
            assert leaves_all(choice.stitch, choice.batch_size), case
        left[can] += 1
    assert min(left.values()) > 100


def test_look_ahead_chooses_no_worse_stitch_for_longer_slacks() -> None:
    better = 0
    for case in cases():
        slacks = np.array(case.load.slacks)
        raised = slacks + case.rng.exponential(slacks.max() - slacks.min() + 1, len(slacks))
        some = np.where(case.rng.random(len(slacks)) < 0.3, raised, slacks)
        before = LookAhead(case.table).choose(case.load).stitch
        for longer in (raised, some, slacks + case.rng.uniform(0, 50)):
            after = LookAhead(case.table).choose(replace(case.load, slacks=sorted(longer.tolist()))).stitch
            assert after >= before, case
            better += after > before
    assert better > 100


def more_demand(case: Case) -> Load:
    return replace(case.load, demand=case.load.demand + case.rng.exponential(case.table.throughput(0)))


def slower(case: Case) -> Load:
    factor = 1 + case.rng.exponential(0.5)
    return replace(case.load, slowness=factor * case.load.slowness, mean_slowness=factor * case.load.mean_slowness)


def more_requests(case: Case) -> Load:
    slacks = np.array(case.load.slacks)
    more = case.rng.uniform(slacks.min(), slacks.max(), case.rng.integers(1, 40))
    return replace(case.load, slacks=sorted([*slacks.tolist(), *more.tolist()]))


@pytest.mark.parametrize("change", [more_demand, slower, more_requests])
def test_look_ahead_chooses_no_better_stitch_under_more_load(change: Callable[[Case], Load]) -> None:
    worse = 0
    for case in cases():
        before = LookAhead(case.table).choose(case.load).stitch
        after = LookAhead(case.table).choose(change(case)).stitch
        assert after <= before, case
        worse += after < before
    assert worse > 10


def test_one_request_with_time_gets_the_best_stitch() -> None:
    for case in cases(100):
        best = len(case.table) - 1
        for name, policy in POLICIES.items():
            choice = policy(case.table).choose(Load([2 * case.table.ms[best][1]]))
            if name == "slackfit":  # its buckets mix stitches of similar latency
                assert choice.ms <= 2 * case.table.ms[best][1]
            else:
                assert choice.stitch == best, name


def test_one_request_gets_the_best_stitch_that_meets_its_deadline() -> None:
    table = LatencyTable(latencies((10,), (20,), (40,)))
    for slack, expected in [(-5, 0), (5, 0), (10, 0), (19, 0), (20, 1), (39, 1), (40, 2), (1000, 2)]:
        assert LookAhead(table).choose(Load([slack])).stitch == Greedy(table).choose(Load([slack])).stitch == expected


def test_look_ahead_acts_on_what_slackfit_does_not_see() -> None:
    """The deadlines behind the first, and requests that are yet to come."""
    table = LatencyTable(latencies((10, 12), (40, 70)))
    assert LookAhead(table).choose(Load([45, 50])).stitch == 1  # 40 + 10 ms
    assert LookAhead(table).choose(Load([45, 49])).stitch == 0
    assert LookAhead(table).choose(Load([1000], demand=0.02)).stitch == 1
    assert LookAhead(table).choose(Load([1000], demand=0.04)).stitch == 0  # one stitch answers 2 in 70 ms
    for load in (Load([45, 49]), Load([1000], demand=0.04)):
        assert SlackFit(table).choose(load).stitch == 1


def test_look_ahead_takes_a_smaller_batch_where_a_larger_one_delays_the_others() -> None:
    """Three images take almost as long as four: after two, the other four are in time."""
    table = LatencyTable(latencies((5, 5, 9, 9.4)))
    assert LookAhead(table).choose(Load([9.2] + [15] * 5)).batch_size == 2


def test_the_cheapest_stitch_empties_a_queue_that_is_late() -> None:
    """With the smallest batch that is nearly as fast as the fastest, not with the largest."""
    table = LatencyTable(latencies((10, 11.5, 16, 21), (50, 100, 150, 200)))
    for policy in (LookAhead(table), SlackFit(table), Greedy(table)):
        choice = policy.choose(Load([-1.0] * 10, demand=1.0))
        assert (choice.stitch, choice.batch_size) == (0, 3)


def test_slackfit_takes_the_highest_bucket_in_time_and_in_it_the_largest_batch_then_the_best_stitch() -> None:
    table = LatencyTable(latencies((10, 20, 30, 40), (20, 40, 60, 80), (42, 60, 90, 170)))
    policy = SlackFit(table, buckets=16)  # 10 ms each
    waiting = [100.0] * 3
    assert choice_of(policy, [39.0]) == (1, 1)
    assert choice_of(policy, [45.0]) == (2, 1)
    assert choice_of(policy, [45.0, 100.0]) == (1, 2)  # with (2, 1) in one bucket
    assert choice_of(policy, [95.0, *waiting]) == (2, 3)
    assert choice_of(policy, [65.0, *waiting]) == (1, 3)  # with (2, 2) in one bucket


def choice_of(policy: Policy, slacks: list[float]) -> tuple[int, int]:
    choice = policy.choose(Load(slacks))
    return choice.stitch, choice.batch_size


def test_latencies_rise_with_the_stitch_and_the_batch() -> None:
    for case in cases():
        times = np.array(case.table.ms)
        assert times.shape == (len(case.table.names), case.table.max_batch + 1)
        assert (times[:, 0] == 0).all() and (times[:, 1:] > 0).all()
        assert (np.diff(times, axis=0) >= 0).all() and (np.diff(times, axis=1) >= 0).all()


def test_measured_latencies_stay_where_they_rise() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sizes = sorted(rng.choice(np.arange(1, 40), 4, replace=False).tolist())
        times = np.cumsum(np.cumsum(rng.exponential(1, (5, 4)), axis=0), axis=1)
        table = LatencyTable({str(k): dict(zip(sizes, row, strict=True)) for k, row in enumerate(times)})
        assert [[row[size] for size in sizes] for row in table.ms] == times.tolist()
        assert table.max_batch == sizes[-1] and all(row[1] == row[sizes[0]] for row in table.ms)


def test_a_noisy_latency_becomes_that_of_a_worse_stitch_or_a_smaller_batch() -> None:
    table = LatencyTable({"S": {1: 10, 2: 9, 4: 20}, "L": {1: 8, 2: 30, 4: 40}})
    assert table.names == ("S", "L")
    assert table.ms == ((0, 10, 10, 15, 20), (0, 10, 30, 35, 40))


def test_the_throughput_is_that_of_the_best_batch() -> None:
    table = LatencyTable(latencies((10, 11, 16.5, 30)))
    assert table.throughput(0) == 2 / 11
    assert table.drain_batch(0) == 2
    assert LatencyTable(latencies((10, 11.5, 16, 21))).drain_batch(0) == 3  # 3 in 16 ms are nearly as fast as 4 in 21


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "serving needs the latency of each stitch at the same batch sizes"),
        ({"S": {}}, "at the same batch sizes"),
        ({"S": {1: 10.0, 2: 20.0}, "L": {1: 20.0}}, "at the same batch sizes"),
        ({"S": {0: 10.0}}, "batch sizes are positive, got 0"),
        ({"S": {1: 0.0}}, "latencies are positive, got 0"),
        ({"S": {1: 10.0}, "L": {1: -2.0}}, "latencies are positive, got -2"),
        ({"S": {1: math.nan, 2: 1.0}}, "latencies are positive, got nan"),
        ({"S": {1: 1.0, 2: math.inf}}, "latencies are positive, got inf"),
    ],
)
def test_a_table_without_usable_latencies_is_refused_in_one_line(
    given: dict[str, dict[int, float]], message: str
) -> None:
    with pytest.raises(SettingError, match=message) as error:
        LatencyTable(given)
    assert "\n" not in str(error.value)


def test_a_batch_leaves_time_for_a_request_that_comes_while_it_runs() -> None:
    """The best stitch still runs, but with fewer images; one image alone may take all the time."""
    table = LatencyTable(dict(S={1: 10.0, 4: 40.0}, L={1: 30.0, 4: 120.0}))
    assert LookAhead(table).choose(Load([150] * 4)) == Choice(1, 4, 120.0)
    assert LookAhead(table).choose(Load([150] * 4, deadline_ms=100.0)) == Choice(1, 3, 90.0)
    assert LookAhead(table).choose(Load([150] * 4, deadline_ms=50.0)) == Choice(1, 1, 30.0)
    assert LookAhead(table).choose(Load([30], deadline_ms=31.0)) == Choice(1, 1, 30.0)
