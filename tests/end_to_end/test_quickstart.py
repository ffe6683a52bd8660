"""The quickstart by its ordinary tools, cut down to a few iterations on a few images."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmsnnet.apis import build_model, load_config
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.stitching import StitchSpace
from tests.conftest import Tool

Options = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]
CONFIGS = Path("configs/quickstart")
SMALL = CONFIGS / "vit-s_setr_shapes-64x64.py"
LARGE = CONFIGS / "vit-l_setr_shapes-64x64.py"
STITCHED = CONFIGS / "stitched-vit-s-l_setr_shapes-64x64.py"
DEPTHS = (6, 12)
# One layer leaves each block of the small anchor, one enters each but its first.
LAYERS = DEPTHS[0] + DEPTHS[0] - 1
ITERATIONS, MORE_ITERATIONS, SMALL_ITERATIONS = 4, 6, 60


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=False)["state_dict"]


def log(work_dir: Path) -> str:
    """What the last run in a work folder wrote to its log file."""
    return max(work_dir.glob("*/*.log")).read_text()


def scalars(work_dir: Path) -> list[dict[str, Any]]:
    """What the last run in a work folder logged: one entry for each iteration, and one for each validation."""
    return [json.loads(line) for line in max(work_dir.glob("*/vis_data/scalars.json")).read_text().splitlines()]


def logged(work_dir: Path, name: str) -> dict[int, float]:
    """The values of one scalar by the iteration (from 1) that logged it."""
    return {entry["iter"]: entry[name] for entry in scalars(work_dir) if name in entry}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def small(tool: Tool, quickstart: Options, work: Path) -> Path:
    """The work folder of the small anchor, trained for long enough to see it learn."""
    options = quickstart(SMALL_ITERATIONS, train_dataloader__batch_size=4)
    tool("train", SMALL, "--work-dir", work / "anchor_s", *options)
    return work / "anchor_s"


@pytest.fixture(scope="module")
def large(tool: Tool, quickstart: Options, work: Path) -> Path:
    tool("train", LARGE, "--work-dir", work / "anchor_l", *quickstart(2))
    return work / "anchor_l"


@pytest.fixture(scope="module")
def pretrained(small: Path, large: Path) -> dict[str, Path]:
    """The settings that have the stitched model start from the two anchors' checkpoints."""
    return {
        "model.backbone.anchors.0.pretrained": small / f"iter_{SMALL_ITERATIONS}.pth",
        "model.backbone.anchors.1.pretrained": large / "iter_2.pth",
    }


@pytest.fixture(scope="module")
def stitched(tool: Tool, quickstart: Options, pretrained: Mapping[str, Path], work: Path) -> Path:
    options = quickstart(ITERATIONS, default_hooks__checkpoint__interval=2, **pretrained)
    tool("train", STITCHED, "--work-dir", work / "stitched", *options)
    return work / "stitched"


@pytest.fixture(scope="module")
def resumed(tool: Tool, quickstart: Options, pretrained: Mapping[str, Path], stitched: Path) -> Path:
    """A copy of the stitched run's work folder in which training went on, without the anchors' files."""
    copy = shutil.copytree(stitched, stitched.with_name("resumed"))
    nowhere = dict.fromkeys(pretrained, None)
    tool("train", STITCHED, "--work-dir", copy, "--resume", *quickstart(MORE_ITERATIONS, **nowhere))
    return copy


@pytest.fixture(scope="module")
def points_file(tool: Tool, quickstart: Options, stitched: Path, work: Path) -> Path:
    checkpoint = stitched / f"iter_{ITERATIONS}.pth"
    tool("test", STITCHED, checkpoint, "--work-dir", work / "test", *quickstart(ITERATIONS))
    return work / "test" / "operating_points.json"


@pytest.fixture(scope="module")
def points(points_file: Path) -> OperatingPoints:
    return OperatingPoints.load(points_file)


