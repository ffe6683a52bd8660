"""Procedural scenes in the folders, file names and formats of real data sets.

Image ``i`` of a split is a pure function of (seed, split, ``i``), so a longer run only adds images.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from mmsnnet.datasets.procedural.masks import bounding_box, polygons, run_lengths
from mmsnnet.datasets.procedural.rooms import make_room
from mmsnnet.datasets.procedural.shapes import SHAPES, Look, check_size, distinct_looks, make_portrait, make_scene
from mmsnnet.files.writing import new_folder

SPLITS = ("train", "val")


class Layout(ABC):
    """Folders and files of a real data set on disk."""

    summary: str
    """Contents of the set, in one line."""
    size: tuple[int, int] = (128, 128)
    """Default height and width of an image."""
    min_count: int = 1
    """The smallest number of images in a split."""

    @abstractmethod
    def write(self, root: Path, split: str, scenes: Iterator[np.random.Generator], size: tuple[int, int]) -> Iterator:
        """Write an image of ``size`` (H, W) with its annotation below ``root`` for each generator; yield after each."""


@dataclass(frozen=True)
class SemanticLayout(Layout):
    """Images in ``images/``, with a label map for each in ``annotations/``.

    Both have the subfolders ``folders``, in the order of ``SPLITS``. ``stems`` are the file names without suffix,
    formatted with the image's number, from 1. Class 0 is the background, class ``k`` has look ``k - 1``. A label map
    stores the class plus ``first_label`` in a byte, so 255 (no class) wraps to 0 if ``first_label`` is 1. ``blobs`` is
    the class of the blobs.
    """

    summary: str
    folders: tuple[str, str]
    stems: tuple[str, str]
    looks: tuple[Look, ...]
    label_suffix: str = ".png"
    first_label: int = 0
    blobs: int = 255

    def write(self, root: Path, split: str, scenes: Iterator[np.random.Generator], size: tuple[int, int]) -> Iterator:
        place = SPLITS.index(split)
        images, annotations = root / "images" / self.folders[place], root / "annotations" / self.folders[place]
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for number, rng in enumerate(scenes, 1):
            scene = make_scene(rng, size, self.looks)
            stem = self.stems[place].format(number)
            _save_jpeg(scene.image, images / f"{stem}.jpg")
            # Gray, not indexed: OpenCV would read the colours of an indexed PNG instead of its labels.
            label_map = Image.fromarray(scene.labels(self.blobs) + np.uint8(self.first_label))
            label_map.save(annotations / f"{stem}{self.label_suffix}")
            yield


class CocoLayout(Layout):
    """COCO's ``train2017/`` and ``val2017/``, with ``annotations/instances_*2017.json``.

    An annotation covers the visible part of a shape: as polygons, or, for a crowd, as run lengths.
    """

    summary = "instances of COCO's 80 categories, some of them crowds"
    looks = distinct_looks(80)
    crowd_share: ClassVar[float] = 0.08

    def write(self, root: Path, split: str, scenes: Iterator[np.random.Generator], size: tuple[int, int]) -> Iterator:
        folder = root / f"{split}2017"
        folder.mkdir()
        categories = _coco_categories()
        images, annotations = [], []
        for number, rng in enumerate(scenes, 1):
            scene = make_scene(rng, size, self.looks, self.crowd_share)
            name = f"{number:012d}.jpg"
            _save_jpeg(scene.image, folder / name)
            images.append({"id": number, "file_name": name, "height": size[0], "width": size[1], "license": 1})
            for index, thing in enumerate(scene.things):
                visible = scene.owners == index
                if thing.label == 0 or not visible.any():
                    continue
                annotations.append(
                    {
                        "id": 100 * number + index,
                        "image_id": number,
                        "category_id": categories[thing.label - 1]["id"],
                        "iscrowd": int(thing.is_crowd),
                        "area": int(visible.sum()),
                        "bbox": bounding_box(visible),
                        "segmentation": run_lengths(visible) if thing.is_crowd else polygons(visible),
                    }
                )
            yield
        contents = {
            "info": {"description": "procedural shapes in COCO's layout", "version": "1.0"},
            "licenses": [{"id": 1, "name": "procedural", "url": ""}],
            "images": images,
            "annotations": annotations,
            "categories": categories,
        }
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(contents))


class ImageNetLayout(Layout):
    """ImageNet's ``train/`` and ``val/`` with a folder for each class; image ``i`` has class ``i % 10``."""

    wnids: ClassVar[tuple[str, ...]] = (
        "n01440764",
        "n01443537",
        "n01484850",
        "n01491361",
        "n01494475",
        "n01496331",
        "n01498041",
        "n01514668",
        "n01514859",
        "n01518878",
    )
    """ImageNet's first classes, so that labels by sorted names equal ImageNet's labels."""
    summary = f"{len(wnids)} classes, in the folders of ImageNet's first {len(wnids)}"
    looks = distinct_looks(len(wnids))
    min_count = len(wnids)

    def write(self, root: Path, split: str, scenes: Iterator[np.random.Generator], size: tuple[int, int]) -> Iterator:
        for wnid in self.wnids:
            (root / split / wnid).mkdir(parents=True)
        for index, rng in enumerate(scenes):
            label = index % len(self.wnids)
            wnid = self.wnids[label]
            name = f"{wnid}_{index + 1}" if split == "train" else f"ILSVRC2012_val_{index + 1:08d}"
            _save_jpeg(make_portrait(rng, size, self.looks[label]).image, root / split / wnid / f"{name}.JPEG")
            yield


