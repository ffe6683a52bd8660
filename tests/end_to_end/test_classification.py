"""Classification by the ordinary tools: the real config with tiny anchors on tiny images in ImageNet's layout.

A config file in the test's folder has the real one as its base and changes sizes, rates, and `data_root` alone.
"""

import json
import math
import re
import shutil
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsnnet.apis import load_config
from mmsnnet.datasets import write_shapes
from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool

REAL = Path(__file__).parents[2] / "configs/imagenet/stitched-deit3-s-l_8xb64-50e_imagenet-224x224.py"
CLASSES, TRAIN_IMAGES, VAL_IMAGES, BATCH = 10, 20, 10, 10
EPOCHS, EPOCH = 26, TRAIN_IMAGES // BATCH
WIDTHS, SIZE = (32, 64), 64
STITCHES = ("S", "L", "S4-L10", "L5-S3-L12")


def shrunk(data: Path) -> dict[str, Any]:
    """What a config on top of the real one changes to run in seconds, with every iteration logged as it is."""
    real = load_config(REAL).to_dict()
    anchors = [
        anchor | dict(embed_dim=width, num_heads=2, init_values=1.0, drop_path_rate=0.0, pretrained=None)
        for anchor, width in zip(real["model"]["backbone"]["anchors"], WIDTHS, strict=True)
    ]
    loaders = {}
    for split in ("train", "val", "test"):
        pipeline = real[f"{split}_dataloader"]["dataset"]["pipeline"]
        # So few iterations are too short to learn from images that are changed or mixed.
        sizes = dict(input_size=SIZE) | (dict(auto_augment=None, color_jitter=None) if split == "train" else {})
        pipeline = [step | sizes if "input_size" in step else step for step in pipeline]
        dataset = dict(data_root=str(data), pipeline=pipeline)
        loaders[f"{split}_dataloader"] = dict(
            num_workers=0, persistent_workers=False, batch_size=BATCH, dataset=dataset
        )
    return dict(
        model=dict(
            backbone=dict(anchors=anchors, img_size=SIZE, flops_step=2e6),
            num_classes=CLASSES,
            mixing=dict(prob=0.0, label_smoothing=0.0),
        ),
        **loaders,
        optim_wrapper=dict(optimizer=dict(lr=0.04)),
        param_scheduler=[dict(type="LinearLR", start_factor=0.1, begin=0, end=1, convert_to_iter_based=True)],
        train_cfg=dict(max_epochs=EPOCHS, val_interval=EPOCHS),
        default_hooks=dict(logger=dict(interval=1), checkpoint=dict(interval=EPOCHS // 2)),
        log_processor=dict(window_size=1),
    )


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the last run in a work folder logged: one entry for each iteration, and one for each validation."""
    return [json.loads(line) for line in max(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()]


def losses(work_dir: Path) -> dict[int, float]:
    """The loss by the iteration (from 1)."""
    return {entry["step"]: entry["loss"] for entry in scalars(work_dir) if "loss" in entry}


def weights(work_dir: Path, epoch: int) -> dict[str, Tensor]:
    return torch.load(work_dir / f"epoch_{epoch}.pth", map_location="cpu", weights_only=False)["state_dict"]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("classification")


@pytest.fixture(scope="module")
def config(work: Path) -> Path:
    write_shapes(work / "data", "imagenet", TRAIN_IMAGES, VAL_IMAGES, (SIZE, SIZE))
    settings = shrunk(work / "data")
    path = work / "config.py"
    path.write_text("\n".join([f"_base_ = {str(REAL)!r}", *(f"{key} = {value!r}" for key, value in settings.items())]))
    return path


@pytest.fixture(scope="module")
def trained(tool: Tool, config: Path, work: Path) -> Path:
    """The work folder of a run."""
    tool("train", config, "--work-dir", work / "stitched")
    return work / "stitched"


@pytest.fixture(scope="module")
def resumed(tool: Tool, config: Path, trained: Path) -> Path:
    """A copy of the work folder in which training went on, with mixed images."""
    copy = shutil.copytree(trained, trained.with_name("resumed"))
    more = {"train_cfg.max_epochs": EPOCHS + 1, "default_hooks.checkpoint.interval": 1, "model.mixing.prob": 1.0}
    tool("train", config, "--work-dir", copy, "--resume", "--cfg-options", *(f"{k}={v}" for k, v in more.items()))
    return copy


@pytest.fixture(scope="module")
def tested(tool: Tool, config: Path, trained: Path, work: Path) -> tuple[str, OperatingPoints]:
    """What the test printed, and the file that it wrote."""
    out = work / "points.json"
    which = ("--stitches", ",".join(STITCHES), "--metric", "top1", "--out", out, "--work-dir", work / "test")
    done = tool("test", config, trained / f"epoch_{EPOCHS}.pth", *which)
    return done.stdout, OperatingPoints.load(out)


def test_the_loss_falls(trained: Path) -> None:
    found = losses(trained)
    assert list(found) == list(range(1, EPOCHS * EPOCH + 1)) and all(map(math.isfinite, found.values()))
    values = list(found.values())
    sixth = len(values) // 6
    first, last = mean(values[:sixth]), mean(values[-sixth:])
    assert last < 0.85 * first, (first, last)


def test_the_run_is_validated_and_its_best_checkpoint_kept(trained: Path) -> None:
    (found,) = (entry for entry in scalars(trained) if "L/top1" in entry)
    assert all(0 <= found[f"{anchor}/top1"] <= found[f"{anchor}/top5"] <= 100 for anchor in "SL")
    kept = {path.name for path in trained.glob("*.pth")}
    assert kept == {f"epoch_{EPOCHS // 2}.pth", f"epoch_{EPOCHS}.pth", f"best_L_top1_epoch_{EPOCHS}.pth"}


def test_every_head_is_learned(trained: Path) -> None:
    before, after = weights(trained, EPOCHS // 2), weights(trained, EPOCHS)
    heads = [key for key in after if key.endswith("head.weight")]
    assert [tuple(after[key].shape) for key in heads] == [(CLASSES, width) for width in WIDTHS]
    assert not any(torch.equal(before[key], after[key]) for key in heads)


def test_norms_and_tokens_are_not_decayed(trained: Path) -> None:
    text = max(trained.glob("*/*.log")).read_text()
    rows = re.findall(r"^\s+(anchor 0|anchor 1|head|stitching layers)\s+\S+\s+(\S+)\s+\d+\s+[\d,]+\s*$", text, re.M)
    assert {part for part, decay in rows if decay == "0"} == {part for part, decay in rows if decay == "0.02"}
    assert {part for part, _ in rows} == {"anchor 0", "anchor 1", "head", "stitching layers"}


def test_a_resumed_run_goes_on(trained: Path, resumed: Path) -> None:
    assert list(losses(resumed)) == list(range(EPOCHS * EPOCH + 1, (EPOCHS + 1) * EPOCH + 1))
    before, after = weights(trained, EPOCHS), weights(resumed, EPOCHS + 1)
    assert int(before["backbone.draws"]) == EPOCHS * EPOCH and int(after["backbone.draws"]) == (EPOCHS + 1) * EPOCH
    # Stitching layers keep their base, which a new initialisation would have replaced.
    bases = [key for key in after if re.fullmatch(r"backbone\.network\.layers\.[^.]+\.weight", key)]
    assert len(bases) == 12 + 11 and all(torch.equal(before[key], after[key]) for key in bases)


def test_it_is_evaluated_at_several_stitches(tested: tuple[str, OperatingPoints]) -> None:
    _, points = tested
    assert {point.name for point in points} == set(STITCHES)
    for point in points:
        assert set(point.metrics) == {"top1", "top5"}
        # Ten images: whole tens of percent.
        assert point.metrics["top1"] in range(0, 101, 10) and point.metrics["top1"] <= point.metrics["top5"] <= 100
    flops = {point.name: point.flops for point in points}
    assert flops["S"] < flops["L5-S3-L12"] < flops["L"] and flops["S"] < flops["S4-L10"] < flops["L"]
    assert (points.dataset, points.input_shape) == ("ImageNet", (SIZE, SIZE))


def test_the_table_has_top1_and_marks_the_front(tested: tuple[str, OperatingPoints]) -> None:
    printed, _ = tested
    assert re.search(r"top1\s+top5", printed) and re.search(r"\bfront\b", printed)


def test_validation_and_test_agree_on_the_anchors(trained: Path, tested: tuple[str, OperatingPoints]) -> None:
    (validated,) = (entry for entry in scalars(trained) if "L/top1" in entry)
    found = {f"{point.name}/top1": point.metrics["top1"] for point in tested[1] if point.is_anchor}
    assert found == {name: validated[name] for name in ("S/top1", "L/top1")}


def test_a_damaged_image_ends_the_run_with_its_name(tool: Tool, config: Path, work: Path, tmp_path: Path) -> None:
    data = shutil.copytree(work / "data", tmp_path / "data")
    damaged = min(data.glob("train/*/*.JPEG"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    done = tool.attempt(
        "train", config, "--work-dir", tmp_path / "work", "--cfg-options", f"train_dataloader.dataset.data_root={data}"
    )
    assert done.returncode != 0
    assert f"{damaged}: expected an image, found a file that cannot be decoded" in done.stderr.splitlines()[-1]
