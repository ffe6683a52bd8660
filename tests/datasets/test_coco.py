"""COCO's layout: annotation files that are read, and what is said of those that are not in its format."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from mmsnnet.errors import DataError

pytestmark = pytest.mark.detection

Annotations = dict[str, Any]
Make = Callable[..., Any]
FILE = "annotations/instances.json"


@pytest.fixture
def annotations() -> Annotations:
    """Two images of 8 x 10 with a cat and a dog each, a crowd of dogs among them, and a third one with nothing."""
    images = [dict(id=i, file_name=f"{i}.jpg", height=8, width=10) for i in (1, 2, 3)]
    square = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
    crowd = dict(size=[8, 10], counts=[40, 40])  # column by column: the right half
    things = [
        dict(id=10 * i + c, image_id=i, category_id=c, iscrowd=0, area=16, bbox=[1, 1, 4, 4], segmentation=square)
        for i in (1, 2)
        for c in (7, 9)
    ]
    things[-1] |= dict(iscrowd=1, area=40, bbox=[5, 0, 5, 8], segmentation=crowd)
    return dict(images=images, annotations=things, categories=[dict(id=7, name="cat"), dict(id=9, name="dog")])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """``make(contents, classes)``: the data set of an annotation file with these contents, text as it is."""

    def build(
        contents: Any, classes: tuple[str, ...] = ("cat", "dog"), masks: bool = True, file: str = FILE, **settings: Any
    ) -> Any:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        if contents is not None:
            text = contents if isinstance(contents, str) else json.dumps(contents)
            (tmp_path / file).write_text(text)
        pipeline = [
            dict(type="mmsnnet.LoadImage"),
            dict(type="mmdet.LoadAnnotations", with_bbox=True, with_mask=masks),
            dict(type="mmdet.PackDetInputs", meta_keys=("img_id", "ann_file")),
        ]
        settings.setdefault("filter_cfg", dict(filter_empty_gt=True))
        prefix = dict(img="images")
        return DATASETS.build(
            dict(type="mmsnnet.CocoDataset", data_root=str(tmp_path), ann_file=file, data_prefix=prefix)
            | dict(metainfo=dict(classes=classes), pipeline=pipeline, **settings)
        )

    return build


def write_images(folder: Path) -> None:
    (folder / "images").mkdir()
    for name in ("1.jpg", "2.jpg"):
        cv2.imwrite(str(folder / "images" / name), np.zeros((8, 10, 3), np.uint8))


def test_instances_are_read(annotations: Annotations, make: Make, tmp_path: Path) -> None:
    dataset = make(annotations)
    assert len(dataset) == 2  # the image without instances teaches nothing
    write_images(tmp_path)
    sample = dataset[1]["data_samples"]
    assert sample.gt_instances.labels.tolist() == [0]
    assert sample.gt_instances.bboxes.tensor.tolist() == [[1, 1, 5, 5]]
    assert sample.gt_instances.masks.masks.sum() == 16
    assert sample.ignored_instances.labels.tolist() == [1]
    (crowd,) = sample.ignored_instances.masks.masks
    assert crowd[:, 5:].all() and not crowd[:, :5].any()


def test_images_without_instances_stay_where_nothing_is_filtered(annotations: Annotations, make: Make) -> None:
    assert len(make(annotations, filter_cfg=None)) == 3


def test_some_of_the_categories(annotations: Annotations, make: Make) -> None:
    dataset = make(annotations, classes=("dog",))
    assert [[thing["bbox_label"] for thing in dataset.get_data_info(i)["instances"]] for i in (0, 1)] == [[0], [0]]


@pytest.mark.parametrize("scope", ["mmengine", "mmdet"])
def test_data_sets_can_be_joined_and_samples_tell_their_file(
    scope: str, annotations: Annotations, make: Make, tmp_path: Path
) -> None:
    """With metainfo as of one data set, which metrics take their classes from."""
    write_images(tmp_path)
    parts = [make(annotations, file=f"{name}.json") for name in "ab"]
    joined = DATASETS.build(dict(type=f"{scope}.ConcatDataset", datasets=parts))
    files = [joined[i]["data_samples"].ann_file for i in range(len(joined))]
    assert files == [str(tmp_path / f"{name}.json") for name in "aabb"]
    assert joined.metainfo["classes"] == ("cat", "dog")


def says(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    """Asserts that a message names the annotation file and what else it should."""
    assert [word for word in (FILE, *words) if word not in str(error.value)] == []


def test_a_missing_file(make: Make) -> None:
    with pytest.raises(FileNotFoundError) as error:
        make(None)
    says(error, "data_root", "ann_file")


@pytest.mark.parametrize("text", ["<annotation/>", '{"images": [', "\x00"])
def test_a_file_that_is_not_json(make: Make, text: str) -> None:
    with pytest.raises(ValueError) as error:
        make(text)
    says(error, "is not JSON")


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_a_missing_list(annotations: Annotations, make: Make, kind: str) -> None:
    del annotations[kind]
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, f"no list {kind!r}")


@pytest.mark.parametrize("contents", ["[]", '"text"', "3"])
def test_json_of_another_kind(make: Make, contents: str) -> None:
    with pytest.raises(ValueError) as error:
        make(contents)
    says(error, "no lists images, annotations, categories")


@pytest.mark.parametrize(
    ("kind", "key"),
    [("annotations", "bbox"), ("annotations", "image_id"), ("images", "file_name"), ("categories", "name")],
)
def test_an_entry_without_a_key(annotations: Annotations, make: Make, kind: str, key: str) -> None:
    del annotations[kind][1][key]
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, f"{kind}[1] lacks {key}")


def test_an_entry_of_another_kind(annotations: Annotations, make: Make) -> None:
    annotations["annotations"].append([1, 2])
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, "annotations[4] lacks id, image_id, category_id, bbox, area")


SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]
FAULTS = [
    (dict(category_id=8), "category_id 8", "among the categories"),
    (dict(image_id=4), "image_id 4", "among the images"),
    (dict(image_id="1"), "image_id '1'", "among the images"),
    (dict(bbox=None), "bbox None", "[x, y, width, height]"),
    (dict(bbox=[1, 1, 4]), "bbox [1, 1, 4]", "[x, y, width, height]"),
    (dict(bbox=["1", "1", "4", "4"]), "bbox ['1'", "[x, y, width, height]"),
    (dict(bbox=[1, 1, float("nan"), 4]), "bbox [1, 1, nan, 4]", "finite"),
    (dict(bbox=[1, 1, float("inf"), 4]), "bbox [1, 1, inf, 4]", "finite"),
    (dict(bbox=[5, 1, -4, 4]), "bbox [5, 1, -4, 4]", "at least 0"),
    (dict(bbox=[5, 1, 4, -1]), "bbox [5, 1, 4, -1]", "at least 0"),
    (dict(area="16"), "area '16'", "a number of pixels"),
    (dict(area=-16), "area -16", "at least 0"),
    (dict(segmentation="none"), "segmentation 'none'", "a list of polygons"),
    (dict(segmentation=SQUARE), "segmentation [1, 1, 5", "a list of polygons"),
    (dict(segmentation=[SQUARE, ["1", "1", "5", "1", "5", "5"]]), "segmentation [[1, 1, 5", "finite numbers"),
    (dict(segmentation=[[1, 1, 5, 1, float("nan"), 5]]), "segmentation [[1, 1, 5", "finite numbers"),
    (dict(segmentation=dict(counts=[40, 40])), "segmentation {'counts': [40, 40]}", "run lengths"),
    (dict(segmentation=dict(size=[8, 10], counts=None)), "segmentation {'counts': None", "run lengths"),
]


@pytest.mark.parametrize(("changes", "found", "expected"), FAULTS)
def test_a_fault_of_an_annotation(
    annotations: Annotations, make: Make, changes: dict[str, Any], found: str, expected: str
) -> None:
    annotations["annotations"][2] |= changes
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, "annotations[2], with id 27, has " + found, expected)


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_an_id_that_is_there_twice(annotations: Annotations, make: Make, kind: str) -> None:
    annotations[kind].append(annotations[kind][0])
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, f"two of its {kind} have the same id")


@pytest.mark.parametrize("changes", [dict(area=0), dict(bbox=[1, 1, 4, 0]), dict(bbox=[1, 1, 0, 4])])
def test_instances_without_an_area_are_left_out_as_by_mmdet(
    annotations: Annotations, make: Make, changes: dict[str, Any]
) -> None:
    """COCO's own files have such."""
    annotations["annotations"][0] |= changes
    assert [thing["bbox_label"] for thing in make(annotations).get_data_info(0)["instances"]] == [1]