class NyuLayout(Layout):
    """NYUv2's ``images/`` and ``annotations/``, each with ``train/`` and ``test/``: depth in mm as 16-bit PNG."""

    summary = "rooms with their depth in millimetres, 16 bits, 0 for unknown depth"
    size = (480, 640)
    scenes: ClassVar[tuple[str, ...]] = ("kitchen", "living_room", "bedroom", "office", "dining_room", "classroom")

    def write(self, root: Path, split: str, scenes: Iterator[np.random.Generator], size: tuple[int, int]) -> Iterator:
        folder = "train" if split == "train" else "test"
        images, annotations = root / "images" / folder, root / "annotations" / folder
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for index, rng in enumerate(scenes):
            image, depth = make_room(rng, size)
            scene = self.scenes[index % len(self.scenes)]
            stem = f"{scene}_0001_{index + 1:05d}" if split == "train" else f"{scene}_{index + 1:05d}"
            _save_jpeg(image, images / f"{stem}.jpg")
            Image.fromarray(depth).save(annotations / f"{stem}.png")
            yield


LAYOUTS: dict[str, Layout] = {
    "shapes": SemanticLayout(
        "the quickstart's set: 8 classes, in ADE20K's folders; labels from 1",
        ("training", "validation"),
        ("ADE_train_{:08d}", "ADE_val_{:08d}"),
        SHAPES,
        first_label=1,
        blobs=0,
    ),
    # ADE20K and COCO-Stuff 10k use 0 for "no label": read them with reduce_zero_label=True.
    "ade20k": SemanticLayout(
        "150 classes; labels from 1, 0 for no label",
        ("training", "validation"),
        ("ADE_train_{:08d}", "ADE_val_{:08d}"),
        distinct_looks(149),
        first_label=1,
    ),
    "coco_stuff10k": SemanticLayout(
        "171 classes; labels from 1, 0 for no label",
        ("train2014", "test2014"),
        ("COCO_train2014_{:012d}", "COCO_train2014_{:012d}"),
        distinct_looks(170),
        label_suffix="_labelTrainIds.png",
        first_label=1,
    ),
    "camvid": SemanticLayout(
        "11 classes; labels from 0, 255 for no label",
        ("train", "val"),
        ("train_{:06d}", "val_{:06d}"),
        distinct_looks(10),
    ),
    "nyu": NyuLayout(),
    "coco": CocoLayout(),
    "imagenet": ImageNetLayout(),
}


