"""Checked loading for segmentation: what mmseg's own loading gives, and errors that name the file."""

import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

from mmsnnet.datasets import write_shapes
from mmsnnet.errors import UserError
from mmsnnet.registry import TRANSFORMS

IMAGE, LABELS = "images/training/ADE_train_00000001.jpg", "annotations/training/ADE_train_00000001.png"
SIZE = (32, 40)
CHECKED = (dict(type="mmsnnet.LoadImage"), dict(type="mmsnnet.LoadSegLabels", num_classes=150))
STOCK = (dict(type="LoadImageFromFile"), dict(type="mmseg.LoadAnnotations"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("set") / "ade20k", "ade20k", train=2, val=1, size=SIZE)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "ade20k"))


def read(root: Path, *pipeline: dict, dataset: Callable = ADE20KDataset, **options) -> dict:
    prefix = dict(img_path="images/training", seg_map_path="annotations/training")
    return dataset(data_root=str(root), data_prefix=prefix, pipeline=list(pipeline), **options)[0]


def write_labels(root: Path, labels: np.ndarray) -> None:
    Image.fromarray(labels).save(root / LABELS)


@pytest.mark.parametrize("backend", ["pillow", "cv2"])
def test_good_data_is_loaded_as_mmseg_does(original, backend):
    checked = read(original, CHECKED[0], {**CHECKED[1], "imdecode_backend": backend})
    stock = read(original, STOCK[0], {**STOCK[1], "imdecode_backend": backend})
    np.testing.assert_array_equal(checked["img"], stock["img"])
    np.testing.assert_array_equal(checked["gt_seg_map"], stock["gt_seg_map"])
    assert checked["gt_seg_map"].dtype == np.uint8
    assert {*np.unique(checked["gt_seg_map"])} > {0, 255}
    assert checked["seg_fields"] == stock["seg_fields"] == ["gt_seg_map"]


def test_labels_from_0_keep_their_values(root):
    labels = np.full(SIZE, 255, np.uint8)
    labels[:2, :3] = [[0, 1, 2], [10, 9, 8]]
    write_labels(root, labels)
    options = dict(dataset=BaseSegDataset, img_suffix=".jpg", metainfo=dict(classes=tuple(map(str, range(11)))))
    sample = read(root, CHECKED[0], dict(type="mmsnnet.LoadSegLabels", num_classes=11), **options)
    np.testing.assert_array_equal(sample["gt_seg_map"], labels)


def test_labels_from_1_go_down_by_one(root):
    labels = np.zeros(SIZE, np.uint8)
    labels[0, :4] = [1, 2, 150, 255]
    write_labels(root, labels)
    sample = read(root, *CHECKED)
    assert sample["gt_seg_map"][0, :4].tolist() == [0, 1, 149, 255]
    assert set(np.unique(sample["gt_seg_map"][1:])) == {255}


def test_classes_of_the_users_choice_are_renumbered(original):
    chosen = dict(metainfo=dict(classes=("sky", "wall")))
    # The file still has the classes of the whole set: what is not chosen is no class too many.
    sample = read(original, CHECKED[0], dict(type="mmsnnet.LoadSegLabels", num_classes=2), **chosen)
    stock = read(original, *STOCK, **chosen)
    np.testing.assert_array_equal(sample["gt_seg_map"], stock["gt_seg_map"])
    assert set(np.unique(sample["gt_seg_map"])) == {1, 255}  # the background, ADE20K's first class, is "wall"


def is_refused(root: Path, error: type[Exception], message: str, file: str) -> None:
    with pytest.raises(error) as raised:
        read(root, *CHECKED)
    assert isinstance(raised.value, UserError)
    assert str(root / file) in str(raised.value)
    assert re.search(message, str(raised.value)), raised.value


