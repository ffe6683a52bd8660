"""Checked loading for segmentation: what mmseg's own loading gives, and errors that name the file."""

import re
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from mmseg.datasets import ADE20KDataset, BaseSegDataset
from PIL import Image

from mmsnnet.datasets import write_shapes
from mmsnnet.errors import DataError, SettingError, UserError
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pillow", "cv2"])
def test_good_data_is_loaded_as_mmseg_does(original, backend):
    checked = read(original, CHECKED[0], {**CHECKED[1], "imdecode_backend": backend})
    stock = read(original, STOCK[0], {**STOCK[1], "imdecode_backend": backend})
    np.testing.assert_array_equal(checked["img"], stock["img"])
    np.testing.assert_array_equal(checked["gt_seg_map"], stock["gt_seg_map"])
    assert checked["gt_seg_map"].dtype == np.uint8
    assert {*np.unique(checked["gt_seg_map"])} > {0, 255}
    assert checked["seg_fields"] == stock["seg_fields"] == ["gt_seg_map"]


@pytest.mark.slow
def test_labels_from_0_keep_their_values(root):
    labels = np.full(SIZE, 255, np.uint8)
    labels[:2, :3] = [[0, 1, 2], [10, 9, 8]]
    write_labels(root, labels)
    options = dict(dataset=BaseSegDataset, img_suffix=".jpg", metainfo=dict(classes=tuple(map(str, range(11)))))
    sample = read(root, CHECKED[0], dict(type="mmsnnet.LoadSegLabels", num_classes=11), **options)
    np.testing.assert_array_equal(sample["gt_seg_map"], labels)


@pytest.mark.slow
def test_labels_from_1_go_down_by_one(root):
    labels = np.zeros(SIZE, np.uint8)
    labels[0, :4] = [1, 2, 150, 255]
    write_labels(root, labels)
    sample = read(root, *CHECKED)
    assert sample["gt_seg_map"][0, :4].tolist() == [0, 1, 149, 255]
    assert set(np.unique(sample["gt_seg_map"][1:])) == {255}


@pytest.mark.slow
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
    "another size": (np.zeros((32, 41), np.uint8), r"the size of its image, found \(32, 41\) for .*\(32, 40\)"),
}


@pytest.mark.slow
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
    decoder = r"cannot be decoded by '(cv2|pillow)' \((?s:.+)\): expected (an image|a label map)"
    is_refused(root, ValueError, "is empty: it has 0 bytes" if damage == "empty" else decoder, file)


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
    """Whichever transform reads the file."""
    for settings in (*CHECKED, dict(type="mmsnnet.LoadDepth"), dict(type="mmsnnet.LoadPillowImage")):
        with pytest.raises(DataError, match=rf"{tmp_path} cannot be read: .*Is a directory"):
            TRANSFORMS.build(settings)({key: str(tmp_path) for key in ("img_path", "seg_map_path", "depth_map_path")})


def test_images_cannot_be_skipped():
    with pytest.raises(TypeError, match="ignore_empty"):
        TRANSFORMS.build(dict(CHECKED[0], ignore_empty=True))


def test_a_label_map_that_cannot_be_decoded_by_opencv_is_named(root):
    (root / LABELS).write_bytes(b"no image")
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


# Values in their own type


def load_labels(path: Path, stored: np.ndarray | None, reduce_zero_label: bool = False, **settings) -> np.ndarray:
    if stored is not None:
        tifffile.imwrite(path, stored, photometric="minisblack")
    settings.setdefault("num_classes", 3)
    sample = dict(img_path="x", seg_map_path=str(path), reduce_zero_label=reduce_zero_label, seg_fields=[])
    label_map = settings.pop("label_map", None)
    return TRANSFORMS.build(dict(type="mmsnnet.LoadSegLabels", **settings))(sample | dict(label_map=label_map))[
        "gt_seg_map"
    ]


def with_nodata(dtype: str, nodata: float) -> np.ndarray:
    labels = np.full((8, 8), 2, dtype)
    labels[4:] = nodata
    return labels


NODATA = [
    ("i1", -1),
    ("i1", -128),
    ("i2", -1),
    ("i2", -9999),
    ("i2", -32768),
    ("i2", -256),
    ("u2", 256),
    ("u2", 257),
    ("u2", 65535),
    ("i4", -255),
    ("i4", -256),
    ("i4", -(2**31)),
    ("u4", 2**32 - 1),
    ("u4", 2**31),
    ("u4", 256),
    ("i8", -(2**40)),
    ("u8", 2**64 - 1),
]


@pytest.mark.parametrize(("dtype", "nodata"), NODATA)
@pytest.mark.parametrize("backend", ["pillow", "cv2", "tifffile"])
def test_nodata_is_refused_with_its_value(tmp_path, dtype, nodata, backend):
    """By a decoder that cannot read the type too, though it cannot tell the value."""
    with pytest.raises(DataError, match=r"labels\.tif") as raised:
        load_labels(tmp_path / "labels.tif", with_nodata(dtype, nodata), imdecode_backend=backend)
    cannot = "cannot be decoded by" in str(raised.value) or "does not give as stored" in str(raised.value)
    assert str(raised.value).endswith(f"found {nodata}") or (cannot and backend != "tifffile")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "i1", "i2", "i4"])
@pytest.mark.parametrize("backend", ["pillow", "tifffile"])
def test_good_labels_of_any_whole_type_are_good(tmp_path, dtype, backend):
    labels = np.resize(np.arange(3), (8, 8)).astype(dtype)
    np.testing.assert_array_equal(load_labels(tmp_path / "a.tif", labels, imdecode_backend=backend), labels)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("value", [1.0, 0.5, np.nan, -9999.0])