def write_shapes(
    out: str | Path,
    layout: str,
    train: int = 200,
    val: int = 50,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    on_image: Callable[[], None] | None = None,
) -> Path:
    """Write ``train`` + ``val`` scenes below the folder ``out`` and return its absolute path.

    The set is written to a temporary folder beside ``out``, which is renamed at the end, so ``out`` is always complete.

    Args:
        out: a new or empty folder.
        layout: a key of ``LAYOUTS``.
        train, val: numbers of images.
        size: (H, W); None for the layout's default.
        seed: of all random draws.
        on_image: called after each image.

    Raises:
        ValueError: an unknown layout, too few images, a side below ``MIN_SIDE``, a negative seed, or an ``out`` that is
            a file, a mount point or not empty; it stays unchanged.
        OSError: ``out`` cannot be written, or another process is writing it.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: must be one of {', '.join(LAYOUTS)}")
    chosen = LAYOUTS[layout]
    for split, count in zip(SPLITS, (train, val), strict=True):
        if count < chosen.min_count:
            plural = "image" if chosen.min_count == 1 else "images, one of each class"
            raise ValueError(f"the {split} split needs at least {chosen.min_count} {plural}, got {count}")
    size = chosen.size if size is None else size
    check_size(size)
    _check_seed(seed)
    out = Path(out).resolve()
    with new_folder(out) as root:
        for split, count in zip(SPLITS, (train, val), strict=True):
            scenes = (scene_rng(seed, split, index) for index in range(count))
            for _ in chosen.write(root, split, scenes, size):
                if on_image is not None:
                    on_image()
    return out


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random generator of image ``index`` (from 0) in ``split``.

    Raises:
        ValueError: an unknown split, or a negative seed.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: must be one of {', '.join(SPLITS)}")
    _check_seed(seed)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), index)))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"the seed must be 0 or more, got {seed}")


def _save_jpeg(image: np.ndarray, path: Path) -> None:
    Image.fromarray(image).save(path, "JPEG", quality=95, subsampling=0)


def _coco_categories() -> list[dict[str, Any]]:
    """COCO's 80 categories with its ids, which have gaps."""
    categories = []
    for line in _COCO.splitlines():
        supercategory, members = line.split(": ")
        for member in members.split(", "):
            number, name = member.split(" ", 1)
            categories.append({"id": int(number), "name": name, "supercategory": supercategory})
    return categories


_COCO = """\
person: 1 person
vehicle: 2 bicycle, 3 car, 4 motorcycle, 5 airplane, 6 bus, 7 train, 8 truck, 9 boat
outdoor: 10 traffic light, 11 fire hydrant, 13 stop sign, 14 parking meter, 15 bench
animal: 16 bird, 17 cat, 18 dog, 19 horse, 20 sheep, 21 cow, 22 elephant, 23 bear, 24 zebra, 25 giraffe
accessory: 27 backpack, 28 umbrella, 31 handbag, 32 tie, 33 suitcase
sports: 34 frisbee, 35 skis, 36 snowboard, 37 sports ball, 38 kite, 39 baseball bat, 40 baseball glove, 41 skateboard, \
42 surfboard, 43 tennis racket
kitchen: 44 bottle, 46 wine glass, 47 cup, 48 fork, 49 knife, 50 spoon, 51 bowl
food: 52 banana, 53 apple, 54 sandwich, 55 orange, 56 broccoli, 57 carrot, 58 hot dog, 59 pizza, 60 donut, 61 cake
furniture: 62 chair, 63 couch, 64 potted plant, 65 bed, 67 dining table, 70 toilet
electronic: 72 tv, 73 laptop, 74 mouse, 75 remote, 76 keyboard, 77 cell phone
appliance: 78 microwave, 79 oven, 80 toaster, 81 sink, 82 refrigerator
indoor: 84 book, 85 clock, 86 vase, 87 scissors, 88 teddy bear, 89 hair drier, 90 toothbrush
"""
