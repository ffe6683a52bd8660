"""Keep a frame rate: a choice among stitches by the times of the frames before."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mmsnnet.errors import SettingError

# A decision to go down needs this many frames of a stitch, or this many seconds.
FRAMES, SECONDS = 3, 0.4
# The share of a frame's time that a stitch may take when the choice goes to it. A stitch that runs may take all of it:
# the distance is the hysteresis.
FITS = 0.9
# Seconds for which there must have been time for a better stitch; it doubles with each failed attempt.
PATIENCE, MOST_PATIENCE = 1.0, 16.0


@dataclass(frozen=True)
class _Frame:
    end: float
    slowness: float  # the time of the model over the cost of its stitch
    model_ms: float
    other_ms: float

    @property
    def total_ms(self) -> float:
        return self.model_ms + self.other_ms


class FrameRate:
    """Chooses one of several stitches for each frame, so that frames take no longer than ``1 / fps`` on average.

    A frame takes the time of the model and other time (reading, drawing, writing). The model's time is predicted as
    ``slowness * cost``. The slowness of the machine is the mean over the last frames, so one stitch tells how long the
    others would take now. If frames are too slow, the choice goes down to the best stitch that is predicted to fit,
    after a few frames. It goes up when a better stitch has been predicted to fit for a while. If that stitch is too
    slow after all, the next attempt waits twice as long.

    Args:
        costs: of the stitches, from the cheapest (and worst) to the costliest (and best): their times in ms, or numbers
            in proportion to them.
        fps: frames per second to keep.
        clock: the time in seconds.

    Attributes:
        index: the stitch for the next frame, in the order of ``costs``. It starts as the best.

    Raises:
        SettingError: there are no costs, a cost is not positive, or ``fps`` is not positive.
    """

    def __init__(self, costs: Sequence[float], fps: float, clock: Callable[[], float] = time.perf_counter) -> None:
        if not fps > 0:
            raise SettingError(f"fps is a positive number of frames per second, got {fps}")
        if not costs or not all(cost > 0 for cost in costs):
            raise SettingError(f"a frame rate needs stitches with positive costs to choose from, got {list(costs)}")
        # Measured times are noisy: a better stitch never counts as a faster one.
        self.costs = tuple(accumulate(costs, max))
        self.fps = fps
        self.index = len(self.costs) - 1
        self._clock = clock
        self._start = clock()
        self._frames: deque[_Frame] = deque()  # of the current stitch, for as long as a decision looks back
        self._ends: deque[float] = deque()
        self._patience = PATIENCE
        self._changed = self._start
        self._climbed = False

    @property
    def period_ms(self) -> float:
        """The time of a frame at the wanted rate, in milliseconds."""
        return 1000 / self.fps

    @property
    def measured_fps(self) -> float:
        """Frames per second over the last second; 0 before the first frame."""
        now = self._clock()
        return sum(end > now - 1 for end in self._ends) / max(min(1.0, now - self._start), 1e-9)

    def observe(self, model_ms: float, other_ms: float = 0.0) -> int:
        """Record the times of a frame that ends now; return the stitch for the next one.

        Args:
            model_ms: milliseconds of the model.
            other_ms: of all else that was done for the frame. Waiting, as for a camera's next frame, does not count.
        """
        now = self._clock()
        self._frames.append(_Frame(now, model_ms / self.costs[self.index], model_ms, other_ms))
        self._ends.append(now)
        while self._ends[0] < now - 1:
            self._ends.popleft()
        while self._frames[0].end < now - self._patience and len(self._frames) > FRAMES:
            self._frames.popleft()
        if self._is_too_slow(now):
            self._go_down(now)
        elif now - self._changed >= self._patience:
            self._go_up(now)
        return self.index

    def _is_too_slow(self, now: float) -> bool:
        frames = [frame for frame in self._frames if frame.end > now - SECONDS]
        frames = frames if len(frames) > FRAMES else list(self._frames)[-FRAMES:]
        enough = len(frames) >= FRAMES or now - self._changed >= SECONDS
        mean = sum(frame.total_ms for frame in frames) / len(frames)
        # One slow frame among fast ones, such as the first, is no trend.
        slow = sum(frame.total_ms > self.period_ms for frame in frames)
        return enough and mean > self.period_ms and slow >= min(2, len(frames))

    def _go_down(self, now: float) -> None:
        if self.index == 0:
            return
        if self._climbed:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        frames = list(self._frames)[-FRAMES:]
        self._move(min(self._best_that_fits(frames), self.index - 1), now, climbed=False)

    def _go_up(self, now: float) -> None:
        if self._climbed and now - self._changed >= 2 * self._patience:  # the last attempt was right
            self._patience, self._climbed = PATIENCE, False
        best = self._best_that_fits(self._frames)
        if best > self.index:
            self._move(best, now, climbed=True)

    def _best_that_fits(self, frames: Collection[_Frame]) -> int:
        slowness = sum(frame.slowness for frame in frames) / len(frames)
        other_ms = sum(frame.other_ms for frame in frames) / len(frames)
        fitting = [i for i, cost in enumerate(self.costs) if other_ms + slowness * cost <= FITS * self.period_ms]
        return max(fitting, default=0)

    def _move(self, index: int, now: float, climbed: bool) -> None:
        self.index, self._changed, self._climbed = index, now, climbed
        self._frames.clear()
