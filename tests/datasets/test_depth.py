"""Depth maps in mmseg's pipelines: what is read, what is refused, and that image and depth stay together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import TRANSFORMS
from PIL import Image, ImageOps

from mmsnnet.errors import DataError

REPOSITORY = Path(__file__).parents[2]
HEIGHT, WIDTH = 480, 640
Results = dict[str, Any]
WritePng = Callable[..., Results]


@pytest.fixture(autouse=True)
def seeded_numpy() -> None:
    """The transforms draw from NumPy's global generator."""
    np.random.seed(0)


@pytest.fixture
def write_png(tmp_path: Path) -> WritePng:
    """``write_png(values)``: what a data set hands to a pipeline whose depth map holds ``values``."""

    def write(values: np.ndarray | bytes, ori_shape: tuple[int, int] = (2, 3)) -> Results:
        path = tmp_path / "annotations" / "kitchen_1.png"
        path.parent.mkdir()
        path.write_bytes(values if isinstance(values, bytes) else cv2.imencode(".png", values)[1].tobytes())
        return dict(
            img_path=str(tmp_path / "images" / "kitchen_1.jpg"),
            depth_map_path=str(path),
            ori_shape=ori_shape,
            seg_fields=[],
        )

    return write


def load(results: Results, **settings: Any) -> Results:
    return TRANSFORMS.build(dict(type="mmsnnet.LoadDepth", **settings))(results)


def results_of(image: np.ndarray, depth: np.ndarray) -> Results:
    shape = image.shape[:2]
    return dict(img=image, img_shape=shape, ori_shape=shape, gt_depth_map=depth, seg_fields=["gt_depth_map"])


# Loading


def test_millimetres_become_metres(write_png: WritePng) -> None:
    results = load(write_png(np.array([[0, 1, 1000], [2345, 9999, 65535]], dtype=np.uint16)))
    expected = np.array([[0, 0.001, 1], [2.345, 9.999, 65.535]])
    assert results["gt_depth_map"].dtype == np.float32 and np.allclose(results["gt_depth_map"], expected)
    assert results["seg_fields"] == ["gt_depth_map"] and results["depth_rescale_factor"] == 1e-3


def test_the_unit_and_the_range_are_settings(write_png: WritePng) -> None:
    """KITTI's: 256 steps to a metre, up to 80 m."""
    results = load(write_png(np.full((2, 3), 40 * 256, dtype=np.uint16)), depth_rescale_factor=1 / 256, max_depth=80.0)
    assert np.array_equal(results["gt_depth_map"], np.full((2, 3), 40, dtype=np.float32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 3), np.uint16), r"between 0 and 10\.0 m, found none: values from 0 to 0"),
        (np.full((2, 3), 10000, np.uint16), r"between 0 and 10\.0 m, found none: values from 10000 to 10000"),
        (np.ones((2, 3), np.uint8), r"16-bit PNG of one channel, found uint8 of shape \(2, 3\)"),
        (np.ones((2, 3, 3), np.uint16), r"16-bit PNG of one channel, found uint16 of shape \(2, 3, 3\)"),
        (np.ones((3, 2), np.uint16), r"the size of its image, found \(3, 2\) for .*kitchen_1\.jpg of \(2, 3\)"),
        (b"no image", r"\(a 16-bit PNG of one channel\); the file is damaged"),
    ],
)
def test_a_wrong_file_is_named_with_what_was_expected(
    values: np.ndarray | bytes, message: str, write_png: WritePng
) -> None:
    with pytest.raises(ValueError, match=rf"annotations/kitchen_1\.png.* a depth map .*{message}"):
        load(write_png(values))


def test_an_empty_file_is_named(write_png: WritePng) -> None:
    with pytest.raises(ValueError, match=r"depth map .*annotations/kitchen_1\.png is empty: it has 0 bytes"):
        load(write_png(b""))


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.array([[-1, 5, 7]], np.int16), r"int16 of shape \(1, 3\), values from -1 to 7"),
        (np.array([[0.5, 1.5, np.nan]], np.float32), r"float32 of shape \(1, 3\), values from nan to nan"),
        (np.array([[0.5, 1.5, -1]], np.float32), r"float32 of shape \(1, 3\), values from -1\.0 to 1\.5"),
        (np.array([[0, 1, 2]], np.int32), r"int32 of shape \(1, 3\), values from 0 to 2"),
    ],
)
def test_depth_of_another_type_is_refused_with_its_values(values: np.ndarray, found: str, write_png: WritePng) -> None:
    results = write_png(b"", ori_shape=(1, 3))
    tifffile.imwrite(results["depth_map_path"], values)
    with pytest.raises(DataError, match=rf"a 16-bit PNG of one channel, found {found}"):
        load(results)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_image_and_depth_map_share_a_frame_or_it_is_an_error(tmp_path: Path, orientation: int, frame: str) -> None:
    stored = np.zeros((32, 48), np.uint8)
    stored[:16, :16] = 255
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[274] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    of_depth = stored if frame == "stored" else np.array(ImageOps.exif_transpose(image))
    cv2.imwrite(str(tmp_path / "depth.png"), of_depth.astype(np.uint16) * 10)
    results = dict(img_path=str(tmp_path / "a.png"), depth_map_path=str(tmp_path / "depth.png"), seg_fields=[])
    load_image = dict(type="mmsnnet.LoadImage")
    if orientation in (2, 3, 4):
        with pytest.raises(DataError, match=rf"orientation {orientation}.*depth map .*depth\.png .*exif='apply'"):
            TRANSFORMS.build(load_image)(results)
        load_image["exif"] = "ignore" if frame == "stored" else "apply"
    results = load(TRANSFORMS.build(load_image)(results))
    np.testing.assert_array_equal(results["gt_depth_map"] > 1, results["img"][..., 0] > 128)


