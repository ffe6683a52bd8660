"""What the page shows, without a browser: for all kinds of images, budgets and stitches."""

import io
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from mmsnnet.apis import Predictor
from mmsnnet.demo.budget import scales
from mmsnnet.demo.page import Answers
from mmsnnet.demo.results import LONGEST_SIDE, SHORTEST_SIDE, fitted, route
from mmsnnet.stitching import StitchSpace
from tests.demo.published_model import publish

RED = (200, 30, 30)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("published")
    publish(folder, timed=True)
    predictor = Predictor(folder / "model", points=folder / "points.json", device="cpu")
    assert predictor.points is not None
    return Answers(predictor, scales(predictor.points, "mIoU"))


def ask(
    answers: Answers, path: Path | None, budget: float = 100, compare: bool = False, unit: str = "MFLOPs"
) -> dict[str, Any]:
    image = None if path is None else dict(path=str(path), orig_name=path.name)
    names = ("message", "result", "wipe", "table", "plot", "route")
    return dict(zip(names, answers(image, unit, compare, budget, 4.0, 10.0, 1.0), strict=True))


def rgba() -> Image.Image:
    return Image.new("RGBA", (80, 60), (*RED, 128))


def rotated() -> bytes:
    """A picture of 80 x 60 whose EXIF orientation makes it upright."""
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60), RED).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (80, 60), color) for color in (RED, (0, 0, 255))]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def sixteen_bits() -> bytes:
    return cv2.imencode(".png", np.full((60, 80, 3), 40_000, np.uint16))[1].tobytes()


def noise() -> Image.Image:
    """A picture whose prediction depends on the stitch."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


RIGHT: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "rgba.png": (rgba, (60, 80)),
    "gray.png": (lambda: Image.new("L", (80, 60), 90), (60, 80)),
    "sixteen_bits.png": (sixteen_bits, (60, 80)),
    "rotated.jpg": (rotated, (80, 60)),
    "animated.gif": (animated, (60, 80)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_any_kind_of_image_gives_its_picture(answers: Answers, tmp_path: Path, name: str) -> None:
    """Or one line that says why not."""
    make, (height, width) = RIGHT[name]
    made = make()
    (tmp_path / name).write_bytes(made) if isinstance(made, bytes) else made.save(tmp_path / name)
    shown = ask(answers, tmp_path / name)
    if name == "sixteen_bits.png":  # nothing tells its white
        assert "sixteen_bits.png has uint16 values" in shown["message"] and shown["result"] is None
        return
    assert shown["message"] == ""
    times = -(-SHORTEST_SIDE // min(height, width))
    assert shown["result"].shape == (times * height, times * width, 3)
    if name != "rotated.jpg":  # a JPEG changes colours
        Image.open(tmp_path / name).convert("RGB").save(tmp_path / "plain.png")
        assert np.array_equal(shown["result"], ask(answers, tmp_path / "plain.png")["result"])


def huge(path: Path) -> None:
    """The header of a PNG of 20,000 x 20,000: no one may decode what follows."""
    Image.new("1", (20_000, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[20:24] = (20_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(data)


WRONG: dict[str, Callable[[Path], object]] = {
    "missing.png": lambda path: None,
    "text.png": lambda path: path.write_text("<b>no image</b>"),
    "empty.png": lambda path: path.touch(),
    "huge.png": huge,
    "cut.png": lambda path: (rgba().save(path), path.write_bytes(path.read_bytes()[:60])),
    "pickle.jpg": lambda path: path.write_bytes(b"\x80\x04\x95\x1f."),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image_is_a_message_in_one_line(answers: Answers, tmp_path: Path, name: str) -> None:
    WRONG[name](tmp_path / name)
    shown = ask(answers, tmp_path / name, compare=True)
    assert name in shown["message"] and str(tmp_path) not in shown["message"]
    assert 'role="alert"' in shown["message"] and "\n" not in shown["message"] and "<b>" not in shown["message"]
    assert shown["result"] is shown["wipe"] is None and "stitch" in shown["table"]


@pytest.mark.parametrize("budget", [1.0, -3, float("nan"), None, "a lot"])
def test_a_budget_that_buys_nothing_is_a_message(answers: Answers, budget: Any) -> None:
    shown = ask(answers, None, budget)
    assert 'role="alert"' in shown["message"] and "\n" not in shown["message"]
    assert [shown[name] for name in ("result", "wipe", "plot")] == [None] * 3


def test_the_budget_chooses_the_stitch(answers: Answers, tmp_path: Path) -> None:
    """The picture, the table, the ring and the route belong to it; the model's own stitch stays."""
    noise().save(path := tmp_path / "image.png")
    before = answers.results.predictor.stitch
    cheap, costly = (ask(answers, path, budget) for budget in (10, 144))
    assert "<td>S</td>" in cheap["table"] and "time for this image" in cheap["table"]
    assert cheap["plot"].data[-1].name == "shown: S" and list(cheap["plot"].data[-1].x) == [
        pytest.approx(8.559, abs=1e-3)
    ]
    assert "blocks 0 to 5 of anchor S" in cheap["route"] and "<svg" in cheap["route"]
    assert costly["plot"].data[-1].name == "shown: L9-S5" and "then blocks 5 to 5 of anchor S" in costly["route"]
    assert not np.array_equal(cheap["result"], costly["result"])
    for name, colour in answers.results.of(str(path), "S").classes.items():
        assert name in answers.results.predictor.overlay.classes
        assert f"rgb{colour}'></i>{name}" in cheap["table"]
    assert answers.results.predictor.stitch == before


