"""Loading images: what mmcv's own loading gives for ordinary files, and settings for the others."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile
from mmcv.transforms import LoadImageFromFile
from PIL import Image

from mmsnnet.errors import DataError, MissingFileError, SettingError, UserError
from mmsnnet.registry import TRANSFORMS

WHITE = 4095


def load(path: Path, **settings: Any) -> np.ndarray:
    return TRANSFORMS.build(dict(type="mmsnnet.LoadImage", **settings))(dict(img_path=str(path)))["img"]


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


@pytest.fixture
def deep(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A PNG of three channels with 12 bits in 16."""
    pixels = np.random.default_rng(0).integers(0, WHITE + 1, (16, 24, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), pixels)
    return tmp_path / "deep.png", pixels


@pytest.mark.parametrize("backend", ["cv2", "pillow"])
@pytest.mark.parametrize("color_type", ["color", "grayscale", "unchanged", "color_ignore_orientation"])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.bmp", "a.webp", "a.tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ordinary_images_are_loaded_as_by_mmcv(tmp_path, colours, name, mode, color_type, backend):
    path = tmp_path / name
    Image.fromarray(colours).convert(mode).save(path)
    settings = dict(color_type=color_type, imdecode_backend=backend)
    expected = LoadImageFromFile(**settings)(dict(img_path=str(path)))["img"]
    found = load(path, **settings)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


def test_alpha_of_a_png_is_dropped_or_kept_as_by_mmcv(tmp_path, colours):
    pixels = np.concatenate([colours, colours[..., :1]], axis=-1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png"), colours[..., ::-1])
    np.testing.assert_array_equal(load(tmp_path / "a.png", color_type="unchanged"), pixels[..., [2, 1, 0, 3]])


def test_to_float32_is_kept(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    assert load(tmp_path / "a.png", to_float32=True).dtype == np.float32


def test_more_than_8_bits_need_a_white(deep):
    path, pixels = deep
    with pytest.raises(
        DataError, match=rf"{path} has uint16 values from \d+ to \d+.*set max_value of mmsnnet\.LoadImage"
    ):
        load(path)
    found = load(path, max_value=WHITE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, pixels / WHITE * 255, rtol=1e-6)
    with pytest.raises(DataError, match=r"expected 0 to max_value=1000"):
        load(path, max_value=1000)


def test_the_gray_of_deep_images_is_that_of_their_colours(deep):
    path, pixels = deep
    expected = pixels @ [0.114, 0.587, 0.299] / WHITE * 255
    np.testing.assert_allclose(load(path, max_value=WHITE, color_type="grayscale"), expected, atol=0.05)


def test_an_8_bit_image_among_deep_ones_is_as_it_is(tmp_path, colours):
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png", max_value=WHITE), colours[..., ::-1])


@pytest.mark.parametrize("color_type", ["color", "grayscale", "unchanged"])
@pytest.mark.parametrize("backend", ["cv2", "pillow", "tifffile"])
def test_a_nan_is_refused(tmp_path, color_type, backend):
    pixels = np.ones((6, 8), np.float32)
    pixels[2, 3] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    with pytest.raises(DataError, match=r"a\.tif has 1 of 48 values that are not finite, such as nan"):
        load(tmp_path / "a.tif", color_type=color_type, imdecode_backend=backend, max_value=1.0)


def test_four_bands_go_through_mmsegs_transforms(tmp_path):
    pixels = np.random.default_rng(0).integers(0, WHITE, (16, 24, 4), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    steps = [
        dict(type="mmsnnet.LoadImage", color_type="unchanged", imdecode_backend="tifffile", max_value=WHITE),
        dict(type="Normalize", mean=[10.0, 20.0, 30.0, 40.0], std=[1.0, 2.0, 3.0, 4.0], to_rgb=False),
        dict(type="mmseg.RandomFlip", prob=1.0),
        dict(type="mmseg.RandomCrop", crop_size=(16, 24)),
        dict(type="mmseg.PackSegInputs", meta_keys=("img_path",)),
    ]
    results = dict(img_path=str(tmp_path / "a.tif"), seg_fields=[])
    for step in steps:
        results = TRANSFORMS.build(step)(results)
    expected = (pixels / WHITE * 255 - [10, 20, 30, 40]) / [1, 2, 3, 4]
    np.testing.assert_allclose(results["inputs"], expected[:, ::-1].transpose(2, 0, 1), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(color_type="colour"), "color_type must be one of color, "),
        (dict(exif="auto"), "exif must be 'apply', 'ignore' or None; got 'auto'"),
        (dict(exif="apply", color_type="color_ignore_orientation"), "exif='apply' contradicts color_type"),
        (dict(max_value=0), "max_value must be"),
        (dict(imdecode_backend="gdal"), "imdecode_backend must be one of cv2"),
    ],
)
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(SettingError, match=f"LoadImage: {message}"):
        TRANSFORMS.build(dict(type="mmsnnet.LoadImage", **settings))


def test_missing_and_damaged_files_are_a_users_mistakes(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    (tmp_path / "a.tif").write_bytes(b"II*\0\0")
    for name, kind in (("none.jpg", MissingFileError), ("a.jpg", DataError), ("a.tif", DataError), (".", DataError)):
        with pytest.raises(kind, match=str(tmp_path / name)) as raised:
            load(tmp_path / name)
        assert isinstance(raised.value, UserError)


def test_settings_are_printed():
    load = TRANSFORMS.build(dict(type="mmsnnet.LoadImage", exif="apply", max_value=WHITE))
    assert "exif='apply', max_value=4095" in repr(load)
