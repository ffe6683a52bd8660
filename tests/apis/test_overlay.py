"""Names and colours of classes without the data, and pictures of predictions."""

from pathlib import Path
from typing import Any

import mmseg.datasets
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from mmseg.registry import DATASETS

from mmsnnet.apis.overlay import LEAST_SCORE, Overlay, overlay_of
from mmsnnet.errors import DataError, MissingFileError

NAMED = sorted(
    name
    for name, cls in DATASETS.module_dict.items()
    if cls.__module__.startswith(mmseg.datasets.__name__) and issubclass(cls, BaseDataset) and "classes" in cls.METAINFO
)


def config_of(type_: str, scope: str = "mmseg", **settings: Any) -> Config:
    dataset = dict(type=f"{scope}.{type_}", pipeline=[dict(type="LoadImageFromFile")], **settings)
    return Config(dict(test_dataloader=dict(dataset=dataset)))


# Names and colours.


@pytest.mark.parametrize("name", NAMED)
def test_classes_are_known_without_the_data(name: str) -> None:
    """Some of these classes assert that files exist when they are built."""
    overlay = overlay_of(config_of(name, data_root="nowhere", ann_file="nowhere.txt"), "segmentation")
    stated = DATASETS.get(name).METAINFO
    assert overlay.classes == tuple(stated["classes"])
    assert overlay.palette == tuple(map(tuple, stated.get("palette", ())))


def test_the_data_sets_that_assert_are_among_them() -> None:
    assert {"PascalVOCDataset", "PascalContextDataset59", "DRIVEDataset", "iSAIDDataset", "REFUGEDataset"} <= set(NAMED)


def test_a_setting_names_the_classes(tmp_path: Path) -> None:
    palette = dict(zip(DATASETS.get("CityscapesDataset").METAINFO["classes"], CITYSCAPES, strict=True))
    subset = overlay_of(config_of("CityscapesDataset", metainfo=dict(classes=["car", "new", "road"])), "segmentation")
    assert subset.classes == ("car", "new", "road")
    assert (subset.palette[0], subset.palette[2]) == (palette["car"], palette["road"])
    both = dict(classes=["a", "b"], palette=[[1, 2, 3], [4, 5, 6]])
    own = overlay_of(config_of("BaseSegDataset", metainfo=both), "segmentation")
    assert (own.classes, own.palette) == (("a", "b"), ((1, 2, 3), (4, 5, 6)))
    (tmp_path / "names.txt").write_text("a\nb\n")
    listed = config_of("BaseSegDataset", metainfo=dict(classes=str(tmp_path / "names.txt")))
    assert overlay_of(listed, "segmentation") == Overlay("segmentation", ("a", "b"))
    assert overlay_of(config_of("ImageNet", "mmsnnet"), "classification") == Overlay("classification")
    missing = config_of("BaseSegDataset", metainfo=dict(classes="nowhere.txt"))
    with pytest.raises(
        MissingFileError, match=r"no file 'nowhere\.txt' .* from test_dataloader\.dataset\.metainfo\.classes"
    ):
        overlay_of(missing, "segmentation")


CITYSCAPES = [tuple(color) for color in DATASETS.get("CityscapesDataset").METAINFO["palette"]]


def test_a_published_folder_names_its_classes(tmp_path: Path) -> None:
    path, classes = tmp_path / "config.py", tmp_path / "classes.json"
    config_of("BaseSegDataset", metainfo=dict(classes="gone.txt")).dump(str(path))
    classes.write_text('{"classes": ["a", "b"], "palette": [[1, 2, 3], [4, 5, 6]]}')
    config = Config.fromfile(path)
    assert overlay_of(config, "segmentation") == Overlay("segmentation", ("a", "b"), ((1, 2, 3), (4, 5, 6)))
    for damaged in ("{", "[]", "{}", '{"classes": [3]}', '{"classes": ["a"], "palette": [1]}'):
        classes.write_text(damaged)
        with pytest.raises(DataError, match=r"classes\.json is no list of classes \(.*\): publish the model again"):
            overlay_of(config, "segmentation")


# Pictures.

IMAGE = np.full((40, 60, 3), 100, np.uint8)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_each_class_has_its_colour_however_many_there_are(dtype: torch.dtype) -> None:
    overlay = Overlay("segmentation")
    labels = [0, 4, 255] if dtype == torch.uint8 else [4, 255, 260, 999]
    segments = torch.tensor(labels, dtype=dtype).repeat_interleave(15).repeat(40, 1)
    picture = overlay.draw(
        np.zeros((*segments.shape, 3), np.uint8), BaseDataElement(pred_sem_seg=PixelData(data=segments[None]))
    )
    expected = 0.6 * overlay.colors(1000)[segments.numpy()]
    assert np.abs(picture - expected).max() <= 1
    assert len(np.unique(picture[0], axis=0)) == len(labels)


def instances(**more: Any) -> BaseDataElement:
    return BaseDataElement(
        pred_instances=InstanceData(
            bboxes=torch.tensor([[5.0, 5, 25, 30], [30, 5, 55, 30]]),
            scores=torch.tensor([LEAST_SCORE + 0.01, LEAST_SCORE - 0.01]),
            labels=torch.tensor([300, 1]),
            **more,
        )
    )


def test_boxes_and_masks_are_drawn_without_labels() -> None:
    overlay, color = Overlay("detection"), Overlay("detection").colors(301)[300]
    picture = overlay.draw(IMAGE, instances(), labels=False)
    assert np.array_equal(picture[5, 5], color) and np.array_equal(picture[30, 25], color)
    changed = (picture != IMAGE).any(axis=-1)
    assert not changed[:, 30:].any() and not changed[8:28, 8:23].any()
    masks = torch.zeros(2, 40, 60, dtype=torch.bool)
    masks[:, 10:20, 10:20] = True
    picture = overlay.draw(IMAGE, instances(masks=masks), labels=False)
    assert np.abs(picture[12, 12] - (0.4 * IMAGE[12, 12] + 0.6 * color)).max() <= 1
    assert np.array_equal(picture[22, 22], IMAGE[22, 22])
    nothing = BaseDataElement(pred_instances=instances().pred_instances[:0])
    assert np.array_equal(overlay.draw(IMAGE, nothing, labels=False), IMAGE)


@pytest.mark.detection
def test_boxes_of_low_scores_are_left_out_with_labels_too() -> None:
    pytest.importorskip("mmdet")
    changed = (Overlay("detection").draw(IMAGE, instances()) != IMAGE).any(axis=-1)
    assert changed[:, :28].any() and not changed[20:, 30:].any()


def test_a_classification_without_labels_is_its_image() -> None:
    overlay, sample = Overlay("classification"), BaseDataElement(logits=torch.arange(8.0))
    plain, named = overlay.draw(IMAGE, sample, labels=False), overlay.draw(IMAGE, sample)
    assert plain.shape == named.shape and (plain == 100).all() and (named != plain).any()


def test_no_classes_have_no_colours() -> None:
    assert Overlay("classification").colors(0).shape == (0, 3)