def test_two_stitches_are_compared(answers: Answers, tmp_path: Path) -> None:
    noise().save(path := tmp_path / "image.png")
    shown = ask(answers, path, 144, compare=True)
    left, right = shown["wipe"]
    assert left.shape == right.shape and not np.array_equal(left, right)
    assert [trace.name for trace in shown["plot"].data[-2:]] == ["left: L9-S5", "right: S"]
    assert shown["route"].count("<svg") == 2 and ">left</th><th scope='col'>right" in shown["table"]
    by_time = ask(answers, path, 144, compare=True, unit="ms")
    assert [trace.name for trace in by_time["plot"].data[-2:]] == ["left: S1-L4-S3", "right: S"]


def test_without_an_image_the_rest_is_shown(answers: Answers) -> None:
    shown = ask(answers, None)
    assert shown["message"] == "" and shown["result"] is None and "time for this image" not in shown["table"]
    assert "benchmark" in shown["table"] and shown["plot"] is not None


def test_results_are_kept_and_few(answers: Answers, tmp_path: Path) -> None:
    rgba().save(path := tmp_path / "image.png")
    one = answers.results.of(str(path), "S")
    assert answers.results.of(str(path), "S") is one
    for number in range(17):
        rgba().save(tmp_path / f"{number}.png")
        answers.results.of(str(tmp_path / f"{number}.png"), "S")
    assert answers.results.of(str(path), "S") is not one


def test_pictures_fit_the_page() -> None:
    assert fitted(np.zeros((64, 48, 3), np.uint8)).shape == (512, 384, 3)
    assert fitted(np.zeros((600, 500, 3), np.uint8)).shape == (600, 500, 3)
    assert fitted(np.zeros((3000, 6000, 3), np.uint8)).shape == (LONGEST_SIDE // 2, LONGEST_SIDE, 3)
    assert fitted(np.zeros((1, 6000, 3), np.uint8)).shape == (1, LONGEST_SIDE, 3)
    assert fitted(np.zeros((2, 1500, 3), np.uint8)).shape == (2, 1500, 3)


def test_routes_are_described_for_screen_readers() -> None:
    space = StitchSpace.two_way((6, 12))
    text = route(space, space["S2-L6"])
    assert 'role="img"' in text and "Route S2-L6: blocks 0 to 2 of anchor S, then blocks 6 to 11 of anchor L" in text
