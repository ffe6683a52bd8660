"""Depth by the ordinary tools: the real NYUv2 config with tiny anchors, on a procedural set in NYUv2's layout."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmsnnet.datasets import write_shapes
from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs/nyu/stitched-deit3-s-l_dpt_8xb2-24e_nyu-416x544.py"
EPOCHS, BREAK, ITERATIONS_PER_EPOCH = 20, 10, 2
WARM_UP = 4
METRICS = {"d1", "d2", "d3", "abs_rel", "rmse", "log10"}

# What is left of the real config: its head, loss, pipeline, loops, hooks, optimizer and metrics.
SMALL = """
_base_ = {config!r}
model = dict(
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(
        anchors=[
            dict(model="deit3_small_patch16_224", embed_dim=32, depth=4, num_heads=2, init_values=1.0),
            dict(model="deit3_small_patch16_224", embed_dim=48, depth=8, num_heads=2, init_values=1.0),
        ],
        img_size=(96, 128),
        out_indices=(1, 3, 5, 7),
        rank=4,
        flops_step=5e6,
    ),
    decode_head=dict(
        in_channels=48,
        channels=16,
        post_process_channels=(8, 8, 16, 16),
        loss_decode=dict(warm_up_iters={warm_up}),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type="CosineAnnealingLR", eta_min_ratio=25, begin=0, end=4, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.01, begin=4, end={epochs}, convert_to_iter_based=True),
]
train_cfg = dict(max_epochs={epochs}, val_interval={break_})
loader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
train_dataloader = dict(batch_size=4, **loader)
val_dataloader = loader
test_dataloader = loader
default_hooks = dict(logger=dict(interval=1), visualization=dict(draw=True))
log_processor = dict(window_size=1)
"""
CROP = ("--cfg-options", "train_dataloader.dataset.pipeline.5.crop_size=(96,128)")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    write_shapes(folder / "data", "nyu", 4 * ITERATIONS_PER_EPOCH, 2, (120, 160))
    path = folder / "small.py"
    settings = dict(config=str(CONFIG), data=str(folder / "data"), warm_up=WARM_UP, epochs=EPOCHS, break_=BREAK)
    path.write_text(SMALL.format(**settings))
    return path


@pytest.fixture(scope="module")
def work(tool: Tool, config: Path) -> Path:
    """The work folder of a run that ended half way and was taken up again."""
    work = config.parent / "work"
    options = (config, "--work-dir", work, *CROP)
    for more in ((f"train_cfg.max_epochs={BREAK}",), ("--resume",)):
        tool("train", *options, *more)
    return work


@pytest.fixture(scope="module")
def runs(work: Path) -> list[list[dict[str, Any]]]:
    """What either run logged: an entry for each iteration and each validation."""
    files = sorted(work.glob("*/vis_data/scalars.json"))
    runs = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    assert len(runs) == 2
    return runs


@pytest.fixture(scope="module")
def points(tool: Tool, config: Path, work: Path) -> OperatingPoints:
    stitches = ("--stitches", "S,L,S1-L4", "--metric", "d1")
    tool("test", config, work / f"epoch_{EPOCHS}.pth", "--work-dir", work / "test", *stitches)
    return OperatingPoints.load(work / "test" / "operating_points.json")


def logged(run: list[dict[str, Any]], name: str) -> dict[int, float]:
    return {entry["iter"]: entry[name] for entry in run if name in entry}


def test_the_loss_falls(runs: list[list[dict[str, Any]]]) -> None:
    losses = logged(runs[0], "decode.loss_silog") | logged(runs[1], "decode.loss_silog")
    values = [losses[iteration + 1] for iteration in range(EPOCHS * ITERATIONS_PER_EPOCH)]
    assert all(math.isfinite(value) for value in values)
    first, last = (sum(part) / 10 for part in (values[WARM_UP : WARM_UP + 10], values[-10:]))
    assert last < 0.9 * first, (first, last)


def test_the_warm_up_ends_after_its_iterations(runs: list[list[dict[str, Any]]]) -> None:
    """The variance of the log depth, which is most of the loss at the start, counts from then on."""
    values = list(logged(runs[0], "decode.loss_silog").values())
    assert max(values[:WARM_UP]) < min(values[WARM_UP : 2 * WARM_UP]), values


def test_the_run_is_taken_up_where_it_was(runs: list[list[dict[str, Any]]]) -> None:
    half = BREAK * ITERATIONS_PER_EPOCH
    assert [list(logged(run, "loss")) for run in runs] == [
        list(range(1, half + 1)),
        list(range(half + 1, EPOCHS * ITERATIONS_PER_EPOCH + 1)),
    ]
    rates = [logged(run, "base_lr") for run in runs]
    peak = max(rates[0].values())
    assert peak > max(rates[1].values()) > min(rates[1].values()) and rates[0][1] == pytest.approx(2e-4)
    assert 0.8 * rates[0][half] < rates[1][half + 1] < rates[0][half]
    for run in runs:
        anchors = logged(run, "lr")
        assert all(anchors[i] == pytest.approx(0.1 * rate) for i, rate in logged(run, "base_lr").items())


def test_the_checkpoint_of_the_smallest_error_is_kept(work: Path, runs: list[list[dict[str, Any]]]) -> None:
    errors = {
        epoch: entry["L/abs_rel"]
        for epoch, run in zip((BREAK, EPOCHS), runs, strict=True)
        for entry in run
        if "L/abs_rel" in entry
    }
    assert len(errors) == 2
    best = min(errors, key=lambda epoch: errors[epoch])
    assert [path.name for path in work.glob("best_*.pth")] == [f"best_L_abs_rel_epoch_{best}.pth"]


def test_several_stitches_are_evaluated(points: OperatingPoints) -> None:
    assert [point.name for point in points] == ["S", "L", "S1-L4"]
    for point in points:
        assert set(point.metrics) >= METRICS and all(math.isfinite(value) for value in point.metrics.values())
        assert 0 <= point.metrics["d1"] <= point.metrics["d2"] <= point.metrics["d3"] <= 1
        assert point.metrics["abs_rel"] > 0 and 0 < point.metrics["rmse"] < 10
    assert len({point.metrics["rmse"] for point in points}) == len({point.flops for point in points}) == 3


def test_prefix_reuse_changes_no_figure(
    tool: Tool, config: Path, work: Path, points: OperatingPoints, tmp_path: Path
) -> None:
    """With a flip of each image, whose taps are those of another call of the backbone."""
    arguments = (config, work / f"epoch_{EPOCHS}.pth", "--work-dir", tmp_path, "--stitches", "S,L,S1-L4")
    tool("test", *arguments, "--no-prefix-reuse", "--cfg-options", "default_hooks.visualization.draw=False")
    assert OperatingPoints.load(tmp_path / "operating_points.json") == points


def test_validation_and_test_agree(points: OperatingPoints, runs: list[list[dict[str, Any]]]) -> None:
    (validated,) = (entry for entry in runs[1] if "L/abs_rel" in entry)
    for point in points:
        if point.is_anchor:
            assert {name: validated[f"{point.name}/{name}"] for name in METRICS} == pytest.approx(
                {name: point.metrics[name] for name in METRICS}, rel=1e-5
            )


def test_the_checkpoint_has_the_head(work: Path) -> None:
    state = torch.load(work / f"epoch_{EPOCHS}.pth", map_location="cpu", weights_only=False)["state_dict"]
    assert {"decode_head.conv_seg.weight", "backbone.draws"} <= set(state)
    assert int(state["backbone.draws"]) == EPOCHS * ITERATIONS_PER_EPOCH


def test_depth_is_drawn(work: Path, points: OperatingPoints) -> None:
    """By mmseg's hook, for each image and stitch: image over depth, ground truth beside prediction."""
    drawn = list((work / "test").glob("*/vis_data/vis_image/*/test_*.png"))  # a folder for each stitch
    assert len(drawn) == 2 * len(points)
    with Image.open(drawn[0]) as image:
        assert image.size == (2 * 160, 2 * 120)
