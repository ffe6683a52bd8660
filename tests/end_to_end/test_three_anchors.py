"""Three stitched anchors by the ordinary tools: trained, resumed, evaluated at a stitch of each kind, drawn."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmsnnet.apis import build_model, load_config
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.models import model_costs
from mmsnnet.stitching import Stitch, StitchSampler, StitchSpace
from mmsnnet.visualization import plot_pareto
from tests.conftest import Tool

Options = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]
CONFIG = Path("configs/quickstart/stitched-vit-s-m-l_setr_shapes-64x64.py")
SPACE = StitchSpace.two_way((6, 8, 12))
# One layer leaves each block of the smaller anchor of a pair, one enters each but its first.
LAYERS = (6 + 5) + (8 + 7)
ITERATIONS, MORE_ITERATIONS = 2, 4
UNTRAINED = {f"model.backbone.anchors.{index}.pretrained": None for index in range(3)}


def of_each_kind() -> list[Stitch]:
    """The last stitch of each kind, in the order of the space."""
    return sorted({stitch.kind: stitch for stitch in SPACE}.values(), key=lambda stitch: stitch.id)


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the last run in a work folder logged: one entry for each iteration, and one for each validation."""
    return [json.loads(line) for line in max(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()]


@pytest.fixture(scope="module")
def stitched(tool: Tool, quickstart: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("three_anchors") / "stitched"
    tool("train", CONFIG, "--work-dir", work, *quickstart(ITERATIONS, **UNTRAINED))
    return work


@pytest.fixture(scope="module")
def resumed(tool: Tool, quickstart: Options, stitched: Path) -> Path:
    copy = shutil.copytree(stitched, stitched.with_name("resumed"))
    tool("train", CONFIG, "--work-dir", copy, "--resume", *quickstart(MORE_ITERATIONS, **UNTRAINED))
    return copy


@pytest.fixture(scope="module")
def points_file(tool: Tool, quickstart: Options, resumed: Path) -> Path:
    out = resumed.with_name("points.json")
    names = ",".join(stitch.name for stitch in of_each_kind())
    arguments = ("--stitches", names, "--out", out, "--work-dir", resumed.with_name("test"))
    tool("test", CONFIG, resumed / f"iter_{MORE_ITERATIONS}.pth", *arguments, *quickstart(0))
    return out


def test_all_pairs_are_initialised_and_all_anchors_validated(stitched: Path) -> None:
    assert f"initialised {LAYERS} stitching layers" in max(stitched.glob("*/*.log")).read_text()
    saved = weights(stitched / f"iter_{ITERATIONS}.pth")
    layers = {match[1] for match in (re.match(r"backbone\.network\.layers\.([^.]+)\.", key) for key in saved) if match}
    assert layers == {str(key) for key in SPACE.layers}
    (validated,) = (entry for entry in scalars(stitched) if "L/mIoU" in entry)
    assert {name.partition("/")[0] for name in validated if name.endswith("/mIoU")} == {"S", "M", "L"}


def test_a_resumed_run_goes_on_with_the_draws(stitched: Path, resumed: Path) -> None:
    before, after = weights(stitched / f"iter_{ITERATIONS}.pth"), weights(resumed / f"iter_{MORE_ITERATIONS}.pth")
    bases = [key for key in after if re.fullmatch(r"backbone\.network\.layers\.[^.]+\.weight", key)]
    assert len(bases) == LAYERS and all(torch.equal(before[key], after[key]) for key in bases)
    model = build_model(load_config(REPOSITORY / CONFIG))
    costs = model.backbone.training_costs()
    draws = StitchSampler(model.backbone.sampler().bins, model.backbone.seed)
    largest = costs[SPACE["L"].id].flops
    expected = {n + 1: costs[draws.draw(n)].flops / largest for n in range(MORE_ITERATIONS)}
    found = {e["iter"]: e["flops_share"] for run in (stitched, resumed) for e in scalars(run) if "flops_share" in e}
    assert found == pytest.approx(expected)


def test_a_stitch_of_each_kind_is_evaluated(points_file: Path) -> None:
    points = OperatingPoints.load(points_file)
    found = [(point.id, point.name, point.kind) for point in points]
    assert found == [(stitch.id, stitch.name, stitch.kind) for stitch in of_each_kind()]
    kinds = ["S", "M", "L", "SM", "MS", "MSM", "SMS", "ML", "LM", "LML", "MLM"]
    assert [point.kind for point in points] == kinds
    assert [point.name for point in points if point.is_anchor] == ["S", "M", "L"]
    costs = model_costs(build_model(load_config(REPOSITORY / CONFIG)))
    for point in points:
        assert (point.flops, point.params) == (costs[point.id].flops, costs[point.id].params)
        assert all(0 <= value <= 100 for value in point.metrics.values()) and "mIoU" in point.metrics


def test_the_file_can_be_drawn(points_file: Path, tmp_path: Path) -> None:
    with Image.open(plot_pareto([OperatingPoints.load(points_file)], "mIoU", tmp_path / "pareto.png")) as image:
        assert image.size == (1200, 750)
