"""What lies on disk: the folders and names of the real sets, read by the toolboxes' own data sets as it was drawn."""

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset, BaseSegDataset, COCOStuffDataset, NYUDataset
from PIL import Image
from pycocotools.coco import COCO

import mmsnnet.datasets.procedural.shapes as shapes
from mmsnnet.datasets import CLASSES, LAYOUTS, MIN_SIDE, PALETTE, make_room, make_scene, scene_rng, write_shapes
from mmsnnet.datasets.procedural.layouts import CocoLayout, ImageNetLayout

ROOT = Path(__file__).parents[3]
COMMAND = ROOT / "tools" / "dataset_converters" / "make_shapes.py"
SIZE = (48, 64)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differs_by_compression(picture: np.ndarray, image: np.ndarray) -> bool:
    return np.abs(picture.astype(int) - image).mean() < 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """A set in each layout, 12 + 10 images."""
    out = tmp_path_factory.mktemp("sets")
    return {layout: write_shapes(out / layout, layout, train=12, val=10, size=SIZE) for layout in LAYOUTS}


# What an image depends on


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_longer_run_only_adds_images(tmp_path, sets, layout):
    long = contents(write_shapes(tmp_path / "long", layout, train=14, val=11, size=SIZE))
    short = contents(sets[layout])
    files = {name for name in short if not name.endswith(".json")}
    assert files and {name: long[name] for name in files} == {name: short[name] for name in files}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path, sets, layout):
    first = contents(sets[layout])
    assert contents(write_shapes(tmp_path / "again", layout, train=12, val=10, size=SIZE)) == first
    other = contents(write_shapes(tmp_path / "other", layout, train=12, val=10, size=SIZE, seed=1))
    assert first.keys() == other.keys()
    pictures = [name for name in first if name.lower().endswith((".jpg", ".jpeg"))]
    assert len(pictures) == 22 and all(first[name] != other[name] for name in pictures)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match=r"test.*train, val"):
        scene_rng(0, "test", 0)


# Semantic segmentation

OWN_CLASSES = {"classes": CLASSES, "palette": [list(colour) for colour in PALETTE]}
CAMVID = {"classes": tuple(map(str, range(11))), "palette": [[k, k, k] for k in range(11)]}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pillow", "cv2"])
@pytest.mark.parametrize(
    ("layout", "dataset", "options", "folders", "classes"),
    [
        ("shapes", BaseSegDataset, {"metainfo": OWN_CLASSES, "reduce_zero_label": True}, ("training", "validation"), 8),
        ("ade20k", ADE20KDataset, {}, ("training", "validation"), 150),
        ("coco_stuff10k", COCOStuffDataset, {"reduce_zero_label": True}, ("train2014", "test2014"), 171),
        ("camvid", BaseSegDataset, {"metainfo": CAMVID}, ("train", "val"), 11),
    ],
)
def test_mmseg_reads_the_images_and_labels_that_were_made(sets, layout, dataset, options, folders, classes, backend):
    looks = {"looks": shapes.distinct_looks(classes - 1)} if layout != "shapes" else {}
    for split, folder, count in zip(("train", "val"), folders, (12, 10), strict=True):
        read = dataset(
            data_root=str(sets[layout]),
            data_prefix={"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"},
            pipeline=[
                {"type": "LoadImageFromFile"},
                {"type": "mmseg.LoadAnnotations", "imdecode_backend": backend},
                {"type": "mmseg.PackSegInputs"},
            ],
            **options,
        )
        assert len(read) == count and len(read.metainfo["classes"]) == classes
        for index in range(0, count, 4):
            made = make_scene(scene_rng(0, split, index), SIZE, **looks)
            sample = read[index]
            # Blobs are background in the quickstart's set, and of no class in the others.
            wanted = made.labels(blobs=0 if layout == "shapes" else 255)
            np.testing.assert_array_equal(sample["data_samples"].gt_sem_seg.data[0].numpy(), wanted)
            # mmseg's images are BGR.
            assert differs_by_compression(sample["inputs"].numpy()[::-1].transpose(1, 2, 0), made.image)