@pytest.fixture(scope="module")
def expected_shares() -> list[float]:
    """The share of the costliest stitch's FLOPs, with the taps of training, that each draw has."""
    backbone = build_model(load_config(REPOSITORY / STITCHED)).backbone
    model = backbone.cost_model()
    flops = {stitch.id: model.stitch(stitch, backbone.out_indices).flops for stitch in backbone.space}
    return [flops[backbone.sampler().draw(draw)] / max(flops.values()) for draw in range(MORE_ITERATIONS)]


def test_the_loss_of_an_anchor_falls(small: Path) -> None:
    losses = logged(small, "loss")
    assert list(losses) == list(range(1, SMALL_ITERATIONS + 1))
    values = list(losses.values())
    first, last = sum(values[:10]) / 10, sum(values[-10:]) / 10
    assert last < 0.9 * first, (first, last)


@pytest.mark.parametrize("anchor", ["small", "large"])
def test_an_anchor_alone_is_trained_and_validated(anchor: str, request: pytest.FixtureRequest) -> None:
    work_dir = request.getfixturevalue(anchor)
    last = max(logged(work_dir, "loss"))
    assert int(weights(work_dir / f"iter_{last}.pth")["backbone.draws"]) == last
    validations = [entry for entry in scalars(work_dir) if "A/mIoU" in entry]
    assert len(validations) == 1 and 0 < validations[0]["A/mIoU"] <= 100


def test_the_stitched_model_starts_from_the_anchors(pretrained: Mapping[str, Path]) -> None:
    config = load_config(REPOSITORY / STITCHED, {key: str(path) for key, path in pretrained.items()})
    model = build_model(config)
    model.init_weights()
    state = model.state_dict()
    own = "backbone.network.anchors.0."
    for index, (path, depth) in enumerate(zip(pretrained.values(), DEPTHS, strict=True)):
        anchor = {key.removeprefix(own): value for key, value in weights(path).items() if key.startswith(own)}
        prefix = f"backbone.network.anchors.{index}."
        assert {key.removeprefix(prefix) for key in state if key.startswith(prefix)} == set(anchor)
        assert len({match[1] for key in anchor if (match := re.search(r"blocks\.(\d+)\.", key))}) == depth
        differing = [key for key, value in anchor.items() if not torch.equal(state[prefix + key], value)]
        assert differing == []


def test_the_stitched_run_initialises_the_layers(stitched: Path) -> None:
    images = 8  # all of the training set, which has fewer than the hook would take
    assert f"StitchInitHook: initialised {LAYERS} stitching layers from {images} images" in log(stitched)


def test_every_iteration_logs_the_cost_of_the_stitch_it_drew(stitched: Path, expected_shares: list[float]) -> None:
    shares = logged(stitched, "flops_share")
    assert list(shares) == list(range(1, ITERATIONS + 1))
    assert list(shares.values()) == pytest.approx(expected_shares[:ITERATIONS])
    assert len(set(expected_shares)) > 1 and "flops_share: " in log(stitched)


def test_the_checkpoint_counts_the_draws(stitched: Path) -> None:
    for iteration in (2, ITERATIONS):
        assert int(weights(stitched / f"iter_{iteration}.pth")["backbone.draws"]) == iteration


def test_training_moves_the_updates_and_biases_only(stitched: Path) -> None:
    before, after = (weights(stitched / f"iter_{iteration}.pth") for iteration in (2, ITERATIONS))
    layer = re.compile(r"backbone\.network\.layers\.[^.]+\.(\w+)")
    parts = {key: match[1] for key in after if (match := layer.fullmatch(key))}
    assert Counter(parts.values()) == dict.fromkeys(("weight", "bias", "lora_A", "lora_B"), LAYERS)
    changed = {parts[key] for key in parts if not torch.equal(before[key], after[key])}
    assert changed >= {"bias", "lora_B"} and "weight" not in changed


def test_the_anchors_are_trained_too(stitched: Path) -> None:
    before, after = (weights(stitched / f"iter_{iteration}.pth") for iteration in (2, ITERATIONS))
    moved = {
        match[1]
        for key in after
        if (match := re.match(r"backbone\.network\.anchors\.(\d)\.", key)) and not torch.equal(before[key], after[key])
    }
    assert moved == {"0", "1"}


