"""Videos: frames that are all there, and a predictor that is left as it was."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmsnnet.apis import Predictor
from mmsnnet.apis.overlay import Overlay
from mmsnnet.apis.video import Video, front_of, predict_video
from mmsnnet.errors import DataError
from tests.apis.tiny_models import publish_tiny

FRAMES, FPS = 40, 10


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return Predictor(publish_tiny("segmentation", tmp_path_factory.mktemp("segmentation")), device="cpu")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(name, share)``: a video of noise, cut to a share of its bytes."""

    def make(name: str, share: float = 1) -> Path:
        path, rng = tmp_path / name, np.random.default_rng(0)
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), FPS, (96, 64))
        for _ in range(FRAMES):
            writer.write(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
        writer.release()
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return path

    return make


class Capture:
    """A capture that states one length and has another, with the time of each frame."""

    def __init__(self, stated: int, times: list[float]) -> None:
        self.stated, self.times, self.taken, self.is_released = stated, times, 0, False

    def isOpened(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.taken += 1
        return (True, np.zeros((8, 8, 3), np.uint8)) if self.taken <= len(self.times) else (False, None)

    def get(self, what: int) -> float:
        time = 1000 * self.times[min(self.taken, len(self.times)) - 1]
        return {cv2.CAP_PROP_FPS: FPS, cv2.CAP_PROP_FRAME_COUNT: self.stated, cv2.CAP_PROP_POS_MSEC: time}[what]

    def release(self) -> None:
        self.is_released = True


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.mp4", "a.mov"])
def test_a_whole_video_gives_all_its_frames(write: Callable[..., Path], name: str) -> None:
    video = Video(write(name))
    assert video.length == FRAMES and video.fps == FPS
    assert len(list(video)) == FRAMES
    assert list(video) == []


@pytest.mark.parametrize("name", ["a.avi", "a.mkv"])
def test_a_video_that_is_cut_short_is_an_error_after_its_last_frame(write: Callable[..., Path], name: str) -> None:
    path, number = write(name, 0.5), 0
    with pytest.raises(DataError, match=rf"{name} ends after \d+ frames and states {FRAMES}: ") as raised:
        for _ in Video(path):
            number += 1
    assert 5 < number < 25 and f"after {number} frames" in str(raised.value)


@pytest.mark.parametrize(
    ("times", "is_whole"),
    [
        ([0.1 * n for n in range(40)], True),
        ([0.1 * n for n in range(39)], True),  # a rounded duration
        ([0.4 * n for n in range(10)], True),  # the rate varies, and the length is derived from the duration
        ([0.1 * n for n in range(20)], False),
        ([0.0] * 20, False),  # no time is known
        ([0.0] * 40, True),
    ],
)
def test_time_and_number_tell_whether_a_video_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: list[float], is_whole: bool
) -> None:
    capture = Capture(40, times)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture)
    (tmp_path / "a.mkv").touch()
    video, taken = Video(tmp_path / "a.mkv"), []
    if is_whole:
        taken.extend(video)
    else:
        with pytest.raises(DataError, match="ends after 20 frames and states 40"):
            taken.extend(video)
    assert len(taken) in (0, len(times)) and capture.is_released


def test_a_loop_that_is_left_releases_the_video(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Capture(0, [0.1 * n for n in range(40)])
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: capture)
    frames = predict_video(predictor, Video(0))
    next(frames)
    assert not capture.is_released
    frames.close()
    assert capture.is_released


def test_a_budget_of_a_video_leaves_the_predictor_as_it_was(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Capture(0, [0.0, 0.1]))
    cheapest = min(predictor.points, key=lambda point: point.flops)
    assert predictor.stitch.name == "L"
    for budget in (dict(max_gflops=cheapest.flops / 1e9), dict(max_latency_ms=cheapest.latency_ms)):
        assert [point.name for point in front_of(predictor, **dict(max_gflops=None, max_latency_ms=None) | budget)] == [
            "S"
        ]
        for fps in (None, 10):
            frames = list(predict_video(predictor, Video(0), fps, **budget))
            assert [frame.prediction.stitch for frame in frames] == ["S", "S"]
    assert predictor.stitch.name == "L"


def test_a_video_of_a_classifier_shows_the_names(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are all that it draws. Other tasks leave names out, for speed."""
    drawn: list[bool] = []

    def draw(self: Overlay, image: np.ndarray, sample: object, labels: bool = True) -> np.ndarray:
        drawn.append(labels)
        return image

    monkeypatch.setattr(Overlay, "draw", draw)
    monkeypatch.setattr(cv2, "VideoCapture", lambda source: Capture(0, [0.0]))
    for one in (predictor, Predictor(publish_tiny("classification", tmp_path), device="cpu")):
        [frame] = predict_video(one, Video(0))
        frame.picture()
    assert drawn == [False, True]