@pytest.mark.parametrize(("layout", "classes"), [("ade20k", 150), ("coco_stuff10k", 171), ("camvid", 11)])
def test_label_maps_use_the_whole_range_of_labels(layout, classes):
    """Every class is there to be drawn, and none beyond."""
    looks = LAYOUTS[layout].looks
    assert len(looks) == classes - 1 and len(set(looks)) == len(looks)
    drawn = {
        thing.label
        for index in range(600 if classes > 20 else 60)
        for thing in shapes._place_things(scene_rng(0, "train", index), SIZE, looks)
    }
    assert drawn - {0} == set(range(1, classes))


def test_label_maps_hold_indices_not_colours(sets):
    with Image.open(sets["ade20k"] / "annotations/training/ADE_train_00000001.png") as label_map:
        assert label_map.mode == "L"
        scene = make_scene(scene_rng(0, "train", 0), SIZE, shapes.distinct_looks(149))
        # 255, of no class, is 0 on disk.
        np.testing.assert_array_equal(np.asarray(label_map), (scene.labels(blobs=255).astype(int) + 1) % 256)


# Depth


@pytest.mark.slow
def test_mmseg_reads_the_depth_that_was_made(sets):
    for split, folder, count in (("train", "train", 12), ("val", "test", 10)):
        read = NYUDataset(
            data_root=str(sets["nyu"]),
            data_prefix={"img_path": f"images/{folder}", "depth_map_path": f"annotations/{folder}"},
            pipeline=[
                {"type": "LoadImageFromFile"},
                {"type": "mmseg.LoadDepthAnnotation", "depth_rescale_factor": 1e-3},
                {"type": "mmseg.PackSegInputs"},
            ],
        )
        assert len(read) == count
        for index in range(0, count, 5):
            info = read.get_data_info(index)
            assert read.metainfo["classes"][info["category_id"]] in LAYOUTS["nyu"].scenes
            number = int(Path(info["img_path"]).stem.rsplit("_", 1)[1])
            image, depth = make_room(scene_rng(0, split, number - 1), SIZE)
            sample = read[index]
            found = sample["data_samples"].gt_depth_map.data[0].numpy()
            np.testing.assert_allclose(found, depth / 1000, rtol=1e-6)
            assert found[found > 0].min() >= 0.5 and found.max() <= 10
            assert differs_by_compression(sample["inputs"].numpy()[::-1].transpose(1, 2, 0), image)


def test_depth_maps_have_16_bits(sets):
    for path in (sets["nyu"] / "annotations").rglob("*.png"):
        with Image.open(path) as depth:
            assert np.asarray(depth).dtype == np.uint16


# Instances