def test_one_measured_pixel_will_do(write_png: WritePng) -> None:
    values = np.zeros((2, 3), np.uint16)
    values[1, 1] = 700
    assert load(write_png(values))["gt_depth_map"].sum() == pytest.approx(0.7)


def test_a_missing_file_is_named_with_its_image(write_png: WritePng) -> None:
    results = write_png(b"")
    Path(results["depth_map_path"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations/kitchen_1\.png for the image .*images/kitchen_1\.jpg"):
        load(results)


def test_a_sample_without_depth_goes_through() -> None:
    sample = dict(img_path="somewhere.jpg", ori_shape=(2, 3))
    assert load(dict(sample)) == sample


# Augmentation


def scene(height: int = HEIGHT, width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """An image whose brightness rises from 50 to 150 over its columns in channel 0 and over its rows in channel 1, and
    a depth map that says the same: 1 m is a brightness of 100 in channel 0."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([50 + 100 * columns / width, 50 + 100 * rows / height, np.full((height, width), 200)], axis=-1)
    return np.rint(image).astype(np.uint8), (np.rint(image[..., 0]) / 100).astype(np.float32)


def test_the_crop_cuts_off_the_border() -> None:
    index = np.arange(HEIGHT * WIDTH, dtype=np.float32).reshape(HEIGHT, WIDTH)
    results = TRANSFORMS.build(dict(type="mmsnnet.NYUCrop"))(results_of(np.stack([index] * 3, axis=-1), index))
    assert results["gt_depth_map"].shape == results["img"].shape[:2] == results["img_shape"] == (427, 565)
    assert results["gt_depth_map"][0, 0] == 45 * WIDTH + 43 and results["gt_depth_map"][-1, -1] == 471 * WIDTH + 607
    assert np.array_equal(results["img"][..., 2], results["gt_depth_map"])


def test_the_crop_takes_the_same_share_of_another_size() -> None:
    results = TRANSFORMS.build(dict(type="mmsnnet.NYUCrop"))(results_of(*scene(240, 320)))
    assert results["img_shape"] == (236 - 22, 304 - 21)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_depth_stay_together(seed: int) -> None:
    """Through all that the config does to both of them: cropped, flipped, turned, and the depth itself left alone."""
    init_default_scope("mmseg")
    config = Config.fromfile(REPOSITORY / "configs/_base_/datasets/nyu.py")
    moves = [t for t in config.train_pipeline if not t.type.startswith(("mmsnnet.Load", "Pack"))]
    names = ["mmsnnet.NYUCrop", "RandomRotate", "RandomFlip", "RandomCrop", "mmsnnet.RandomColor"]
    assert [t.type for t in moves] == names
    image, depth = scene()
    results = results_of(image, depth)
    np.random.seed(seed)
    for transform in moves[:-1]:
        results = TRANSFORMS.build(transform)(results)
    moved = results["gt_depth_map"]
    assert moved.shape == results["img"].shape[:2] == results["img_shape"] == (416, 544)
    assert set(np.unique(moved)) <= {0.0, *np.unique(depth)}
    measured = moved > 0
    assert measured.mean() > 0.9
    # The nearest neighbour here, interpolation there: a step of brightness apart, but beside the black corners.
    apart = np.abs(100 * moved - results["img"][..., 0].astype(float))[measured]
    assert (apart <= 1.5).mean() > 0.99
    assert not measured[results["img"].sum(axis=-1) == 0].any()
    # Not mirrored unless flipped: the brightness of channel 0 rises to the right.
    rising = results["img"][200, 500, 0] > results["img"][200, 50, 0]
    assert rising != results["flip"]


def test_the_moves_are_drawn() -> None:
    init_default_scope("mmseg")
    config = Config.fromfile(REPOSITORY / "configs/_base_/datasets/nyu.py")
    moves = [TRANSFORMS.build(t) for t in config.train_pipeline[2:6]]
    seen = set()
    for _ in range(12):
        results = results_of(*scene())
        for move in moves:
            results = move(results)
        # A turned image has rows that are not all alike in channel 0.
        turned = not (results["img"][0] == results["img"][-1])[:, 0].all()
        seen.add((results["flip"], turned))
    assert len(seen) == 4


# Colour


def color(image: np.ndarray, **settings: Any) -> np.ndarray:
    one = dict(gamma=(1.0, 1.0), brightness=(1.0, 1.0), color=(1.0, 1.0), prob=1.0)
    depth = np.ones(image.shape[:2], np.float32)
    results = TRANSFORMS.build(dict(type="mmsnnet.RandomColor", **one | settings))(results_of(image, depth))
    assert results["gt_depth_map"] is depth
    assert results["img"].dtype == np.uint8 and results["img"].shape == image.shape
    return results["img"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 51, 102, 204, 255]),
        (dict(gamma=(2.0, 2.0)), [0, 10, 41, 163, 255]),  # 255 * (0.2, 0.4, 0.8) ** 2 = 10.2, 40.8, 163.2
        (dict(brightness=(0.6, 0.6)), [0, 31, 61, 122, 153]),  # 30.6, 61.2, 122.4
        (dict(brightness=(1.2, 1.2)), [0, 61, 122, 245, 255]),  # 61.2, 122.4, 244.8, and no brighter than white
        (dict(color=(0.8, 0.8)), [0, 41, 82, 163, 204]),  # 40.8, 81.6, 163.2
        (dict(gamma=(2.0, 2.0), brightness=(1.25, 1.25), color=(0.8, 0.8)), [0, 10, 41, 163, 255]),
        (dict(prob=0.0, gamma=(2.0, 2.0)), [0, 51, 102, 204, 255]),
    ],
)
def test_colours_worked_out_by_hand(settings: dict[str, Any], expected: list[int]) -> None:
    levels = np.array([0, 51, 102, 204, 255], np.uint8)
    changed = color(np.stack([levels[None]] * 3, axis=-1), **settings)
    assert [changed[0, :, channel].tolist() for channel in range(3)] == [expected] * 3


def test_channels_are_coloured_by_themselves_and_within_the_range() -> None:
    image = np.full((4, 5, 3), 200, np.uint8)
    drawn = np.array([color(image, color=(0.9, 1.1))[0, 0] / 200 for _ in range(200)])
    assert 0.895 <= drawn.min() < 0.92 and 1.08 < drawn.max() <= 1.105
    assert np.abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.3


def test_half_of_the_images_stay_as_they_are_by_default() -> None:
    image = np.full((4, 5, 3), 200, np.uint8)
    transform = TRANSFORMS.build(dict(type="mmsnnet.RandomColor"))
    changed = [(transform(dict(img=image))["img"] != image).any() for _ in range(400)]
    assert 0.4 < np.mean(changed) < 0.6


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_floating_images_of_any_bands_change_as_bytes_do(channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, channels), np.uint8)
    settings = dict(gamma=(1.5, 1.5), brightness=(1.2, 1.2), color=(0.9, 1.1), prob=1.0)
    found = []
    for pixels in (image, image.astype(np.float32)):
        np.random.seed(0)
        found.append(TRANSFORMS.build(dict(type="mmsnnet.RandomColor", **settings))(dict(img=pixels))["img"])
    assert found[0].dtype == np.uint8 and found[1].dtype == np.float32 and found[0].shape == image.shape
    np.testing.assert_allclose(found[1], found[0], atol=0.51)
    assert np.abs(found[1] - image).max() > 5


@pytest.mark.parametrize("image", [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 3), np.uint16)])
def test_images_that_it_does_not_know_are_refused(image: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"RandomColor: an image must be \(H, W, channels\)"):
        TRANSFORMS.build(dict(type="mmsnnet.RandomColor"))(dict(img=image, img_path="a.png"))


def test_the_same_seed_gives_the_same_colours() -> None:
    image = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    found = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        found.append(color(image, gamma=(0.9, 1.1), brightness=(0.75, 1.25), color=(0.9, 1.1)))
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(prob=1.5), r"prob must be 0 to 1, got 1\.5"),
        (dict(gamma=(0.0, 1.0)), r"gamma must be \(lowest, highest\), both above 0, got \(0\.0, 1\.0\)"),
        (dict(brightness=(1.2, 0.8)), r"brightness must be \(lowest, highest\).*got \(1\.2, 0\.8\)"),
        (dict(color=(-1.0, 1.0)), r"color must be \(lowest, highest\)"),
    ],
)
def test_wrong_ranges(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TRANSFORMS.build(dict(type="mmsnnet.RandomColor", **settings))
