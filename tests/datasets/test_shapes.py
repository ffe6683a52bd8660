"""The procedural set: what an image depends on, what it shows, and that mmseg's own datasets read it as it was made."""

import colorsys
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mmseg.datasets import ADE20KDataset, BaseSegDataset, COCOStuffDataset
from PIL import Image

import mmsnnet.datasets.shapes as shapes
from mmsnnet.datasets import CLASSES, LAYOUTS, MIN_SIDE, PALETTE, make_scene, scene_rng, write_shapes

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "tools" / "dataset_converters" / "make_shapes.py"
SIZE = (48, 64)


def scene(seed: int = 0, split: str = "train", index: int = 0, size: tuple[int, int] = SIZE):
    return make_scene(scene_rng(seed, split, index), size)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What an image depends on


def test_a_scene_is_a_function_of_seed_split_and_index_alone():
    wanted_image, wanted_labels = scene(3, "val", 7)
    np.random.seed(1)  # noqa: NPY002  the global state must not matter
    scene(3, "val", 6)
    image, labels = scene(3, "val", 7)
    np.testing.assert_array_equal(image, wanted_image)
    np.testing.assert_array_equal(labels, wanted_labels)


def test_making_a_scene_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    scene()
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_images_differ_between_seeds_splits_and_indices():
    made = [scene(seed, split, i)[0].tobytes() for seed in (0, 1) for split in ("train", "val") for i in range(10)]
    assert len(set(made)) == len(made)


def test_a_longer_run_only_adds_images(tmp_path):
    short = contents(write_shapes(tmp_path / "short", "ade20k", train=2, val=1, size=SIZE))
    long = contents(write_shapes(tmp_path / "long", "ade20k", train=5, val=3, size=SIZE))
    assert len(long) == 2 * 8
    assert {name: long[name] for name in short} == short


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    first, again, other = (
        contents(write_shapes(tmp_path / str(k), "camvid", train=2, val=2, size=SIZE, seed=seed))
        for k, seed in enumerate((4, 4, 5))
    )
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first if name.startswith("images"))


# What an image shows


@pytest.mark.parametrize("size", [(MIN_SIDE, MIN_SIDE), (48, 64), (128, 128), (40, 200)])
def test_scenes_have_the_promised_form(size):
    for index in range(5):
        image, labels = scene(index=index, size=size)
        assert image.shape == (*size, 3) and image.dtype == np.uint8
        assert labels.shape == size and labels.dtype == np.uint8
        assert labels.max() < len(CLASSES)
        assert labels.any(), "a scene without a single shape"
        assert image.std() > 1


def test_every_class_has_a_share_and_background_the_greatest():
    counts = sum(np.bincount(scene(index=i)[1].ravel(), minlength=len(CLASSES)) for i in range(100))
    shares = counts / counts.sum()
    assert shares.argmax() == 0 and 0.5 < shares[0] < 0.8
    assert shares[1:].min() > 0.02


def test_classes_and_palette_go_together():
    assert len(CLASSES) == len(PALETTE) == len(set(CLASSES)) == len(set(PALETTE)) == 8
    assert all(len(colour) == 3 and all(0 <= c <= 255 for c in colour) for colour in PALETTE)


def test_the_hue_hints_at_the_class_but_does_not_decide_it():
    """The class whose hue is nearest to a shape's mean colour is right far more often than by chance, not always."""
    right = []
    for index in range(200):
        image, labels = scene(index=index)
        for label in set(np.unique(labels)) - {0}:
            hue = colorsys.rgb_to_hsv(*image[labels == label].mean(axis=0) / 255)[0]
            distances = [abs((hue - k / 7 + 0.5) % 1 - 0.5) for k in range(7)]
            right.append(int(np.argmin(distances)) + 1 == label)
    assert 2 / 7 < np.mean(right) < 0.95


@pytest.mark.parametrize("label", range(1, len(CLASSES)))
def test_a_shape_lies_whole_within_its_window_and_turns_with_its_angle(label):
    for stretch in (0.8, 1.25):
        for angle in np.linspace(0, 2 * np.pi, 9):
            upright = shapes._Figure(label, (64, 64), 25, 0.0, stretch)
            turned = shapes._Figure(label, (64, 64), 25, float(angle), stretch)
            window, coverage = turned.draw((128, 128))
            assert coverage.shape == tuple(s.stop - s.start for s in window)
            assert not any(edge.any() for edge in (coverage[0], coverage[-1], coverage[:, 0], coverage[:, -1]))
            assert coverage.sum() == pytest.approx(upright.draw((128, 128))[1].sum(), rel=0.03)


def test_the_outline_is_smooth_in_the_image_and_crisp_in_the_labels(monkeypatch):
    disc = shapes._Figure(1, (24, 32), 15, 0.0, 1.0)
    monkeypatch.setattr(shapes, "_place_figures", lambda rng, size: [disc])
    _, coverage = disc.draw(SIZE)
    assert ((coverage > 0) & (coverage < 1)).any()
    _, labels = scene()
    assert set(np.unique(labels)) == {0, 1}
    assert (labels == 1).sum() == pytest.approx(np.pi * (0.85 * 15) ** 2, rel=0.03)


# What lies on disk


OWN_CLASSES = {"classes": CLASSES, "palette": [list(colour) for colour in PALETTE]}