def test_a_resumed_run_goes_on(resumed: Path, expected_shares: list[float]) -> None:
    assert int(weights(resumed / f"iter_{MORE_ITERATIONS}.pth")["backbone.draws"]) == MORE_ITERATIONS
    shares = logged(resumed, "flops_share")
    assert list(shares) == list(range(ITERATIONS + 1, MORE_ITERATIONS + 1))
    assert list(shares.values()) == pytest.approx(expected_shares[ITERATIONS:])


def test_a_resumed_run_does_not_initialise_again(stitched: Path, resumed: Path) -> None:
    assert "StitchInitHook: initialised" not in log(resumed)
    before, after = weights(stitched / f"iter_{ITERATIONS}.pth"), weights(resumed / f"iter_{MORE_ITERATIONS}.pth")
    bases = [key for key in after if re.fullmatch(r"backbone\.network\.layers\.[^.]+\.weight", key)]
    assert len(bases) == LAYERS and all(torch.equal(before[key], after[key]) for key in bases)


def test_every_stitch_is_evaluated_in_the_order_of_the_space(points: OperatingPoints) -> None:
    found = [(point.id, point.name, point.kind) for point in points]
    assert found == [(stitch.id, stitch.name, stitch.kind) for stitch in StitchSpace.two_way(DEPTHS)]
    assert Counter(kind for _, _, kind in found) == {"S": 1, "L": 1, "SL": 5, "LS": 5, "LSL": 10, "SLS": 10}


def test_every_operating_point_has_metrics_and_costs(points: OperatingPoints) -> None:
    for point in points:
        assert set(point.metrics) == {"aAcc", "mIoU", "mAcc"}
        assert all(0 <= value <= 100 for value in point.metrics.values()), point
        assert point.latency_ms is None
    small, large = (next(point for point in points if point.kind == kind) for kind in ("S", "L"))
    assert 0 < small.flops < large.flops and 0 < small.params < large.params


def test_the_head_of_the_file_says_what_was_evaluated(points: OperatingPoints, stitched: Path) -> None:
    assert Path(points.config or "") == STITCHED
    assert points.checkpoint == str(stitched / f"iter_{ITERATIONS}.pth")
    assert (points.dataset, points.input_shape, points.device) == ("shapes", (64, 64), "cpu")


def test_validation_and_test_agree_on_the_anchors(stitched: Path, points: OperatingPoints) -> None:
    """The last validation of the run and the test of its checkpoint saw the same images with the same weights."""
    (validated,) = (entry for entry in scalars(stitched) if "S/mIoU" in entry)
    tested = {f"{point.name}/{name}": point.metrics[name] for point in points if point.is_anchor for name in ("mIoU",)}
    assert set(tested) == {"S/mIoU", "L/mIoU"}
    assert tested == pytest.approx({name: validated[name] for name in tested})


def test_get_flops_counts_what_the_test_wrote(tool: Tool, points: OperatingPoints, tmp_path: Path) -> None:
    out = tmp_path / "flops.json"
    tool("analysis_tools/get_flops", STITCHED, "--out", out)
    counted = OperatingPoints.load(out)
    assert [(p.id, p.flops, p.params) for p in counted] == [(p.id, p.flops, p.params) for p in points]
    assert counted.input_shape == (64, 64) and (counted.checkpoint, counted.device) == (None, None)
    assert all(not point.metrics for point in counted)