@pytest.mark.parametrize("empty", [None, []])
def test_an_empty_segmentation_is_none(annotations: Annotations, make: Make, empty: Any) -> None:
    annotations["annotations"][0]["segmentation"] = empty
    assert "mask" not in make(annotations, masks=False).get_data_info(0)["instances"][0]


def test_compressed_run_lengths_are_read(annotations: Annotations, make: Make) -> None:
    annotations["annotations"][0]["segmentation"] = runs = dict(size=[8, 10], counts="X1X1")
    assert make(annotations).get_data_info(0)["instances"][0]["mask"] == runs


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (("cat", "horse"), ("no category 'horse'", "cat, dog")),
        (("dog", "cat"), ("another order", "cat, dog")),
    ],
)
def test_classes_that_are_not_those_of_the_file(
    annotations: Annotations, make: Make, classes: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError) as error:
        make(annotations, classes)
    says(error, "metainfo.classes", *words)


def test_masks_that_are_not_there(annotations: Annotations, make: Make) -> None:
    del annotations["annotations"][0]["segmentation"]
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, "1.jpg", "no segmentation", "with_mask")


def test_boxes_alone_need_no_masks(annotations: Annotations, make: Make) -> None:
    for annotation in annotations["annotations"]:
        del annotation["segmentation"]
    assert len(make(annotations, masks=False)) == 2