@pytest.mark.parametrize("backend", ["pillow", "cv2"])
@pytest.mark.parametrize(
    ("layout", "dataset", "options", "folders"),
    [
        ("ade20k", ADE20KDataset, {}, ("training", "validation")),
        ("ade20k", BaseSegDataset, {"metainfo": OWN_CLASSES, "reduce_zero_label": True}, ("training", "validation")),
        (
            "coco_stuff10k",
            COCOStuffDataset,
            {"reduce_zero_label": True},
            ("train2014", "test2014"),
        ),
        ("camvid", BaseSegDataset, {"metainfo": OWN_CLASSES}, ("train", "val")),
    ],
)
def test_mmseg_reads_the_images_and_labels_that_were_made(tmp_path, layout, dataset, options, folders, backend):
    out = write_shapes(tmp_path / "set", layout, train=3, val=2, size=SIZE)
    for split, folder, count in zip(("train", "val"), folders, (3, 2), strict=True):
        read = dataset(
            data_root=str(out),
            data_prefix={"img_path": f"images/{folder}", "seg_map_path": f"annotations/{folder}"},
            pipeline=[
                {"type": "LoadImageFromFile"},
                {"type": "mmseg.LoadAnnotations", "imdecode_backend": backend},
                {"type": "mmseg.PackSegInputs"},
            ],
            **options,
        )
        assert len(read) == count
        for index in range(count):
            image, labels = scene(0, split, index)
            sample = read[index]
            np.testing.assert_array_equal(sample["data_samples"].gt_sem_seg.data[0].numpy(), labels)
            # JPEG, and mmseg's images are BGR.
            off = np.abs(sample["inputs"].numpy()[::-1].transpose(1, 2, 0).astype(int) - image)
            assert off.mean() < 4


def test_file_names_are_those_of_the_real_sets(tmp_path):
    names = {layout: sorted(contents(write_shapes(tmp_path / layout, layout, 1, 1, SIZE))) for layout in LAYOUTS}
    assert names["ade20k"] == [
        "annotations/training/ADE_train_00000001.png",
        "annotations/validation/ADE_val_00000001.png",
        "images/training/ADE_train_00000001.jpg",
        "images/validation/ADE_val_00000001.jpg",
    ]
    assert names["coco_stuff10k"] == [
        "annotations/test2014/COCO_test2014_000000000001_labelTrainIds.png",
        "annotations/train2014/COCO_train2014_000000000001_labelTrainIds.png",
        "images/test2014/COCO_test2014_000000000001.jpg",
        "images/train2014/COCO_train2014_000000000001.jpg",
    ]
    assert [Path(name).parent.as_posix() for name in names["camvid"]] == [
        "annotations/train",
        "annotations/val",
        "images/train",
        "images/val",
    ]


def test_label_maps_hold_indices_not_colours(tmp_path):
    out = write_shapes(tmp_path / "set", "ade20k", train=1, val=1, size=SIZE)
    with Image.open(out / "annotations/training/ADE_train_00000001.png") as label_map:
        assert label_map.mode == "L"
        np.testing.assert_array_equal(np.asarray(label_map), scene()[1] + 1)


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
        with pytest.raises(FileExistsError, match=rf"{re.escape(str(taken))}.*[Rr]emove it or name another"):
            write_shapes(taken, "camvid", train=1, val=1, size=SIZE)
    assert contents(tmp_path) == {"folder/mine.txt": b"mine", "file": b"mine"}


def test_what_appears_during_the_run_stays_untouched(tmp_path):
    def interfere():
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / "mine.txt").write_text("mine")

    with pytest.raises(FileExistsError):
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


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match=r"test.*train, val"):
        scene_rng(0, "test", 0)


def test_the_module_needs_neither_torch_nor_openmmlab():
    assert importlib.util.find_spec("torch") is not None
    code = (
        "import importlib.util, sys; "
        f"spec = importlib.util.spec_from_file_location('shapes', {shapes.__file__!r}); "
        "module = sys.modules['shapes'] = importlib.util.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert not {'torch', 'mmengine', 'mmcv', 'mmseg'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The command line


def run(*args: object) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    command = [sys.executable, str(COMMAND), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_writes_what_the_function_writes_and_says_where(tmp_path):
    done = run(tmp_path / "made", "--layout", "ade20k", "--train", 3, "--val", 2, "--size", *SIZE, "--seed", 9)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "made") in done.stdout and "3 training and 2 validation" in done.stdout
    wanted = write_shapes(tmp_path / "wanted", "ade20k", train=3, val=2, size=SIZE, seed=9)
    assert contents(tmp_path / "made") == contents(wanted)


def test_help_names_layouts_classes_and_defaults():
    done = run("--help")
    assert done.returncode == 0
    for word in (*LAYOUTS, *CLASSES, "OUT", "H W", "default: 200", "default: 50", "default: 0"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layout", "pascal"), "ade20k, coco_stuff10k, camvid"),
        (("--layout", "camvid", "--train", "1", "--val", "1", "taken"), "name another output folder"),
    ],
)
def test_mistakes_end_with_an_error_and_code_2(tmp_path, options, message):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    out = tmp_path / ("taken" if "taken" in options else "new")
    done = run(out, *(option for option in options if option != "taken"))
    assert done.returncode == 2
    assert "error: " in done.stderr and message in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == {"taken/mine.txt": b"mine"}