def test_floats_are_refused_even_whole_ones(tmp_path, dtype, value):
    with pytest.raises(
        DataError, match=r"a\.tif: a label map must have integer values.*uint8; found float\d\d .*values from"
    ):
        load_labels(tmp_path / "a.tif", with_nodata(dtype, value), imdecode_backend="tifffile")


def test_a_nan_of_the_default_decoder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"found float32 .*nan"):
        load_labels(tmp_path / "a.tif", with_nodata("f4", np.nan))


def test_a_palette_gives_its_indices(tmp_path):
    labels = np.resize(np.arange(3, dtype=np.uint8), (8, 8))
    image = Image.fromarray(labels)
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 9])
    image.save(tmp_path / "a.png", bits=8)
    np.testing.assert_array_equal(load_labels(tmp_path / "a.png", None), labels)
    image.save(tmp_path / "a.png", bits=2)
    np.testing.assert_array_equal(load_labels(tmp_path / "a.png", None), labels)


@pytest.mark.parametrize("backend", ["pillow", "cv2"])
def test_one_bit_is_0_and_1_by_every_decoder(tmp_path, backend):
    labels = np.resize(np.array([False, True, True]), (8, 8))
    Image.fromarray(labels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load_labels(tmp_path / "a.png", None, imdecode_backend=backend), labels)


def test_bits_that_decoders_stretch_are_refused(tmp_path):
    """4 bits of gray: Pillow and OpenCV make 0, 17, 34 of 0, 1, 2."""
    rows = b"".join(b"\0" + bytes([0x01, 0x21]) for _ in range(4))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 4, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert np.array(Image.open(tmp_path / "a.png"))[0].tolist() == [0, 17, 34, 17]
    with pytest.raises(DataError, match=r"a\.png: a label map of 4 bits .*write it with 8 bits"):
        load_labels(tmp_path / "a.png", None)


def test_a_bit_that_some_programs_invert_is_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.resize(np.array([False, True]), (8, 8)))
    with pytest.raises(DataError, match=r"a\.tif.*MINISWHITE"):
        load_labels(tmp_path / "a.tif", None)


def test_one_row_is_a_label_map(tmp_path):
    labels = np.array([[0, 1, 2]], np.uint8)
    np.testing.assert_array_equal(load_labels(tmp_path / "a.tif", labels), labels)


# The file's value of each class


def test_values_say_which_class_each_is(tmp_path):
    stored = np.resize(np.array([0, 255, 128], np.uint8), (8, 8))
    found = load_labels(tmp_path / "a.tif", stored, values=(0, 255, 128))
    np.testing.assert_array_equal(found, np.resize([0, 1, 2], (8, 8)))
    with pytest.raises(DataError, match=r"values=\(0, 255, 127\) for its 3 classes; found 128$"):
        load_labels(tmp_path / "a.tif", stored, values=(0, 255, 127))


def test_255_stays_no_label_where_it_is_none_of_the_values(tmp_path):
    stored = np.resize(np.array([10, 20, 255, 30], np.uint8), (8, 8))
    found = load_labels(tmp_path / "a.tif", stored, values=(10, 20, 30))
    np.testing.assert_array_equal(found, np.resize([0, 1, 255, 2], (8, 8)))


@pytest.mark.parametrize(("dtype", "values"), [("i2", (0, -9999, 1000)), ("u2", (0, 65535, 300)), ("i4", (7, -1, 8))])
def test_values_may_be_more_than_a_byte_holds(tmp_path, dtype, values):
    stored = np.resize(np.array([*values, 255]), (8, 8)).astype(dtype)
    found = load_labels(tmp_path / "a.tif", stored, values=values)
    np.testing.assert_array_equal(found, np.resize([0, 1, 2, 255], (8, 8)))
    with pytest.raises(DataError, match=r"found 77$"):
        load_labels(tmp_path / "a.tif", np.full((8, 8), 77, dtype), values=values)


def test_values_go_with_classes_of_the_users_choice(tmp_path):
    stored = np.resize(np.array([10, 20, 30], np.uint8), (8, 8))
    found = load_labels(tmp_path / "a.tif", stored, num_classes=2, values=(10, 20, 30), label_map={0: 1, 1: 255, 2: 0})
    np.testing.assert_array_equal(found, np.resize([1, 255, 0], (8, 8)))


@pytest.mark.parametrize(
    "values",
    [(0, 0, 1), (0, 1), (0, 1.0, 2), (0, True, 2), ("0", "1", "2")],
    ids=["twice", "few", "float", "bool", "str"],
)
def test_values_are_whole_numbers_one_for_each_class(values):
    with pytest.raises(SettingError, match=r"LoadSegLabels: values .*num_classes=3; got"):
        TRANSFORMS.build(dict(type="mmsnnet.LoadSegLabels", num_classes=3, values=values))


def test_values_contradict_what_would_move_them(tmp_path):
    stored = np.zeros((8, 8), np.uint8)
    with pytest.raises(SettingError, match=r"values=\(0, 255, 9\).*set reduce_zero_label=False"):
        load_labels(tmp_path / "a.tif", stored, reduce_zero_label=True, values=(0, 255, 9))
    with pytest.raises(SettingError, match=r"has 3 values, and the data set's files have 2 classes"):
        load_labels(tmp_path / "a.tif", stored, num_classes=2, values=(0, 255, 9))


def test_a_sample_whose_label_map_is_none_goes_through():
    """As mmdet's data sets make them."""
    sample = dict(img_path="a.jpg", seg_map_path=None)
    assert TRANSFORMS.build(CHECKED[1])(dict(sample)) == sample
