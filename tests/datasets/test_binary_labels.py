"""Warnings of label maps that hold nothing but 0 and 255."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

from mmsnnet.datasets.binary_labels import SAMPLES, binary_mask_warning
from mmsnnet.errors import DataError, MissingFileError


def mask(*values: int) -> np.ndarray:
    return np.resize(np.array(values, np.uint8), (8, 8))


def make_set(
    root: Path, masks: list[np.ndarray], num_classes: int = 2, labels: dict | None = None, **options: Any
) -> Any:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for number, values in enumerate(masks):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(root / f"images/{number:03d}.jpg")
        Image.fromarray(values).save(root / f"masks/{number:03d}.png")
    steps = [
        dict(type="mmsnnet.LoadImage"),
        dict(type="mmsnnet.LoadSegLabels", num_classes=num_classes, **labels or {}),
    ]
    return BaseSegDataset(
        data_root=str(root),
        data_prefix=dict(img_path="images", seg_map_path="masks"),
        metainfo=dict(classes=tuple(map(str, range(num_classes)))),
        pipeline=steps,
        **options,
    )


def test_masks_of_0_and_255_are_told_in_one_line(tmp_path):
    dataset = make_set(tmp_path / "set", [mask(0), mask(0, 255), mask(255)])
    warning = binary_mask_warning(dataset)
    assert warning.startswith(str(tmp_path / "set/masks/000.png")) and "\n" not in warning
    assert "255 means 'no label'" in warning and "values=(0, 255)" in warning


@pytest.mark.slow
def test_masks_that_mmseg_loads_itself(tmp_path):
    dataset = make_set(tmp_path / "set", [mask(0, 255)])
    dataset.pipeline.transforms[1] = LoadAnnotations()
    assert "values=(0, 255) of mmsnnet.LoadSegLabels" in binary_mask_warning(dataset)
    other = make_set(tmp_path / "other", [mask(0, 255, 1)])
    other.pipeline.transforms[1] = LoadAnnotations()
    assert binary_mask_warning(other) is None


@pytest.mark.slow
def test_with_the_cure_the_second_class_is_seen(tmp_path):
    dataset = make_set(tmp_path / "set", [mask(0, 255)], labels=dict(values=(0, 255)))
    assert binary_mask_warning(dataset) is None
    assert set(np.unique(dataset[0]["gt_seg_map"])) == {0, 1}


@pytest.mark.slow
def test_with_a_reduced_zero_neither_value_is_a_class(tmp_path):
    dataset = make_set(tmp_path / "set", [mask(0, 255)], reduce_zero_label=True)
    assert "0 and 255 both mean 'no label'" in binary_mask_warning(dataset)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("masks", "num_classes"),
    [
        ([mask(0, 255), mask(0, 1, 255)], 2),  # the second class is seen
        ([mask(0)], 2),
        ([mask(255)], 2),
        ([mask(0, 255)], 1),
        ([mask(0, 254)], 2),  # refused when loaded
    ],
)
def test_other_sets_are_passed_over(tmp_path, masks, num_classes):
    assert binary_mask_warning(make_set(tmp_path / "set", masks, num_classes)) is None


@pytest.mark.slow
def test_bits_are_classes(tmp_path):
    """A PNG of one bit has 0 and 1, as it is loaded."""
    dataset = make_set(tmp_path / "set", [mask(0, 1).astype(bool)])
    assert binary_mask_warning(dataset) is None
    assert set(np.unique(dataset[0]["gt_seg_map"])) == {0, 1}


@pytest.mark.slow
def test_few_label_maps_are_read_of_a_large_set(tmp_path, monkeypatch):
    dataset = make_set(tmp_path / "set", [mask(0, 255)] * 50)
    loader, paths = dataset.pipeline.transforms[1], []
    stored_values = loader.stored_values
    monkeypatch.setattr(loader, "stored_values", lambda path, image: paths.append(path) or stored_values(path, image))
    assert binary_mask_warning(dataset)
    numbers = [int(Path(path).stem) for path in paths]
    assert len(numbers) == SAMPLES and numbers[0] == 0 and numbers[-1] == 49
    assert set(np.diff(numbers)) == {7}


@pytest.mark.slow
def test_errors_are_not_swallowed(tmp_path):
    dataset = make_set(tmp_path / "set", [mask(0, 255)] * 2)
    (tmp_path / "set/masks/001.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"001\.png"):
        binary_mask_warning(dataset)
    (tmp_path / "set/masks/001.png").unlink()
    with pytest.raises(MissingFileError, match=r"001\.png"):
        binary_mask_warning(dataset)
