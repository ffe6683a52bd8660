"""The choice of stitches at a frame rate, on simulated machines whose clock moves as frames are processed."""

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from mmsnnet.apis.frame_rate import MOST_PATIENCE, PATIENCE, FrameRate
from mmsnnet.errors import SettingError

COSTS = (8.0, 12.0, 16.0, 22.0, 30.0)  # ms of the model on the idle machine
FPS, OTHER_MS = 25, 4.0


@dataclass
class Machine:
    """Processes frames at the stitches that a frame rate chooses, one after the other.

    Args:
        slowness: of the machine at a time in seconds: 1 when it is idle.
        noise: the share by which times vary.
    """

    slowness: Callable[[float], float]
    noise: float = 0.0
    now: float = 0.0
    ends: list[float] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def run(self, seconds: float, costs: tuple[float, ...] = COSTS, fps: float = FPS) -> FrameRate:
        rate, draw = FrameRate(costs, fps, self.clock), random.Random(0)
        while self.now < seconds:
            factor = self.slowness(self.now) * (1 + self.noise * draw.uniform(-1, 1))
            model_ms, other_ms = factor * costs[rate.index], factor * OTHER_MS
            self.now += (model_ms + other_ms) / 1000
            self.indices.append(rate.index)
            self.ends.append(self.now)
            rate.observe(model_ms, other_ms)
        return rate

    def frames(self, start: float, stop: float) -> int:
        """The frames that end in a span of time."""
        return sum(start < end <= stop for end in self.ends)

    def chosen(self, start: float, stop: float) -> set[int]:
        """The stitches that ran in a span of time."""
        return {index for end, index in zip(self.ends, self.indices, strict=True) if start < end <= stop}

    def changes(self, start: float, stop: float) -> int:
        """How often the stitch changed in a span of time."""
        ran = [index for end, index in zip(self.ends, self.indices, strict=True) if start < end <= stop]
        return sum(one != other for one, other in itertools.pairwise(ran))


def loaded(start: float, stop: float, slowness: float) -> Callable[[float], float]:
    """A machine on which other processes run from ``start`` to ``stop``."""
    return lambda now: slowness if start <= now < stop else 1.0


@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("slowness", [1.5, 2.0, 3.0])
def test_under_load_the_rate_is_back_within_two_seconds_and_afterwards_the_stitch(
    slowness: float, noise: float
) -> None:
    machine = Machine(loaded(5, 15, slowness), noise)
    machine.run(25)
    assert machine.chosen(0, 5) == {4}
    assert machine.frames(5, 6) >= 0.5 * FPS  # it slows down, for a moment
    assert all(machine.frames(start, start + 1) >= FPS for start in range(7, 15))  # 2 s after the load began
    assert max(machine.chosen(7, 15)) < 4
    assert machine.chosen(15 + 2 * PATIENCE, 25) == {4}


def test_the_best_stitch_that_fits_runs_under_load() -> None:
    """2.2 * (12 + 4) = 35 ms fits in the 40 ms of a frame, and 2.2 * (16 + 4) = 44 ms does not."""
    machine = Machine(loaded(5, 15, 2.2))
    machine.run(15)
    assert machine.chosen(7, 15) == {1}


def test_a_machine_at_the_edge_does_not_swing() -> None:
    """A load under which the best stitch is a little too slow, and the next one fast enough."""
    machine = Machine(loaded(5, 60, 1.25), noise=0.1)
    machine.run(60)
    assert machine.changes(5, 60) <= 4
    assert all(machine.frames(start, start + 5) >= 5 * FPS for start in range(7, 55))


def test_failed_attempts_become_rare() -> None:
    """The costs were measured badly: the better stitch takes 60 ms, and looks like 18 ms from the other one."""
    machine = Machine(lambda now: 1.0)
    costs = (10.0, 18.0)
    rate, attempts = FrameRate(costs, FPS, machine.clock), []
    while machine.now < 60:
        model_ms = (10.0, 60.0)[rate.index]
        machine.now += model_ms / 1000
        before = rate.index
        if rate.observe(model_ms) > before:
            attempts.append(machine.now)
    waits = [later - earlier for earlier, later in itertools.pairwise(attempts)]
    assert 3 <= len(attempts) <= 8
    assert all(later > min(1.5 * earlier, MOST_PATIENCE) for earlier, later in itertools.pairwise(waits))


def test_one_slow_frame_changes_nothing() -> None:
    machine = Machine(lambda now: 6.0 if 2 <= now < 2.01 else 1.0)
    machine.run(6)
    assert machine.chosen(0, 6) == {4}
    assert max(later - earlier for earlier, later in zip(machine.ends, machine.ends[1:], strict=False)) > 0.2


def test_a_rate_that_nothing_keeps_gets_the_cheapest_stitch() -> None:
    machine = Machine(lambda now: 10.0)
    machine.run(10)
    assert machine.chosen(2, 10) == {0}


def test_the_measured_rate_counts_the_last_second() -> None:
    machine = Machine(lambda now: 1.0)
    rate = machine.run(5, costs=(16.0,), fps=50)
    assert rate.measured_fps == pytest.approx(50, abs=1)
    machine.now += 0.5
    assert rate.measured_fps == pytest.approx(25, abs=1)
    machine = Machine(lambda now: 1.0)
    assert machine.run(0.4, costs=(16.0,), fps=50).measured_fps == pytest.approx(50, abs=3)


def test_costs_that_noise_has_swapped_are_put_in_order() -> None:
    assert FrameRate([3.0, 2.0, 4.0], 25).costs == (3.0, 3.0, 4.0)


@pytest.mark.parametrize(("costs", "fps"), [([], 25), ([1.0, 0.0], 25), ([1.0], 0), ([1.0], float("nan"))])
def test_a_rate_without_stitches_is_refused(costs: list[float], fps: float) -> None:
    with pytest.raises(SettingError, match=r"fps is a positive number|positive costs"):
        FrameRate(costs, fps)
