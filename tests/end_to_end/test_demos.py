"""The demos as a user runs them: pictures and videos written, one line for each mistake."""

import itertools
import re
import runpy
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from mmsnnet.apis import OperatingPoints, Predictor
from mmsnnet.apis.video import Video
from tests.apis.tiny_models import publish_tiny
from tests.conftest import Tool
from tests.python_processes import REPOSITORY

FRAMES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish_tiny("segmentation", tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def image(folder: Path) -> Path:
    return sorted((folder.parent / "data/images/validation").iterdir())[0]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disc that moves from left to right."""
    path = tmp_path_factory.mktemp("video") / "disc.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for number in range(FRAMES):
        writer.write(cv2.circle(np.full((64, 96, 3), 80, np.uint8), (8 * number, 32), 12, (0, 159, 230), -1))
    writer.release()
    return path


def frames(path: Path) -> list[np.ndarray]:
    capture, found = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        found.append(read[1])
    return found


def test_an_image_gets_its_picture(tool: Tool, folder: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.png"
    done = tool("demo/image_demo", image, folder / "config.py", folder, "--stitch", "S", "--out", out)
    assert re.fullmatch(rf"{out}: stitch S, \d+\.\d ms\n", done.stdout)
    assert np.array_equal(np.asarray(Image.open(out)), Predictor(folder, device="cpu", stitch="S")(image).picture())
    cheapest = min(OperatingPoints.load(folder / "front.json"), key=lambda point: point.flops)
    for budget in (("--max-gflops", cheapest.flops / 1e9), ("--max-latency-ms", cheapest.latency_ms)):
        assert "stitch S," in tool("demo/image_demo", image, folder, *budget, "--out", out).stdout


def test_of_a_folder_all_are_done_but_broken_ones(tool: Tool, folder: Path, image: Path, tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for name in ("a.jpg", "c.jpg", "d.jpg"):
        shutil.copy(image, photos / name)
    Image.open(image).save(photos / "d.png")
    (photos / "b.jpg").write_bytes(b"")
    done = tool.attempt("demo/image_demo", photos, folder, "--out", out, "--batch-size", 2)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"error: image {photos / 'b.jpg'} is empty: it has 0 bytes"
    assert done.stdout == f"{out}: 4 of 5 pictures\n"
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "c.png", "d.jpg.png", "d.png.png"]
    pictures = [Image.open(out / name).tobytes() for name in ("a.png", "c.png", "d.jpg.png")]
    assert pictures[0] == pictures[1] == pictures[2]
    tool("demo/image_demo", photos / "c*", folder, "--out", tmp_path / "pattern")
    assert [path.name for path in (tmp_path / "pattern").iterdir()] == ["c.png"]


def test_images_of_one_name_keep_their_folders(tool: Tool, folder: Path, image: Path, tmp_path: Path) -> None:
    for place in ("a", "b", "b/c"):
        (tmp_path / "p" / place).mkdir(parents=True)
        shutil.copy(image, tmp_path / "p" / place / "x.jpg")
    out = tmp_path / "out"
    tool("demo/image_demo", tmp_path / "p/**/x.jpg", folder, "--out", out)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*.png"))
    assert found == ["a/x.png", "b/c/x.png", "b/x.png"]


def test_pictures_replace_no_image_and_each_other(tool: Tool, folder: Path, image: Path, tmp_path: Path) -> None:
    photos, link = tmp_path / "photos", tmp_path / "link"
    photos.mkdir()
    link.symlink_to(photos)
    Image.open(image).save(photos / "a.png")
    before = (photos / "a.png").read_bytes()
    for given, out in ((photos, photos), (photos, link), (photos / "a.png", link / "a.png"), (photos / "a.png", link)):
        message = tool.error("demo/image_demo", given, folder, "--out", out)
        assert message.endswith("/a.png would replace an input: set another --out")
    for name in ("b.jpg", "b.png", "b.jpg.bmp"):
        Image.open(image).save(photos / name)
    message = tool.error("demo/image_demo", photos, folder, "--out", tmp_path / "out")
    assert re.search(
        r"error: .*photos/b\.jpg and .*photos/b\.jpg\.bmp would both be written to .*out/b\.jpg\.png: ", message
    )
    assert (photos / "a.png").read_bytes() == before and not (tmp_path / "out").exists()


def test_a_video_gets_its_pictures(tool: Tool, folder: Path, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    done = tool("demo/video_demo", video, folder, "--stitch", "S", "--out", out)
    assert done.stdout == f"{out}: {FRAMES} frames\n"
    assert re.search(r"^frame 0: S 0\.00\d+ GFLOPs", done.stderr, re.M)
    written, given = frames(out), frames(video)
    assert len(written) == FRAMES and cv2.VideoCapture(str(out)).get(cv2.CAP_PROP_FPS) == 10
    predictor = Predictor(folder, device="cpu", stitch="S")
    for picture, frame in zip(written[1:], given[1:], strict=True):
        expected = predictor(frame).picture(labels=False)[30:, :, ::-1]  # below the text; MP4 loses colours
        assert np.abs(picture[30:].astype(int) - expected).mean() < 20
    assert list(tmp_path.iterdir()) == [out]


def test_a_rate_that_cannot_be_kept_leads_to_the_cheapest_stitch(
    tool: Tool, folder: Path, video: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.avi"
    done = tool("demo/video_demo", video, folder, "--fps", 1e5, "--out", out)
    assert re.search(r"^frame 0: L ", done.stderr, re.M) and re.search(r"^frame [345]: S ", done.stderr, re.M)
    assert len(frames(out)) == FRAMES
    bound = OperatingPoints.load(folder / "front.json").points[2].flops / 1e9
    done = tool("demo/video_demo", video, folder, "--fps", 1e-3, "--max-gflops", bound, "--max-frames", 3, "--out", out)
    [stitch] = re.findall(r"^frame \d+: (\S+)", done.stderr, re.M)
    assert stitch == Predictor(folder, max_gflops=bound).stitch.name != "L"
    assert len(frames(out)) == 3


@pytest.mark.parametrize("suffix", ["avi", "mkv"])
def test_of_a_video_that_is_cut_short_the_frames_that_it_has_are_kept(
    tool: Tool, folder: Path, suffix: str, tmp_path: Path
) -> None:
    source, out = tmp_path / f"in.{suffix}", tmp_path / "out.mp4"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    writer.release()
    done = tool.attempt("demo/video_demo", cut(source), folder, "--stitch", "S", "--out", out)
    number = len(frames(out))
    assert done.returncode == 1 and 5 < number < 25 and done.stdout == f"{out}: {number} frames\n"
    assert done.stderr.splitlines()[-1] == (
        f"error: {source} ends after {number} frames and states 40: it is damaged or cut short; copy it again"
    )


@pytest.mark.parametrize("after", [0, 3])
def test_ctrl_c_ends_the_video_of_a_camera(
    folder: Path, video: Path, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frames that were written are kept."""

    class Camera(Video):
        def __init__(self, source: int) -> None:
            super().__init__(video)
            self.is_camera, self.length = True, None

        def __iter__(self) -> Generator[np.ndarray]:
            yield from itertools.islice(super().__iter__(), after)
            raise KeyboardInterrupt

    demo = runpy.run_path(str(REPOSITORY / "demo/video_demo.py"))
    monkeypatch.setitem(demo["main"].__globals__, "Video", Camera)
    out = tmp_path / "out.mp4"
    monkeypatch.setattr("sys.argv", ["video_demo", "0", str(folder), "--device", "cpu", "--out", str(out)])
    if after:
        demo["main"]()
        assert len(frames(out)) == after
    else:
        with pytest.raises(KeyboardInterrupt):
            demo["main"]()
    assert list(tmp_path.iterdir()) == [out] * (after > 0)


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


MISTAKES: dict[str, tuple[Callable[[Path, Path, Path, Path], tuple[object, ...]], str]] = {
    "no image": (
        lambda folder, image, video, new: ("image_demo", "nowhere.jpg", folder, "--out", new / "a.png"),
        "no image nowhere.jpg",
    ),
    "an image cut short": (
        lambda folder, image, video, new: (
            *("image_demo", cut(Path(shutil.copy(image, new))), folder),
            *("--out", new / "a.png"),
        ),
        "jpg cannot be decoded by 'cv2'",
    ),
    "no picture in the folder": (
        lambda folder, image, video, new: ("image_demo", new, folder, "--out", new / "out"),
        "has no pictures",
    ),
    "a budget below the cheapest": (
        lambda folder, image, video, new: (
            *("image_demo", image, folder, "--max-gflops", 1e-9),
            *("--out", new / "a.png"),
        ),
        "a budget of 1e-09 GFLOPs is below the cheapest stitch",
    ),
    "no suffix": (
        lambda folder, image, video, new: ("image_demo", image, folder, "--out", new / "out"),
        "the name of a picture ends in .png, .jpg, .jpeg",
    ),
    "no video": (
        lambda folder, image, video, new: ("video_demo", "nowhere.mp4", folder, "--out", new / "a.mp4"),
        "there is no video 'nowhere.mp4'",
    ),
    "a video cut short": (
        lambda folder, image, video, new: (
            *("video_demo", cut(Path(shutil.copy(video, new))), folder),
            *("--out", new / "a.mp4"),
        ),
        "expected a video",
    ),
    "an unknown container": (
        lambda folder, image, video, new: ("video_demo", video, folder, "--out", new / "a.txt"),
        "the name of a video ends in .mp4, .avi, .mkv, .mov",
    ),
    "its own video": (
        lambda folder, image, video, new: (
            *("video_demo", copied := shutil.copy(video, new), folder),
            *("--out", copied),
        ),
        "would replace an input",
    ),
    "no frames": (
        lambda folder, image, video, new: (
            *("video_demo", video, folder, "--max-frames", 0),
            *("--out", new / "a.mp4"),
        ),
        "--max-frames is a number of at least 1, got 0",
    ),
    "a rate and a stitch": (
        lambda folder, image, video, new: (
            *("video_demo", video, folder, "--fps", 25, "--stitch", "S"),
            *("--out", new / "a.mp4"),
        ),
        "--fps moves among stitches, and --stitch fixes one",
    ),
    "a rate without a front": (
        lambda folder, image, video, new: (
            *("video_demo", video, folder / "config.py", folder / "model.safetensors", "--fps", 25),
            *("--out", new / "a.mp4"),
        ),
        "a frame rate needs operating points to choose from",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    tool: Tool, folder: Path, image: Path, video: Path, mistake: str, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    arguments, message = MISTAKES[mistake]
    name, *rest = arguments(folder, image, video, tmp_path / "new")
    before = sorted((tmp_path / "new").iterdir())
    assert message in tool.error(f"demo/{name}", *rest)
    assert sorted((tmp_path / "new").iterdir()) == before