def test_a_file_of_which_no_image_is_left(annotations: Annotations, make: Make) -> None:
    annotations["annotations"].clear()
    with pytest.raises(ValueError) as error:
        make(annotations)
    says(error, "all of its 3 images", "filter_empty_gt")


def test_a_missing_image_is_named(annotations: Annotations, make: Make) -> None:
    dataset = make(annotations)
    with pytest.raises(FileNotFoundError, match=r"1\.jpg"):
        dataset[0]


# Sizes of images


@pytest.mark.parametrize("size", [0, -8, None, "8", float("nan")])
def test_a_size_that_is_none_is_named(annotations: Annotations, make: Make, size: Any) -> None:
    annotations["images"][1]["height"] = size
    with pytest.raises(DataError, match=rf"{FILE}: images\[1\], with id 2, has height .* at least 1"):
        make(annotations)


@pytest.mark.parametrize("test_mode", [False, True])
def test_a_stated_size_that_is_not_the_images_is_named(
    annotations: Annotations, make: Make, tmp_path: Path, test_mode: bool
) -> None:
    write_images(tmp_path)
    annotations["images"][0] |= dict(height=10, width=8)
    dataset = make(annotations, test_mode=test_mode)
    with pytest.raises(DataError, match=rf"{FILE} states \(10, 8\) .*images/1\.jpg, which is \(8, 10\)"):
        dataset[0]
    assert dataset[1]["data_samples"].img_id == 2


@pytest.mark.parametrize("frame", ["stored", "upright"])
def test_boxes_and_masks_fit_a_turned_image(annotations: Annotations, make: Make, tmp_path: Path, frame: str) -> None:
    """White, with one black pixel where the mask of one pixel is."""
    (tmp_path / "images").mkdir()
    stored = np.full((8, 10, 3), 255, np.uint8)
    stored[0, 0] = 0
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[274] = 6
    image.save(tmp_path / "images/1.png", exif=exif)  # upright, the black pixel is in the upper right corner
    height, width, x = (8, 10, 0) if frame == "stored" else (10, 8, 7)
    box = [x, 0, 1, 1]
    annotations["images"] = [dict(id=1, file_name="1.png", height=height, width=width)]
    square = [[x, 0, x + 1, 0, x + 1, 1, x, 1]]
    annotations["annotations"] = [
        dict(id=1, image_id=1, category_id=7, iscrowd=0, area=1, bbox=box, segmentation=square)
    ]
    sample = make(annotations)[0]
    (mask,) = sample["data_samples"].gt_instances.masks.masks
    np.testing.assert_array_equal(mask == 1, sample["inputs"].numpy()[0] == 0)
    assert mask.shape == (height, width) and mask.sum() == 1