BAD_LABELS = {
    "a class too many": (np.full(SIZE, 151, np.uint8), r"1 to 150 for its 150 classes.*0 or 255.*found 151$"),
    "several too many": (
        np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE),
        r"found 151, 152, 153, 154, 155, \.\.\.$",
    ),
    "16 bits": (np.full(SIZE, 257, np.uint16), r"found 257$"),  # would be label 1 in a byte
    "colours": (np.zeros((*SIZE, 3), np.uint8), r"one channel, found an array of shape \(32, 40, 3\)"),
    "another size": (np.zeros((32, 41), np.uint8), r"as large as its image, found \(32, 41\) for .*\(32, 40\)"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_a_wrong_label_map_is_named(root, kind):
    labels, message = BAD_LABELS[kind]
    write_labels(root, labels)
    is_refused(root, ValueError, message, LABELS)


def test_16_bits_with_good_labels_are_good(root):
    write_labels(root, np.full(SIZE, 7, np.uint16))
    assert set(np.unique(read(root, *CHECKED)["gt_seg_map"])) == {6}


@pytest.mark.parametrize("file", [IMAGE, LABELS])
@pytest.mark.parametrize("damage", ["garbage", "empty", "cut short"])
def test_a_file_that_cannot_be_decoded_is_named(root, file, damage):
    whole = (root / file).read_bytes()
    (root / file).write_bytes({"garbage": b"no image", "empty": b"", "cut short": whole[: len(whole) // 2]}[damage])
    is_refused(
        root, ValueError, r"cannot be decoded by '(cv2|pillow)' \((?s:.+)\): expected (an image|a label map)", file
    )


def save_with_a_broken_second_chunk(path: Path) -> None:
    """A PNG of several chunks of pixels, the second of which has no name."""
    Image.fromarray(np.random.default_rng(0).integers(0, 150, (400, 400), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 4)
    path.write_bytes(whole[:second] + bytes(4) + whole[second + 4 :])


@pytest.mark.parametrize(
    "settings", [dict(CHECKED[0], imdecode_backend="pillow"), CHECKED[1]], ids=["an image", "a label map"]
)
def test_a_broken_chunk_is_told_with_the_file(tmp_path, settings):
    """Pillow says it by a SyntaxError."""
    path = tmp_path / "a.png"
    save_with_a_broken_second_chunk(path)
    with pytest.raises(ValueError, match=rf"{path} cannot be decoded by 'pillow' \(broken PNG file"):
        TRANSFORMS.build(settings)(
            dict(img_path=str(path), seg_map_path=str(path), seg_fields=[], reduce_zero_label=False)
        )


def test_the_cause_is_told(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot be decoded by 'cv2' \(.*Is a directory"):
        TRANSFORMS.build(CHECKED[0])(dict(img_path=str(tmp_path)))


def test_images_cannot_be_skipped():
    with pytest.raises(TypeError, match="ignore_empty"):
        TRANSFORMS.build(dict(CHECKED[0], ignore_empty=True))


def test_a_label_map_that_cannot_be_decoded_by_opencv_is_named(root):
    (root / LABELS).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{re.escape(str(root / LABELS))} cannot be decoded by 'cv2'"):
        read(root, CHECKED[0], {**CHECKED[1], "imdecode_backend": "cv2"})


def test_an_image_without_a_label_map_is_named(root):
    (root / LABELS).unlink()
    is_refused(root, FileNotFoundError, f"for the image {re.escape(str(root / IMAGE))}", LABELS)


def test_a_missing_image_is_named(root):
    load = TRANSFORMS.build(CHECKED[0])
    with pytest.raises(FileNotFoundError, match=r"no image .*/none\.jpg"):
        load(dict(img_path=str(root / "none.jpg")))


def test_size_is_compared_with_the_image_as_it_was_loaded(original):
    """As in test pipelines, where the image is resized and the labels are not."""
    resize = dict(type="mmseg.Resize", scale=(80, 64), keep_ratio=True)
    sample = read(original, CHECKED[0], resize, CHECKED[1])
    assert sample["img"].shape[:2] == (64, 80) and sample["gt_seg_map"].shape == SIZE


def test_samples_without_labels_go_through(original):
    load = TRANSFORMS.build(CHECKED[1])
    sample = dict(img_path=str(original / IMAGE))
    assert load(dict(sample)) == sample


@pytest.mark.parametrize("num_classes", [0, 255])
def test_the_number_of_classes_must_fit_into_a_byte(num_classes):
    with pytest.raises(ValueError, match=f"1 to 254.*got {num_classes}"):
        TRANSFORMS.build(dict(type="mmsnnet.LoadSegLabels", num_classes=num_classes))


def test_nothing_is_deprecated_and_settings_are_printed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load = TRANSFORMS.build(CHECKED[1])
    assert "num_classes=150" in repr(load)
