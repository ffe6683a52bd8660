"""ImageNet's layout: which images of which class, and what a folder that is not right is told."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from PIL import Image

from mmsnnet.datasets.imagenet import ImageNet
from mmsnnet.registry import DATASETS

# The folders that `make_layout` writes; sorted, their names give other numbers than the order here.
TREE = {
    "train/n02": ("b.JPEG", "a.JPEG"),
    "train/n01": ("c.jpg",),
    "train/n10": ("d.png", "e.Jpg"),
    "val/n10": ("f.JPEG",),
    "val/n01": ("g.JPEG",),
    "val/n02": ("h.JPEG",),
}


def make_layout(root: Path, tree: Mapping[str, tuple[str, ...]] = TREE) -> Path:
    for folder, names in tree.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (4, 4)).save(root / folder / name)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_layout(tmp_path / "data")


def listed(dataset: ImageNet) -> list[tuple[str, int]]:
    """The images and their labels, in order."""
    return [(dataset[index]["img_path"], dataset[index]["gt_label"]) for index in range(len(dataset))]


@pytest.mark.slow
def test_the_classes_are_the_sorted_folders(root: Path) -> None:
    dataset = DATASETS.build(dict(type="mmsnnet.ImageNet", data_root=str(root), split="train"))
    assert isinstance(dataset, ImageNet)
    assert dataset.metainfo["classes"] == ("n01", "n02", "n10")
    expected = [("n01/c.jpg", 0), ("n02/a.JPEG", 1), ("n02/b.JPEG", 1), ("n10/d.png", 2), ("n10/e.Jpg", 2)]
    assert listed(dataset) == [(f"{root}/train/{name}", label) for name, label in expected]
    assert {dataset[index]["num_classes"] for index in range(len(dataset))} == {3}


@pytest.mark.slow
def test_a_class_has_the_same_label_in_both_splits(root: Path) -> None:
    dataset = ImageNet(str(root), "val", metainfo=dict(name="mine"))
    assert listed(dataset) == [(f"{root}/val/{n}", i) for i, n in enumerate(("n01/g.JPEG", "n02/h.JPEG", "n10/f.JPEG"))]
    assert dataset.metainfo["name"] == "mine"


@pytest.mark.slow
def test_a_validation_set_alone_will_do(root: Path) -> None:
    shutil.rmtree(root / "train")
    assert len(ImageNet(str(root), "val")) == 3


@pytest.mark.slow
def test_it_can_be_cut_short_and_looked_into_late(root: Path) -> None:
    dataset = ImageNet(str(root), "train", indices=2, lazy_init=True)
    make_layout(root, {"train/n00": ("z.png",), "val/n00": ("z.png",)})
    dataset.full_init()
    assert [Path(path).name for path, _ in listed(dataset)] == ["z.png", "c.jpg"]


@pytest.mark.slow
def test_an_image_that_a_transform_drops_is_an_error(root: Path) -> None:
    dataset = ImageNet(str(root), "train", pipeline=[lambda results: None])
    with pytest.raises(Exception, match="Cannot find valid image"):
        dataset[0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_folder_is_named_with_the_layout(tmp_path: Path, split: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nowhere/{split}; data_root .* train/<class>/<image>"):
        ImageNet(str(tmp_path / "nowhere"), split)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("train/notes.txt", "expected only class folders in"),
        ("train/loose.JPEG", "expected only class folders in"),
        ("train/n01/notes.txt", r"expected only images \(.jpeg, .*\) in a class folder"),
        ("train/n01/.hidden.jpg", "expected only images"),
        ("train/n01/deeper/a.jpg", "expected only images"),
        ("train/.cache/a.jpg", "expected only class folders in"),
    ],
)
def test_what_is_no_image_of_a_class_is_named(root: Path, wrong: str, message: str) -> None:
    (root / wrong).parent.mkdir(exist_ok=True)
    (root / wrong).write_bytes(b"")
    named = Path(wrong).parent if "deeper" in wrong or ".cache" in wrong else wrong
    with pytest.raises(ValueError, match=rf"{root}/{named}: {message}"):
        ImageNet(str(root), "train")


def test_a_class_without_images_is_named(root: Path) -> None:
    (root / "train/n05").mkdir()
    (root / "val/n05").mkdir()
    with pytest.raises(ValueError, match=rf"{root}/train/n05: the class has no images"):
        ImageNet(str(root), "train")


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path}/train: expected a folder for each class, found nothing"):
        ImageNet(str(tmp_path), "train")


def test_a_validation_set_of_other_classes_says_which(root: Path) -> None:
    (root / "val/n02").rename(root / "val/n03")
    with pytest.raises(ValueError, match=r"1 are missing \(n02\), 1 are not among them \(n03\)"):
        ImageNet(str(root), "val")
    for number in range(4, 9):
        (root / f"train/n0{number}").mkdir()
    with pytest.raises(ValueError, match=r"6 are missing \(n02, n04, n05 and 3 more\), 1 are"):
        ImageNet(str(root), "val")


def test_a_typing_mistake_in_its_settings_is_an_error(root: Path) -> None:
    with pytest.raises(TypeError, match="splitt"):
        DATASETS.build(dict(type="mmsnnet.ImageNet", data_root=str(root), splitt="train"))
