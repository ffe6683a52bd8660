"""Prediction for videos: frames in, pictures out, at a frame rate that is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from mmsnnet.apis.frame_rate import FrameRate
from mmsnnet.apis.prediction import Prediction
from mmsnnet.apis.predictor import Predictor
from mmsnnet.errors import DataError, MissingFileError, SettingError
from mmsnnet.evaluation import OperatingPoint, pareto_front
from mmsnnet.evaluation.operating_points import CostName
from mmsnnet.files.writing import new_file

VIDEOS = (".mp4", ".avi", ".mkv", ".mov")
CALIBRATION_ROUNDS = 3

StrPath = str | os.PathLike[str]


class Video:
    """The frames of a video file or a camera, (H, W, 3) uint8, blue first.

    Args:
        source: the path of a file, or the number of a camera.

    Attributes:
        fps: frames per second as the file states them; None if unknown.
        length: the number of frames as the file states it; None for a camera.
        is_camera: whether frames come as fast as they are filmed.

    Raises:
        MissingFileError: the file does not exist.
        DataError: it cannot be decoded, or there is no such camera.
    """

    def __init__(self, source: StrPath | int) -> None:
        self.is_camera = isinstance(source, int)
        self.name = f"camera {source}" if isinstance(source, int) else os.fspath(source)
        if not isinstance(source, int) and not Path(source).is_file():
            raise MissingFileError(f"there is no video {self.name!r} (working folder {Path.cwd()})")
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else self.name)
        self._first = self._read() if self._capture.isOpened() else None
        if self._first is None:
            expected = "no camera has this number" if self.is_camera else "expected a video (MP4, AVI, ...)"
            raise DataError(f"{self.name} cannot be decoded: {expected}, or it is damaged or cut short")
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or None
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.length = length if length > 0 and not self.is_camera else None

    def __iter__(self) -> Iterator[np.ndarray]:
        while self._first is not None:
            frame, self._first = self._first, None
            yield frame
            self._first = self._read()
        self._capture.release()

    def _read(self) -> np.ndarray | None:
        ok, frame = self._capture.read()
        return frame if ok else None


@dataclass(frozen=True)
class VideoFrame:
    """A frame with its prediction.

    Attributes:
        number: from 0.
        prediction: of the frame.
        fps: frames per second over the last second.
        changed: whether another stitch than the frame before ran.
    """

    number: int
    prediction: Prediction
    fps: float
    changed: bool

    def picture(self) -> np.ndarray:
        """The picture of the prediction, (H, W, 3) uint8, blue first, with the stitch, its cost and the rate."""
        picture = cv2.cvtColor(self.prediction.picture(labels=False), cv2.COLOR_RGB2BGR)
        scale = max(0.4, min(picture.shape[:2]) / 700)
        place = (round(8 * scale), round(28 * scale))
        for color, thickness in (((0, 0, 0), 4), ((255, 255, 255), 1)):
            width = max(1, round(thickness * scale))
            cv2.putText(picture, self.text(), place, cv2.FONT_HERSHEY_SIMPLEX, scale, color, width, cv2.LINE_AA)
        return picture

    def text(self) -> str:
        """Stitch, cost and rate in one line."""
        gflops = self.prediction.gflops
        cost = "" if gflops is None else f" {gflops:.3g} GFLOPs"
        return f"{self.prediction.stitch}{cost} {self.fps:.1f} fps"


def front_of(predictor: Predictor, max_gflops: float | None, max_latency_ms: float | None) -> list[OperatingPoint]:
    """The operating points of a predictor's front within a budget, from the cheapest to the best.

    Raises:
        ValueError: the predictor has no operating points, or the budget is below the cheapest stitch.
    """
    if predictor.points is None:
        raise SettingError(
            "a frame rate needs operating points to choose from: publish_model.py --points FILE.json adds them to the "
            "folder, or set --points to the file that tools/test.py --out wrote"
        )
    cost: CostName = "flops" if max_latency_ms is None else "latency_ms"
    front = pareto_front(predictor.points, cost, predictor.metric)
    if max_gflops is None and max_latency_ms is None:
        return list(front)
    best = predictor.set_budget(max_gflops=max_gflops, max_latency_ms=max_latency_ms)
    return [point for point in front if point.cost(cost) <= best.cost(cost)]


def measured_costs(predictor: Predictor, frame: np.ndarray, front: Sequence[OperatingPoint]) -> list[float]:
    """The times of stitches for a frame on this machine in ms: the shortest of a few rounds."""
    rounds = [
        [predictor(frame, stitch=point.id).ms for point in front] for _ in range(1 + CALIBRATION_ROUNDS)
    ]  # the first one warms up
    return [min(times) for times in zip(*rounds[1:], strict=True)]


def predict_video(
    predictor: Predictor,
    video: Video,
    fps: float | None = None,
    max_gflops: float | None = None,
    max_latency_ms: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[VideoFrame]:
    """Yield each frame of a video with its prediction.

    With ``fps``, the stitch moves along the front, so that frames are processed at this rate
    (:class:`mmsnnet.apis.frame_rate.FrameRate`); what the caller does with a frame counts. Without, the predictor's
    stitch runs.

    Args:
        fps: frames per second to keep.
        max_gflops, max_latency_ms: a budget for the stitches; set at most one.
        clock: the time in seconds.

    Raises:
        SettingError: there are no operating points to choose from, or ``fps`` is not positive.
        ValueError: the budget is below the cheapest stitch.
    """
    frames = iter(video)
    frame = next(frames, None)
    front = [] if fps is None else front_of(predictor, max_gflops, max_latency_ms)
    if fps is None and (max_gflops, max_latency_ms) != (None, None):
        predictor.set_budget(max_gflops=max_gflops, max_latency_ms=max_latency_ms)
    costs = [1.0] if frame is None or fps is None else measured_costs(predictor, frame, front)
    rate = FrameRate(costs, fps or 1, clock)
    number, before, start = 0, None, clock()
    while frame is not None:
        prediction = predictor(frame, stitch=front[rate.index].id if front else None)
        yield VideoFrame(number, prediction, rate.measured_fps, prediction.stitch != before)
        number, before = number + 1, prediction.stitch
        busy = clock() - start
        if video.is_camera:  # it waits for the next frame
            frame = next(frames, None)
            start = clock()
        else:
            start += busy
            frame = next(frames, None)
        rate.observe(prediction.ms, max(0.0, 1000 * busy - prediction.ms))


@contextmanager
def video_writer(out: StrPath, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a picture (H, W, 3), blue first, to a video, which appears as a whole at the end.

    Raises:
        SettingError: the name does not end in a suffix of ``VIDEOS``.
        OSError: the file cannot be written.
    """
    if Path(out).suffix.lower() not in VIDEOS:
        raise SettingError(f"{os.fspath(out)!r}: the name of a video ends in {', '.join(VIDEOS)}")
    writer: cv2.VideoWriter | None = None
    with new_file(out, "--out") as temporary:

        def write(picture: np.ndarray) -> None:
            nonlocal writer
            if writer is None:
                size = (picture.shape[1], picture.shape[0])
                writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
                if not writer.isOpened():
                    raise OSError(f"{out} cannot be written: OpenCV has no encoder for it")
            writer.write(picture)

        try:
            yield write
        finally:
            if writer is not None:
                writer.release()
