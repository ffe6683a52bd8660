"""Segmentation by the ordinary tools: the real configs with tiny anchors on tiny images in the real layout.

A config file in the test's folder has the real one as its base and changes sizes, rates, and `data_root` alone.
"""

import json
import math
import re
import shutil
import signal
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS
from torch import Tensor

from mmsnnet.apis import load_config
from mmsnnet.datasets import write_shapes
from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool
from tests.python_processes import REPOSITORY, PythonProcess

CONFIGS = Path(__file__).parents[2] / "configs"
SETR = "ade20k/stitched-deit3-s-l_setr-naive_8xb2-160k_ade20k-512x512.py"
UPERNET = "ade20k/stitched-deit3-s-l_upernet_8xb2-160k_ade20k-512x512.py"
COCO_STUFF = "coco_stuff10k/stitched-deit3-s-l_setr-naive_8xb2-80k_coco-stuff10k-512x512.py"
TRAIN_IMAGES, BATCH = 8, 2
ITERATIONS, MORE_ITERATIONS = 12, 14
WIDTHS, CROP = (32, 64), 64
STITCHES = ("S", "L", "S4-L10", "L5-S3-L12")
# Runs a tool that is killed once it has saved operating points.
KILLED = """
import os, runpy, signal, sys

from mmsnnet.evaluation import OperatingPoints

save = OperatingPoints.save


def save_and_die(points, path):
    save(points, path)
    os.kill(os.getpid(), signal.SIGKILL)


OperatingPoints.save = save_and_die
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def shrunk(name: str, data: Path, iterations: int) -> dict[str, Any]:
    """What a config on top of a real one changes to run in seconds, with every iteration logged as it is."""
    real = load_config(CONFIGS / name).to_dict()
    backbone = real["model"]["backbone"]
    anchors = [
        anchor | dict(embed_dim=width, num_heads=2, pretrained=None)
        for anchor, width in zip(backbone["anchors"], WIDTHS, strict=True)
    ]
    model: dict[str, Any] = dict(
        data_preprocessor=dict(size=(CROP, CROP)),
        backbone=dict(anchors=anchors, img_size=CROP, flops_step=2e6),
        test_cfg=dict(crop_size=(CROP, CROP), stride=(42, 42)),
    )
    if name == UPERNET:
        model["neck"] = dict(embed_dim=WIDTHS[1])
        model["decode_head"] = dict(in_channels=[WIDTHS[1]] * 4, channels=16)
        model["auxiliary_head"] = dict(in_channels=WIDTHS[1], channels=16)
    else:
        sizes = dict(in_channels=WIDTHS[1], channels=16)
        model["decode_head"] = sizes
        model["auxiliary_head"] = [head | sizes for head in real["model"]["auxiliary_head"]]
    # Training images are used whole, so that every epoch has the same labels; test images come to 80 x 80, over which
    # the crop slides.
    sizes = dict(
        RandomResize=dict(scale=(4 * CROP, CROP), ratio_range=(1.0, 1.0)),
        RandomCrop=dict(crop_size=(CROP, CROP)),
        Resize=dict(scale=(320, 80)),
    )
    loaders = {}
    for split in ("train", "val", "test"):
        pipeline = [step | sizes.get(step["type"], {}) for step in real[f"{split}_dataloader"]["dataset"]["pipeline"]]
        dataset = dict(data_root=str(data), pipeline=pipeline)
        loaders[f"{split}_dataloader"] = dict(num_workers=0, persistent_workers=False, dataset=dataset)
    loaders["train_dataloader"]["batch_size"] = BATCH
    return dict(
        model=model,
        **loaders,
        optim_wrapper=dict(optimizer=dict(lr=0.05)),
        train_cfg=dict(max_iters=iterations, val_interval=iterations),
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(interval=iterations)),
        log_processor=dict(window_size=1),
    )


def write_config(path: Path, name: str, settings: dict[str, Any]) -> Path:
    lines = [f"_base_ = {str(CONFIGS / name)!r}", *(f"{key} = {value!r}" for key, value in settings.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the last run in a work folder logged: one entry for each iteration, and one for each validation."""
    return [json.loads(line) for line in max(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()]


def losses(work_dir: Path) -> dict[int, float]:
    """The loss by the iteration (from 1)."""
    return {entry["iter"]: entry["loss"] for entry in scalars(work_dir) if "loss" in entry}


def weights(work_dir: Path, iteration: int) -> dict[str, Tensor]:
    return torch.load(work_dir / f"iter_{iteration}.pth", map_location="cpu", weights_only=False)["state_dict"]


def loss_falls(work_dir: Path) -> None:
    """Asserts that every iteration was logged, and that the loss was lower in the last epoch than in the first."""
    found = losses(work_dir)
    assert list(found) == list(range(1, ITERATIONS + 1)) and all(map(math.isfinite, found.values()))
    values, epoch = list(found.values()), TRAIN_IMAGES // BATCH
    first, last = mean(values[:epoch]), mean(values[-epoch:])
    assert last < 0.9 * first, (first, last)


def is_validated_at_the_anchors(work_dir: Path) -> None:
    (found,) = (entry for entry in scalars(work_dir) if "L/mIoU" in entry)
    assert all(0 < found[f"{anchor}/{metric}"] <= 100 for anchor in "SL" for metric in ("aAcc", "mIoU", "mAcc"))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("segmentation")


@pytest.fixture(scope="module")
def data(tool: Tool, work: Path) -> Path:
    """A few images in ADE20K's layout, with its classes."""
    options = ("--layout", "ade20k", "--train", TRAIN_IMAGES, "--val", 2, "--size", 64, 64)
    tool("dataset_converters/make_shapes", work / "data", *options)
    return work / "data"


@pytest.fixture(scope="module")
def ade20k(tool: Tool, data: Path, work: Path) -> tuple[Path, Path]:
    """The config and the work folder of a run with the published head."""
    config = write_config(work / "setr.py", SETR, shrunk(SETR, data, ITERATIONS))
    tool("train", config, "--work-dir", work / "setr")
    return config, work / "setr"


@pytest.fixture(scope="module")
def resumed(tool: Tool, ade20k: tuple[Path, Path]) -> Path:
    """A copy of the work folder in which training went on."""
    config, work_dir = ade20k
    copy = shutil.copytree(work_dir, work_dir.with_name("resumed"))
    more = ("--cfg-options", f"train_cfg.max_iters={MORE_ITERATIONS}", "default_hooks.checkpoint.interval=1")
    tool("train", config, "--work-dir", copy, "--resume", *more)
    return copy


@pytest.fixture(scope="module")
def points(tool: Tool, ade20k: tuple[Path, Path], work: Path) -> OperatingPoints:
    config, work_dir = ade20k
    out = work / "points.json"
    which = ("--stitches", ",".join(STITCHES), "--out", out, "--work-dir", work / "test")
    tool("test", config, work_dir / f"iter_{ITERATIONS}.pth", *which)
    return OperatingPoints.load(out)


def test_ade20k_trains(ade20k: tuple[Path, Path]) -> None:
    loss_falls(ade20k[1])
    is_validated_at_the_anchors(ade20k[1])


def test_every_head_has_its_loss(ade20k: tuple[Path, Path]) -> None:
    first = scalars(ade20k[1])[0]
    names = ["decode.loss_ce", *(f"aux_{index}.loss_ce" for index in range(3))]
    assert {name for name in first if "loss_" in name} == set(names)
    assert sum(first[name] for name in names) == pytest.approx(first["loss"])


def test_the_best_checkpoint_is_kept(ade20k: tuple[Path, Path]) -> None:
    kept = {path.name for path in ade20k[1].glob("*.pth")}
    assert kept == {f"iter_{ITERATIONS}.pth", f"best_L_mIoU_iter_{ITERATIONS}.pth"}


def test_the_relative_position_bias_of_every_block_is_learned(ade20k: tuple[Path, Path]) -> None:
    tables = {
        key: value for key, value in weights(ade20k[1], ITERATIONS).items() if key.endswith("position_bias_table")
    }
    # 4 x 4 patches and a class token; two heads. All start at zero.
    assert len(tables) == 12 + 24 and {tuple(table.shape) for table in tables.values()} == {(7 * 7 + 3, 2)}
    assert all(table.abs().sum() > 0 for table in tables.values())


def test_ade20k_resumes(ade20k: tuple[Path, Path], resumed: Path) -> None:
    assert list(losses(resumed)) == list(range(ITERATIONS + 1, MORE_ITERATIONS + 1))
    before, after = weights(ade20k[1], ITERATIONS), weights(resumed, MORE_ITERATIONS)
    assert int(after["backbone.draws"]) == MORE_ITERATIONS
    # Stitching layers keep their base, which a new initialisation would have replaced.
    bases = [key for key in after if re.fullmatch(r"backbone\.network\.layers\.[^.]+\.weight", key)]
    assert len(bases) == 12 + 11 and all(torch.equal(before[key], after[key]) for key in bases)


def test_ade20k_is_evaluated_at_several_stitches(points: OperatingPoints) -> None:
    assert {point.name for point in points} == set(STITCHES)
    assert all(0 < point.metrics["mIoU"] <= 100 for point in points)
    flops = {point.name: point.flops for point in points}
    assert flops["S"] < flops["L5-S3-L12"] < flops["L"] and flops["S"] < flops["S4-L10"] < flops["L"]
    assert points.input_shape == (CROP, CROP)


def test_validation_and_test_agree_on_the_anchors(ade20k: tuple[Path, Path], points: OperatingPoints) -> None:
    (validated,) = (entry for entry in scalars(ade20k[1]) if "L/mIoU" in entry)
    tested = {f"{point.name}/mIoU": point.metrics["mIoU"] for point in points if point.is_anchor}
    assert tested == pytest.approx({name: validated[name] for name in ("S/mIoU", "L/mIoU")})


def test_a_killed_run_goes_on(
    tool: Tool, ade20k: tuple[Path, Path], points: OperatingPoints, work: Path, tmp_path: Path
) -> None:
    """Stitch by stitch without prefix reuse, killed after the first, then all others in one pass that reuses prefixes:
    the file is that of the undisturbed run."""
    config, work_dir = ade20k
    out = tmp_path / "points.json"
    command = [config, work_dir / f"iter_{ITERATIONS}.pth", "--stitches", ",".join(STITCHES), "--out", out]
    command += ["--work-dir", tmp_path / "test"]
    singly = ["--no-prefix-reuse", "--cfg-options", "test_cfg.stitches_per_pass=1"]
    killed = PythonProcess(
        "-c", KILLED, REPOSITORY / "tools/test.py", *command, *singly, folder=tmp_path, output=tmp_path
    )
    assert killed.wait().returncode == -signal.SIGKILL, killed.stderr
    assert len(OperatingPoints.load(out)) == 1
    tool("test", *command, "--resume")
    assert OperatingPoints.load(out) == points
    assert out.read_text() == (work / "points.json").read_text()

    other = ("--cfg-options", "model.test_cfg.stride=(32,32)")
    assert "results of another config" in tool.error("test", *command, "--resume", *other)
    assert out.read_text() == (work / "points.json").read_text()


def test_another_head(tool: Tool, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.py", UPERNET, shrunk(UPERNET, data, ITERATIONS))
    tool("train", config, "--work-dir", tmp_path / "work")
    loss_falls(tmp_path / "work")
    is_validated_at_the_anchors(tmp_path / "work")


@pytest.mark.parametrize(("name", "layout", "classes"), [(SETR, "ade20k", 150), (COCO_STUFF, "coco_stuff10k", 171)])
def test_the_real_data_settings_read_the_layout_by_data_root_alone(
    tmp_path: Path, name: str, layout: str, classes: int
) -> None:
    counts = dict(train=3, val=2)
    out = write_shapes(tmp_path / "data", layout, **counts, size=(48, 64))
    config = load_config(CONFIGS / name)
    preprocess = MODELS.build(config.model.data_preprocessor)
    for split, count in counts.items():
        dataset = DATASETS.build(config[f"{split}_dataloader"].dataset | dict(data_root=str(out)))
        assert len(dataset) == count
        batch = preprocess(pseudo_collate([dataset[0]]), training=split == "train")
        # A test image is brought to a short side of 512; its labels stay as they are.
        image, labels = ((512, 512), (512, 512)) if split == "train" else ((512, 683), (48, 64))
        assert batch["inputs"].shape == (1, 3, *image)
        found = batch["data_samples"][0].gt_sem_seg.data
        assert found.shape == (1, *labels)
        assert set(found.unique().tolist()) <= {*range(classes), 255} and found.unique().numel() > 2
