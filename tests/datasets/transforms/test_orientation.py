"""EXIF orientation: image and annotation in one frame, or an error that names the tag and the setting."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from mmsnnet.datasets.transforms.orientation import rotate_back, rotate_upright
from mmsnnet.errors import DataError
from mmsnnet.registry import TRANSFORMS

ORIENTATIONS = range(1, 9)
WIDE, SQUARE = (48, 96), (96, 96)
DECODERS = [*itertools.product(("jpg", "png", "webp", "tif"), ("cv2", "pillow")), ("tif", "tifffile")]


def picture(size: tuple[int, int]) -> np.ndarray:
    """RGB, red in the upper left corner alone: every turn moves it elsewhere."""
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[: size[0] // 3, : size[1] // 3] = (255, 0, 0)
    return pixels


def save(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    if path.suffix == ".tif":
        tags = [(274, 3, 1, orientation, True)]
        tifffile.imwrite(path, pixels, photometric="rgb" if pixels.ndim == 3 else "minisblack", extratags=tags)
        return path
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[274] = orientation
    options = (
        dict(quality=95, subsampling=0)
        if path.suffix == ".jpg"
        else dict(lossless=True)
        if path.suffix == ".webp"
        else {}
    )
    image.save(path, exif=exif, **options)
    return path


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """By Pillow."""
    image = Image.fromarray(pixels)
    image.getexif()[274] = orientation
    return np.array(ImageOps.exif_transpose(image))


def load(image: Path, labels: Path | None = None, settings: dict[str, Any] | None = None, **sample: Any) -> dict:
    results = dict(img_path=str(image), reduce_zero_label=False, seg_fields=[], label_map=None, **sample)
    if labels is not None:
        results["seg_map_path"] = str(labels)
    steps = [dict(type="mmsnnet.LoadImage", **(settings or {})), dict(type="mmsnnet.LoadSegLabels", num_classes=2)]
    for step in steps:
        results = TRANSFORMS.build(step)(results)
    return results


def red(results: dict) -> np.ndarray:
    image = results["img"]
    return (image[..., 2] if image.ndim == 3 else image) > 40  # red is 76 in gray


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_turn_is_pillows_and_goes_back(orientation: int) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    np.testing.assert_array_equal(rotate_upright(pixels, orientation), upright(pixels, orientation))
    np.testing.assert_array_equal(rotate_back(rotate_upright(pixels, orientation), orientation), pixels)


@pytest.mark.parametrize(("suffix", "backend"), DECODERS)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("color_type", ["color", "grayscale", "unchanged"])
def test_an_image_without_annotation_is_turned_by_every_decoder(tmp_path, suffix, orientation, backend, color_type):
    pixels = picture(WIDE)
    path = save(tmp_path / f"a.{suffix}", pixels, orientation)
    settings = dict(imdecode_backend=backend, color_type=color_type)
    results = load(path, settings=settings)
    expected = upright(pixels, orientation)[..., 0] > 128
    channel = 0 if (backend, color_type) == ("tifffile", "unchanged") else 2  # the file's order
    found = results["img"] if color_type == "grayscale" else results["img"][..., channel]
    np.testing.assert_array_equal(found > 40, expected)
    assert results["img_shape"] == results["ori_shape"] == expected.shape
    as_stored = load(path, settings=dict(settings, exif="ignore"))["img"]
    assert as_stored.shape[:2] == WIDE


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("frame", ["stored", "upright"])
@pytest.mark.parametrize("size", [WIDE, SQUARE], ids=["wide", "square"])
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_image_and_label_map_share_a_frame_or_it_is_an_error(tmp_path, orientation, frame, size, suffix):
    pixels = picture(size)
    image = save(tmp_path / f"a.{suffix}", pixels, orientation)
    labels = (pixels[..., 0] > 0).astype(np.uint8)
    labels = upright(labels, orientation) if frame == "upright" else labels
    path = tmp_path / "a.png"
    Image.fromarray(labels).save(path)
    if orientation != 1 and (orientation < 5 or size == SQUARE):  # the sizes are the same
        with pytest.raises(
            DataError, match=rf"a\.{suffix} has EXIF orientation {orientation}, .*a\.png .*exif='apply'"
        ):
            load(image, path)
        settings = dict(exif="apply" if frame == "upright" else "ignore")
    else:
        settings = {}
    results = load(image, path, settings)
    np.testing.assert_array_equal(results["gt_seg_map"], red(results))
    assert results["gt_seg_map"].any() and results["img_shape"] == labels.shape


def test_a_label_map_of_another_size_is_named_with_both_frames(tmp_path):
    image = save(tmp_path / "a.jpg", picture(WIDE), 6)
    Image.fromarray(np.zeros((10, 10), np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"a\.png has \(10, 10\).*\(48, 96\) as stored, \(96, 48\) rotated.*orientation 6"
    ):
        load(image, tmp_path / "a.png")


@pytest.mark.parametrize("size", [WIDE, SQUARE], ids=["wide", "square"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_label_map_with_its_images_tag_is_stored_as_the_image_is(tmp_path, orientation, size):
    pixels = picture(size)
    image = save(tmp_path / "a.jpg", pixels, orientation)
    labels = save(tmp_path / "a.png", (pixels[..., 0] > 0).astype(np.uint8), orientation)
    results = load(image, labels)
    np.testing.assert_array_equal(results["gt_seg_map"], red(results))
    assert results["img_shape"] == size


@pytest.mark.parametrize("of_image", [1, 3])
def test_a_label_map_with_another_tag_is_refused(tmp_path, of_image):
    image = save(tmp_path / "a.jpg", picture(SQUARE), of_image)
    labels = save(tmp_path / "a.png", np.zeros(SQUARE, np.uint8), 6)
    with pytest.raises(DataError, match=r"a\.png has EXIF orientation 6"):
        load(image, labels, dict(exif="ignore"))


def test_a_tiff_of_labels_with_a_tag_is_refused(tmp_path):
    image = save(tmp_path / "a.jpg", picture(SQUARE), 6)
    labels = save(tmp_path / "a.tif", np.zeros(SQUARE, np.uint8), 6)
    with pytest.raises(DataError, match=r"a\.tif is a TIFF with orientation 6"):
        load(image, labels, dict(exif="ignore"))


def test_toolboxes_label_loaders_need_not_know(tmp_path):
    pixels = picture(WIDE)
    image = save(tmp_path / "a.jpg", pixels, 8)
    Image.fromarray((upright(pixels, 8)[..., 0] > 0).astype(np.uint8)).save(tmp_path / "a.png")
    results = dict(img_path=str(image), seg_map_path=str(tmp_path / "a.png"), reduce_zero_label=False, seg_fields=[])
    for step in (dict(type="mmsnnet.LoadImage"), dict(type="mmseg.LoadAnnotations")):
        results = TRANSFORMS.build(step)(results)
    np.testing.assert_array_equal(results["gt_seg_map"], red(results))


def test_an_image_of_another_loader_is_not_trusted(tmp_path):
    image = save(tmp_path / "a.jpg", picture(SQUARE), 3)
    Image.fromarray(np.zeros(SQUARE, np.uint8)).save(tmp_path / "a.png")
    results = TRANSFORMS.build(dict(type="LoadImageFromFile"))(dict(img_path=str(image)))
    results |= dict(seg_map_path=str(tmp_path / "a.png"), reduce_zero_label=False, seg_fields=[])
    with pytest.raises(DataError, match=r"a\.jpg has EXIF orientation 3.*mmsnnet\.LoadImage in place of LoadImageFrom"):
        TRANSFORMS.build(dict(type="mmsnnet.LoadSegLabels", num_classes=2))(results)


def test_a_test_set_without_label_maps_is_turned(tmp_path):
    image = save(tmp_path / "a.jpg", picture(WIDE), 6)
    results = dict(img_path=str(image), seg_map_path=str(tmp_path / "none.png"))
    assert TRANSFORMS.build(dict(type="mmsnnet.LoadImage"))(results)["img_shape"] == WIDE[::-1]


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_a_number_that_exif_does_not_define_says_nothing(tmp_path, orientation):
    assert load(save(tmp_path / "a.jpg", picture(WIDE), orientation))["img_shape"] == WIDE


# Sizes that a data set states


def stated(size: tuple[int, int], **more: Any) -> dict[str, Any]:
    return dict(height=size[0], width=size[1], ann_file="instances.json", **more)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("size", [WIDE, WIDE[::-1]])
def test_a_stated_size_says_the_frame(tmp_path, orientation, size):
    path = save(tmp_path / "a.jpg", picture(WIDE), orientation)
    assert load(path, **stated(size, instances=[{}]))["img_shape"] == size


def test_a_stated_size_that_cannot_tell_is_an_error_for_an_annotated_image(tmp_path):
    path = save(tmp_path / "a.jpg", picture(SQUARE), 6)
    with pytest.raises(DataError, match=r"orientation 6.*instances\.json does not tell.*exif='apply'"):
        load(path, **stated(SQUARE, instances=[{}]))
    np.testing.assert_array_equal(
        red(load(path, **stated(SQUARE, instances=[]))), upright(picture(SQUARE), 6)[..., 0] > 0
    )


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("exif", [None, "apply", "ignore"])
def test_a_stated_size_that_is_neither_is_an_error_with_and_without_instances(tmp_path, orientation, exif):
    path = save(tmp_path / "a.jpg", picture(WIDE), orientation)
    for more in (dict(), dict(instances=[{}])):
        with pytest.raises(
            DataError, match=r"instances\.json states \(30, 96\) .*a\.jpg, which is \((48, 96|96, 48)\)"
        ):
            load(path, settings=dict(exif=exif), **stated((30, 96), **more))


def test_a_stated_size_is_held_to_a_frame_of_the_users_choice(tmp_path):
    path = save(tmp_path / "a.jpg", picture(WIDE), 6)
    with pytest.raises(DataError, match=r"states \(48, 96\).*which is \(96, 48\) with exif='apply'"):
        load(path, settings=dict(exif="apply"), **stated(WIDE))


def test_a_label_map_and_a_stated_size_that_disagree_are_named(tmp_path):
    path = save(tmp_path / "a.jpg", picture(WIDE), 6)
    Image.fromarray(np.zeros(WIDE, np.uint8)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="do not agree"):
        load(path, tmp_path / "a.png", **stated(WIDE[::-1], instances=[{}]))
