"""Missing data, named before anything is built."""

import re
from pathlib import Path

import pytest
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset

from mmsnnet.datasets import check_folders, write_shapes


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "set", "coco", train=2, val=1, size=(32, 32))


def dataset(root: Path | str, split: str = "train", **options) -> dict:
    return dict(
        type="CocoDataset",
        data_root=str(root),
        data_prefix=dict(img=f"{split}2017/"),
        ann_file=f"annotations/instances_{split}2017.json",
        **options,
    )


def config(**datasets: dict) -> dict:
    return {f"{split}_dataloader": dict(batch_size=1, dataset=one) for split, one in datasets.items()}


def test_what_is_there_is_accepted(root):
    check_folders(config(train=dataset(root), val=dataset(root, "val")))
    # Paths may be whole, and what has no annotations has no file of them.
    check_folders(config(test=dict(data_prefix=dict(img=str(root / "val2017")))))
    check_folders({"train_dataloader": None, "model": dict()})


def test_a_missing_folder_is_named_with_its_setting(root, tmp_path):
    missing = tmp_path / "nowhere"
    with pytest.raises(FileNotFoundError) as error:
        check_folders(config(train=dataset(root), val=dataset(missing, "val")))
    assert str(missing) in str(error.value) and "val_dataloader.dataset.data_root" in str(error.value)
    assert "docs/datasets.md" in str(error.value)


def test_a_missing_folder_of_images_is_named(root):
    (root / "train2017").rename(root / "train2014")
    with pytest.raises(FileNotFoundError, match=rf"no folder {re.escape(str(root))}/train2017.*data_prefix\.img"):
        check_folders(config(train=dataset(root)))


def test_a_folder_without_images_is_named(root):
    for path in (root / "train2017").iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"train2017/ holds no file.*data_prefix\.img"):
        check_folders(config(train=dataset(root)))


def test_a_missing_split_is_named(tmp_path):
    """Of class folders, as ImageNet's."""
    root = write_shapes(tmp_path / "imagenet", "imagenet", train=10, val=10, size=(32, 32))
    train, val = (dict(type="mmsnnet.ImageNet", data_root=str(root), split=split) for split in ("train", "val"))
    check_folders(config(train=train, val=val))
    (root / "val").rename(root / "validation")
    with pytest.raises(
        FileNotFoundError, match=rf"no folder {root}/val, from val_dataloader\.dataset\.data_root and split"
    ):
        check_folders(config(train=train, val=val))


def test_a_missing_annotation_file_is_named(root):
    (root / "annotations/instances_train2017.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*instances_train2017\.json.*ann_file"):
        check_folders(config(train=dataset(root)))


def test_only_the_asked_for_are_looked_at(root, tmp_path):
    broken = config(train=dataset(tmp_path / "nowhere"), test=dataset(root, "val"))
    check_folders(broken, ["test_dataloader"])
    with pytest.raises(FileNotFoundError):
        check_folders(broken, ["train_dataloader"])


def test_data_sets_in_wrappers_are_looked_at(root, tmp_path):
    repeated = dict(type="RepeatDataset", times=2, dataset=dataset(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"train_dataloader\.dataset\.dataset\.data_root"):
        check_folders(config(train=repeated))
    joined = dict(type="ConcatDataset", datasets=[dataset(root), dataset(tmp_path / "nowhere")])
    with pytest.raises(FileNotFoundError, match=r"train_dataloader\.dataset\.datasets\.1\.data_root"):
        check_folders(config(train=joined))


def test_remote_paths_are_left_alone():
    check_folders(config(train=dataset("s3://bucket/coco")))
    check_folders(config(train=dict(data_prefix=dict(img="s3://bucket/coco/train2017"))))


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return write_shapes(tmp_path / "shapes", "shapes", train=3, val=1, size=(32, 32))


def segmentation(root: Path, **options) -> dict:
    prefix = dict(img_path="images/training", seg_map_path="annotations/training")
    return dict(type="BaseSegDataset", data_root=str(root), data_prefix=prefix) | options


@pytest.mark.parametrize("options", [dict(), dict(img_suffix=".jpg"), dict(type="ADE20KDataset")])
def test_images_of_another_suffix_alone_are_named(shapes: Path, options: dict) -> None:
    """The suffix may be the default of the data set's class."""
    init_default_scope("mmseg")
    check_folders(config(train=segmentation(shapes, **options)))
    for path in (shapes / "images/training").iterdir():
        path.rename(path.with_suffix(".JPG"))
    with pytest.raises(FileNotFoundError, match=r"images/training ends in .*dataset\.img_suffix='\.jpg'.* 3 \.JPG"):
        check_folders(config(train=segmentation(shapes, **options)))
    check_folders(config(train=segmentation(shapes, **options) | dict(img_suffix=".JPG")))


def test_a_class_that_lists_files_in_its_own_way_is_left_alone(shapes: Path) -> None:
    init_default_scope("mmseg")

    class Arrays(BaseSegDataset):
        def load_data_list(self) -> list[dict]:
            return []

    for path in (shapes / "images/training").iterdir():
        path.rename(path.with_suffix(".npy"))
    check_folders(config(train=segmentation(shapes, type=Arrays)))
    with pytest.raises(FileNotFoundError, match=r"img_suffix='\.jpg'"):
        check_folders(config(train=segmentation(shapes, type=BaseSegDataset)))


def test_folders_of_links_are_looked_into(shapes: Path, tmp_path: Path) -> None:
    """As Cityscapes is often laid out: a link for each city."""
    init_default_scope("mmseg")
    for part in ("images", "annotations"):
        (shapes / f"{part}/training").rename(tmp_path / part)
        (shapes / f"{part}/training").mkdir()
        (shapes / f"{part}/training/city").symlink_to(tmp_path / part)
    check_folders(config(train=segmentation(shapes, img_suffix=".jpg")))


@pytest.mark.parametrize("loads", [True, False])
def test_label_folders_are_needed_where_labels_are_loaded(shapes: Path, loads: bool) -> None:
    init_default_scope("mmseg")
    for path in (shapes / "annotations/training").iterdir():
        path.unlink()
    (shapes / "annotations/training").rmdir()
    pipeline = [
        dict(type="LoadImageFromFile"),
        *[dict(type="mmsnnet.LoadSegLabels")] * loads,
        dict(type="PackSegInputs"),
    ]
    data = config(test=segmentation(shapes, pipeline=pipeline))
    if loads:
        with pytest.raises(FileNotFoundError, match="seg_map_path"):
            check_folders(data)
    else:
        check_folders(data)


def test_images_that_are_left_out_are_warned_of(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "mmengine.logging.print_log", lambda text, **_: said.append(text) if "left out" in text else None
    )
    first, *_ = sorted((shapes / "images/training").iterdir())
    first.rename(first.with_suffix(".jpeg"))
    (shapes / "images/training/notes.txt").touch()
    check_folders(config(train=segmentation(shapes, img_suffix=".jpg")))
    assert "1 .jpeg of 4 files are left out" in said[0] and "img_suffix is '.jpg'" in said[0]
    said.clear()
    # Label maps beside their images are no images.
    prefix = dict(img_path="annotations/training", seg_map_path="annotations/training")
    (shapes / "annotations/training/a.jpg").touch()
    check_folders(config(train=segmentation(shapes, img_suffix=".jpg", data_prefix=prefix)))
    assert not said
