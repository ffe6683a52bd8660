"""Missing data, named before anything is built."""

import re
from pathlib import Path

import pytest

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