def test_plot_pareto_draws_the_points(tool: Tool, points_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "pareto.png"
    done = tool("analysis_tools/plot_pareto", points_file, "--metric", "mIoU", "--out", out)
    assert done.stdout == f"{out}\n"
    with Image.open(out) as image:
        image.load()
        assert image.format == "PNG"


def test_one_stitch_can_be_evaluated_alone(
    tool: Tool, quickstart: Options, stitched: Path, points: OperatingPoints, tmp_path: Path
) -> None:
    checkpoint = stitched / f"iter_{ITERATIONS}.pth"
    out = tmp_path / "deep" / "one.json"
    where = ("--out", out, "--work-dir", tmp_path / "work")
    tool("test", STITCHED, checkpoint, "--stitches", "S2-L6,1", *where, *quickstart(ITERATIONS))
    chosen = tuple(point for point in points if point.name in ("L", "S2-L6"))
    assert len(chosen) == 2 and OperatingPoints.load(out).points == chosen
    assert not (tmp_path / "work" / "operating_points.json").exists()


@pytest.fixture(scope="module")
def copy(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the configs in which 4 iterations stand for 800, with the set of ``data`` as the quickstart's."""
    copy = tmp_path_factory.mktemp("run")
    shutil.copytree(REPOSITORY / "configs", copy / "configs")
    (copy / "tools").symlink_to(REPOSITORY / "tools")
    (copy / "work_dirs/quickstart").mkdir(parents=True)
    (copy / "work_dirs/quickstart/data").symlink_to(data)
    schedule = copy / "configs/_base_/schedules/schedule_tiny_800.py"
    cut = re.sub(r"\b800\b", "4", schedule.read_text())
    schedule.write_text(re.sub(r"T_max=\d+", "T_max=2", re.sub(r"\b80\b", "2", cut)))
    loading = copy / "configs/_base_/datasets/shapes.py"
    loading.write_text(
        re.sub(r"num_workers=\d", "num_workers=0", loading.read_text())
        .replace("persistent_workers=True", "persistent_workers=False")
        .replace("batch_size=16", "batch_size=2")
    )
    for file in (copy / CONFIGS).iterdir():
        if file.suffix in (".py", ".sh"):
            file.write_text(file.read_text().replace("iter_800", "iter_4"))
    return copy


@pytest.fixture(scope="module")
def script(copy: Path) -> subprocess.CompletedProcess[str]:
    """The quickstart's script, run in ``copy``."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", CONFIGS / "run.sh"],
        cwd=copy,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_script_fits_on_two_screens(script: subprocess.CompletedProcess[str]) -> None:
    """Beside progress, the table and what to do next, a newcomer reads nothing: no warnings, no configs."""
    assert script.returncode == 0, script.stderr
    lines = (script.stdout + script.stderr).splitlines()
    assert len(lines) < 80, script.stdout + script.stderr
    assert not [line for line in lines if re.search(r"warn|optim_wrapper|System environment", line, re.IGNORECASE)]
    rows = [line for line in lines if re.match(r" +\d+ +[SL]\d*", line)]
    assert len(rows) == 32


def test_the_script_shows_one_step_after_the_other(script: subprocess.CompletedProcess[str]) -> None:
    assert re.findall(r"^(\d)/7 ", script.stdout, re.MULTILINE) == [str(step) for step in range(1, 8)]
    assert len(re.findall(r"^ +4/4  loss [\d.]+  mIoU .* in ", script.stdout, re.MULTILINE)) == 3


@pytest.mark.usefixtures("script")
def test_the_log_files_have_what_the_console_lacks(copy: Path) -> None:
    for name in ("anchor_s", "anchor_l", "stitched"):
        of_training = min((copy / "work_dirs/quickstart" / name).glob("*/*.log")).read_text()
        for text in ("System environment:", "Config:", "optim_wrapper", "Groups of parameters", "avg_non_ignore"):
            assert text in of_training


def test_the_script_says_where_files_are_and_what_to_type_next(
    script: subprocess.CompletedProcess[str], copy: Path
) -> None:
    where, after = script.stdout.split("Done. In ")[1].split("Next")
    folder = copy / where.partition(":")[0]
    files = [name.rstrip(",") for line in where.splitlines()[1:] for name in re.findall(r"^ +(\S+/?)", line)]
    assert {"pareto.png", "operating_points.json", "stitched/iter_4.pth"} <= set(files)
    assert all((folder / name).exists() for name in files)
    commands = [line.split() for line in after.splitlines() if "tools/" in line]
    assert len(commands) == 4
    for command in commands:
        assert all((copy / word).exists() for word in command if re.search(r"\.(py|pth|json)$", word))