@pytest.mark.parametrize(("split", "count"), [("train", 12), ("val", 10)])
def test_pycocotools_finds_the_visible_part_of_each_shape(sets, split, count):
    annotations = COCO(str(sets["coco"] / f"annotations/instances_{split}2017.json"))
    assert len(annotations.imgs) == count
    crowds = 0
    for number, image in annotations.imgs.items():
        made = make_scene(scene_rng(0, split, number - 1), SIZE, CocoLayout.looks, CocoLayout.crowd_share)
        picture = np.asarray(Image.open(sets["coco"] / f"{split}2017" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
        assert differs_by_compression(picture, made.image)
        visible = [
            (thing, made.owners == index)
            for index, thing in enumerate(made.things)
            if thing.label and (made.owners == index).any()
        ]
        found = sorted(annotations.imgToAnns[number], key=lambda one: one["id"])
        assert len(found) == len(visible) > 0
        for one, (thing, mask) in zip(found, visible, strict=True):
            np.testing.assert_array_equal(annotations.annToMask(one).astype(bool), mask)
            assert one["area"] == mask.sum()
            y, x = np.nonzero(mask)
            assert one["bbox"] == [x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1]
            assert one["iscrowd"] == thing.is_crowd == isinstance(one["segmentation"], dict)
            names = [annotations.cats[one["category_id"]]["name"], COCO_NAMES[thing.label - 1]]
            assert names[0] == names[1]
            crowds += one["iscrowd"]
    assert crowds or split == "val"


def test_categories_are_cocos(sets):
    written = json.loads((sets["coco"] / "annotations/instances_val2017.json").read_text())["categories"]
    assert [category["name"] for category in written] == COCO_NAMES
    numbers = [category["id"] for category in written]
    assert set(range(1, 91)) - set(numbers) == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
    assert numbers == sorted(numbers)
    by_name = {category["name"]: (category["id"], category["supercategory"]) for category in written}
    assert by_name["person"] == (1, "person") and by_name["toothbrush"] == (90, "indoor")
    assert by_name["stop sign"] == (13, "outdoor") and by_name["tennis racket"] == (43, "sports")


def test_annotations_have_ids_of_their_own(sets):
    for split in ("train", "val"):
        written = json.loads((sets["coco"] / f"annotations/instances_{split}2017.json").read_text())
        numbers = [one["id"] for one in written["annotations"]]
        assert len(set(numbers)) == len(numbers) > 0
        assert {one["image_id"] for one in written["annotations"]} <= {one["id"] for one in written["images"]}


COCO_NAMES = list(COCOStuffDataset.METAINFO["classes"][:80])  # COCO-Stuff's first 80 classes are COCO's


# Classes in folders


def test_each_class_has_a_folder_in_both_splits_and_images_in_turn(sets):
    for split, count in (("train", 12), ("val", 10)):
        folders = sorted(path.name for path in (sets["imagenet"] / split).iterdir())
        assert folders == sorted(ImageNetLayout.wnids) and len(folders) == 10
        per_class = [len(list((sets["imagenet"] / split / wnid).glob("*.JPEG"))) for wnid in folders]
        assert sum(per_class) == count and set(per_class) <= {1, 2}
    assert [path.name for path in sorted((sets["imagenet"] / "train/n01440764").iterdir())] == [
        "n01440764_1.JPEG",
        "n01440764_11.JPEG",
    ]
    assert (sets["imagenet"] / "val/n01443537/ILSVRC2012_val_00000002.JPEG").is_file()


def test_every_class_folder_needs_an_image(tmp_path):
    with pytest.raises(ValueError, match=r"val split needs at least 10 images, one of each class, got 9"):
        write_shapes(tmp_path / "set", "imagenet", train=20, val=9, size=SIZE)
    assert list(tmp_path.iterdir()) == []


# Files and folders


def test_file_names_are_those_of_the_real_sets(sets):
    names = {layout: sorted(contents(sets[layout])) for layout in LAYOUTS}

    def first(layout: str) -> list[str]:
        return sorted({name for name in names[layout] if re.search(r"0*1(_labelTrainIds)?\.(jpg|png)$", name)})

    def folders(layout: str) -> set[str]:
        return {Path(name).parent.as_posix() for name in names[layout]}

    for layout in ("shapes", "ade20k"):
        assert "annotations/training/ADE_train_00000001.png" in first(layout)
        assert "images/validation/ADE_val_00000001.jpg" in first(layout)
    assert "annotations/test2014/COCO_train2014_000000000001_labelTrainIds.png" in first("coco_stuff10k")
    assert "images/train2014/COCO_train2014_000000000001.jpg" in first("coco_stuff10k")
    assert folders("camvid") == {"annotations/train", "annotations/val", "images/train", "images/val"}
    assert folders("nyu") == {"annotations/train", "annotations/test", "images/train", "images/test"}
    assert "images/train/kitchen_0001_00001.jpg" in names["nyu"] and "images/test/kitchen_00001.jpg" in names["nyu"]
    assert folders("coco") == {"annotations", "train2017", "val2017"}
    assert "val2017/000000000001.jpg" in names["coco"]


@pytest.mark.slow
def test_sizes_default_to_what_the_layout_is_for(tmp_path):
    for layout, name, size in (
        ("camvid", "images/train/train_000001.jpg", (128, 128)),
        ("nyu", "images/train/kitchen_0001_00001.jpg", (640, 480)),  # what mmseg's nyu_crop takes for granted
    ):
        with Image.open(write_shapes(tmp_path / layout, layout, train=1, val=1) / name) as image:
            assert image.size == size


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing(tmp_path, stop):
    made = []

    def interrupt():
        made.append(True)
        if len(made) == 3:
            raise stop

    with pytest.raises(stop):
        write_shapes(tmp_path / "set", "camvid", train=5, val=5, size=SIZE, on_image=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_already_stays_untouched(tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    file.write_text("mine")
    for taken in (folder, file):
        with pytest.raises(ValueError, match=rf"{re.escape(str(taken))} exists: set the output to a new folder"):
            write_shapes(taken, "camvid", train=1, val=1, size=SIZE)
    assert contents(tmp_path) == {"folder/mine.txt": b"mine", "file": b"mine"}


def test_what_appears_during_the_run_stays_untouched(tmp_path):
    def interfere():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "mine.txt").write_text("mine")

    with pytest.raises(ValueError, match="exists"):
        write_shapes(tmp_path / "set", "camvid", train=1, val=1, size=SIZE, on_image=interfere)
    assert contents(tmp_path) == {"set/mine.txt": b"mine"}


def test_an_empty_folder_is_filled_and_missing_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b"):
        assert write_shapes(out, "camvid", train=1, val=1, size=SIZE) == out
        assert sorted(path.name for path in out.iterdir()) == ["annotations", "images"]
        assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


def test_others_may_read_the_set_as_far_as_the_umask_allows(tmp_path):
    before = os.umask(0o022)
    try:
        out = write_shapes(tmp_path / "set", "camvid", train=1, val=1, size=SIZE)
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pascal"}, "pascal.*ade20k, coco_stuff10k, camvid"),
        ({"train": 0}, "train split.*got 0"),
        ({"val": -1}, "val split.*got -1"),
        ({"size": (16, 64)}, f"at least {MIN_SIDE}.*16 x 64"),
        ({"seed": -1}, "seed.*-1"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path / "set", **{"layout": "camvid", "train": 1, "val": 1, "size": SIZE, **options})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["layouts", "masks", "rooms", "shapes", "textures"])
def test_drawing_needs_numpy_and_pillow_alone(module):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / f"mmsnnet/datasets/procedural/{module}.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    foreign = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert foreign <= {"numpy", "PIL", "mmsnnet"}
    ours = {name for name in imported if name.startswith("mmsnnet")}
    ours -= {"mmsnnet.files.writing"}
    assert ours <= {f"mmsnnet.datasets.procedural.{name}" for name in ("masks", "rooms", "shapes", "textures")}


# The command line


def test_the_command_writes_what_the_function_writes_and_says_where(tmp_path):
    options = ("--layout", "ade20k", "--train", 3, "--val", 2, "--size", *SIZE, "--seed", 9)
    command = [sys.executable, str(COMMAND), str(tmp_path / "made"), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "made") in done.stdout and "3 training and 2 validation" in done.stdout
    wanted = write_shapes(tmp_path / "wanted", "ade20k", train=3, val=2, size=SIZE, seed=9)
    assert contents(tmp_path / "made") == contents(wanted)


@pytest.fixture
def command(monkeypatch):
    """``command(*arguments)`` runs the tool in this process, which need not be started for it."""
    spec = importlib.util.spec_from_file_location("make_shapes", COMMAND)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["make_shapes.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            tool.main()
        return end.value.code

    return run


def test_help_names_layouts_and_defaults(command, capsys):
    assert command("--help") == 0
    said = capsys.readouterr().out
    summaries = [layout.summary for layout in LAYOUTS.values()]
    for word in (*LAYOUTS, *summaries, "OUT", "H W", "default: 200", "default: 50", "default: 0", "nyu: 480 640"):
        assert word in said


@pytest.mark.parametrize(
    ("out", "layout", "message"),
    [("new", "pascal", "ade20k, coco_stuff10k, camvid"), ("taken", "camvid", "set the output to a new folder")],
)
def test_mistakes_end_with_an_error_and_code_2(tmp_path, command, capsys, out, layout, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    assert command(tmp_path / out, "--layout", layout, "--train", 1, "--val", 1) == 2
    said = capsys.readouterr().err
    assert "error: " in said and message in said
    assert contents(tmp_path) == {"taken/mine.txt": b"mine"}


# The page about data sets


def test_the_page_names_a_stand_in_for_each_set_where_its_config_looks():
    page = (ROOT / "docs/datasets.md").read_text()
    stand_ins = re.findall(r"^Stand-in: `python (\S+) (\S+) --layout (\w+)( --size 32 32)?`$", page, re.MULTILINE)
    assert {tool for tool, *_ in stand_ins} == {"tools/dataset_converters/make_shapes.py"}
    assert {layout for _, _, layout, _ in stand_ins} == set(LAYOUTS) - {"shapes"}
    configs = [path.read_text() for path in (ROOT / "configs/_base_/datasets").glob("*.py")]
    for _, folder, _, _ in stand_ins:
        assert any(f'data_root = "{folder}"' in config for config in configs), folder
