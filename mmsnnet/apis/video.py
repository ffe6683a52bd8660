"""Prediction for videos: frames in, pictures out, at a frame rate that is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
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
# A file with a smaller share of the frames that it states is cut short.
LEAST_SHARE = 0.95

StrPath = str | os.PathLike[str]


class Video:
    """The frames of a video file or a camera, (H, W, 3) uint8, blue first.

    Frames can be taken once. A file that is cut short gives the frames that it has, then a DataError.

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
            self._capture.release()
            expected = "no camera has this number" if self.is_camera else "expected a video (MP4, AVI, ...)"
            raise DataError(f"{self.name} cannot be decoded: {expected}, or it is damaged or cut short")
        self.fps = self._capture.get(cv2.CAP_PROP_FPS) or None
        length = int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT))
        self.length = length if length > 0 and not self.is_camera else None

    def __iter__(self) -> Generator[np.ndarray]:
        frame, self._first = self._first, None
        count, last = 0, 0.0
        try:
            while frame is not None:
                yield frame
                count += 1
                last = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                frame = self._read()
        finally:
            self._capture.release()
        if count:
            self._check_end(count, last)

    def _check_end(self, count: int, last: float) -> None:
        """Raise DataError if the file ends early, after ``count`` frames, the last one at ``last`` seconds.

        Many containers state a duration and no count. OpenCV then derives ``length``, which is wrong where the rate
        varies, so that time decides too. Sound may last a little longer than the frames.
        """
        if self.length is None or self.fps is None:
            return
        least = min(self.length - 1, LEAST_SHARE * self.length)
        end = last * count / max(1, count - 1)
        if count < least and end * self.fps < least:
            raise DataError(
                f"{self.name} ends after {count} frames and states {self.length}: it is damaged or cut short; copy it "
                "again"
            )

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
        names_only = self.prediction.overlay.task == "classification"
        picture = cv2.cvtColor(self.prediction.picture(labels=names_only), cv2.COLOR_RGB2BGR)
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
    best = predictor.choose(max_gflops=max_gflops, max_latency_ms=max_latency_ms)
    if best is None:
        return list(front)
    bound = next(point.cost(cost) for point in predictor.points if point.id == best.id)
    return [point for point in front if point.cost(cost) <= bound]


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
) -> Generator[VideoFrame]:
    """Yield each frame of a video with its prediction.

    With ``fps``, the stitch moves along the front, so that frames are processed at this rate
    (:class:`mmsnnet.apis.frame_rate.FrameRate`); what the caller does with a frame counts. Without, the best
    stitch within the budget runs, or the predictor's. The predictor's stitch stays as it is.

    Args:
        fps: frames per second to keep.
        max_gflops, max_latency_ms: a budget for the stitches; set at most one.
        clock: the time in seconds.

    Raises:
        SettingError: there are no operating points to choose from, or ``fps`` is not positive.
        ValueError: the budget is below the cheapest stitch.
        DataError: the video is cut short; all frames that it has came before.
    """
    with closing(iter(video)) as frames:
        yield from _predict_frames(predictor, video, frames, fps, max_gflops, max_latency_ms, clock)


def _predict_frames(
    predictor: Predictor,
    video: Video,
    frames: Iterator[np.ndarray],
    fps: float | None,
    max_gflops: float | None,
    max_latency_ms: float | None,
    clock: Callable[[], float],
) -> Iterator[VideoFrame]:
    frame = next(frames, None)
    front = [] if fps is None else front_of(predictor, max_gflops, max_latency_ms)
    fixed = predictor.choose(max_gflops=max_gflops, max_latency_ms=max_latency_ms) if fps is None else None
    costs = [1.0] if frame is None or fps is None else measured_costs(predictor, frame, front)
    rate = FrameRate(costs, fps or 1, clock)
    number, before, start = 0, None, clock()
    while frame is not None:
        prediction = predictor(frame, stitch=front[rate.index].id if front else fixed.id if fixed else None)
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
