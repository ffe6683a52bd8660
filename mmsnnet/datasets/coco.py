"""Detection data sets in COCO's format, with checked annotation files."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any

from mmdet.datasets import CocoDataset as _CocoDataset
from mmdet.datasets.api_wrappers import COCO

from mmsnnet.errors import DataError, MissingFileError
from mmsnnet.registry import DATASETS

KEYS = dict(  # keys that mmdet reads of each entry
    images=("id", "file_name", "height", "width"),
    annotations=("id", "image_id", "category_id", "bbox", "area"),
    categories=("id", "name"),
)


class CocoAnnotations(COCO):
    """Annotation file in COCO's format for instances.

    Raises:
        MissingFileError: the file does not exist.
        DataError: the file is not JSON or not in this format. mmdet's class would silently lose annotations.
    """

    def __init__(self, annotation_file: str) -> None:
        self.file = annotation_file
        try:
            super().__init__(annotation_file)
        except FileNotFoundError as error:
            raise MissingFileError(
                f"no annotation file {annotation_file!r}: set data_root and ann_file of the data set"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{annotation_file} is not JSON; COCO's annotation files are JSON: {error}") from error
        except AssertionError as error:  # the JSON is no object
            raise DataError(f"{annotation_file} has no lists {', '.join(KEYS)}; COCO's format needs them") from error

    def createIndex(self) -> None:
        for kind, keys in KEYS.items():
            entries = self.dataset.get(kind)
            if not isinstance(entries, list):
                raise DataError(
                    f"{self.file} has no list {kind!r}: COCO's format for instances needs {', '.join(KEYS)}; this file "
                    f"has {', '.join(self.dataset) or 'nothing'}"
                )
            for number, entry in enumerate(entries):
                missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
                if missing:
                    raise DataError(
                        f"{self.file}: {kind}[{number}] lacks {', '.join(missing)}; COCO's format has {', '.join(keys)}"
                    )
            if len({entry["id"] for entry in entries}) < len(entries):
                raise DataError(f"{self.file}: two of its {kind} have the same id; ids must differ")
        for number, image in enumerate(self.dataset["images"]):
            if not (_finite([image["height"], image["width"]]) and min(image["height"], image["width"]) >= 1):
                raise DataError(
                    f"{self.file}: images[{number}], with id {image['id']!r}, has height {image['height']!r} and width "
                    f"{image['width']!r}: expected numbers of pixels, at least 1"
                )
        images = {image["id"] for image in self.dataset["images"]}
        categories = {category["id"] for category in self.dataset["categories"]}
        for number, annotation in enumerate(self.dataset["annotations"]):
            if fault := _fault(annotation, images, categories):
                raise DataError(f"{self.file}: annotations[{number}], with id {annotation['id']!r}, has {fault}")
        super().createIndex()

    def get_cat_ids(
        self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (), cat_ids: Sequence[int] = ()
    ) -> list[int]:
        """Return the ids of the categories with these names.

        Raises:
            DataError: the file lacks one, or has another order, so that labels would get wrong names.
        """
        ids = super().get_cat_ids(cat_names, sup_names, cat_ids)
        names = [self.cats[id_]["name"] for id_ in ids]
        if cat_names and names != list(cat_names):
            missing = [repr(name) for name in cat_names if name not in names]
            problem = f"no category {', '.join(missing)}" if missing else "the categories in another order"
            raise DataError(
                f"{self.file} has {problem}: metainfo.classes of the data set must name categories of the file, in the "
                f"file's order: {', '.join(category['name'] for category in self.dataset['categories'])}"
            )
        return ids


def _fault(annotation: dict[str, Any], images: set[int], categories: set[int]) -> str:
    """Describe the fault of an annotation; empty if it is valid. A side or an area of 0 is valid."""
    if annotation["image_id"] not in images:
        return f"image_id {annotation['image_id']!r}, which is not among the images of the file"
    if annotation["category_id"] not in categories:
        return f"category_id {annotation['category_id']!r}, which is not among the categories of the file"
    box = annotation["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and _finite(box) and min(box[2:]) >= 0):
        return f"bbox {reprlib.repr(box)}: expected [x, y, width, height] in pixels, finite, the last two at least 0"
    if not (_finite([annotation["area"]]) and annotation["area"] >= 0):
        return f"area {reprlib.repr(annotation['area'])}: expected a number of pixels, at least 0"
    masks = annotation.get("segmentation") or []  # the format's crowds have run lengths, all others polygons
    if isinstance(masks, dict):
        valid = isinstance(masks.get("counts"), list | str) and _finite(masks.get("size")) and len(masks["size"]) == 2
    else:
        valid = isinstance(masks, list) and all(map(_finite, masks))
    if not valid:
        return (
            f"segmentation {reprlib.repr(masks)}: expected a list of polygons, each a list [x, y, x, y, ...] of "
            "finite numbers, or run lengths, dict(size=[height, width], counts=...)"
        )
    return ""


def _finite(numbers: Any) -> bool:
    """Whether this is a list of finite numbers. Testing the sum is ten times as fast as testing each number."""
    try:
        return isinstance(numbers, list) and math.isfinite(sum(numbers))
    except (TypeError, OverflowError):
        return False


@DATASETS.register_module()
class CocoDataset(_CocoDataset):
    """mmdet's ``CocoDataset`` with a checked annotation file.

    Each sample has ``ann_file``, its annotation file, from which
    :class:`mmsnnet.evaluation.metrics.coco_metric.CocoMetric` takes the ground truth.

    Raises:
        MissingFileError: the annotation file does not exist.
        DataError: the annotation file is not in COCO's format, lacks a class of ``metainfo`` or masks that the
            pipeline loads, or ``filter_cfg`` removes every image.
    """

    COCOAPI = CocoAnnotations

    def get_data_info(self, idx: int) -> dict[str, Any]:
        # Not in metainfo: data sets with different metainfo cannot be concatenated.
        return super().get_data_info(idx) | dict(ann_file=self.ann_file)

    def parse_data_info(self, raw_data_info: dict[str, Any]) -> dict[str, Any]:
        data_info = super().parse_data_info(raw_data_info)
        loads_masks = any(getattr(transform, "with_mask", False) for transform in self.pipeline.transforms)
        if loads_masks and any("mask" not in instance for instance in data_info["instances"]):
            raise DataError(
                f"{self.ann_file}: an annotation of image {data_info['img_path']} has no segmentation, and the "
                "pipeline loads masks: remove with_mask from LoadAnnotations, and the mask head"
            )
        return data_info

    def filter_data(self) -> list[dict[str, Any]]:
        kept = super().filter_data()
        if not kept:
            raise DataError(
                f"{self.ann_file}: filter_cfg={self.filter_cfg} removes all of its {len(self.data_list)} images"
            )
        return kept
