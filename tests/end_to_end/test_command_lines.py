"""The command lines: what their help names, and what they say to a user's mistake."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmsnnet.apis import build_model, load_config
from tests.conftest import Tool

Options = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]
TOOLS = sorted(str(path.relative_to(REPOSITORY / "tools").with_suffix("")) for path in REPOSITORY.glob("tools/**/*.py"))
SCRIPTS = sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("*/**/*.sh"))
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
# The arguments whose names are fixed, by tool.
ARGUMENTS = {
    "train": ("config", "--work-dir", "--resume", "--amp", "--cfg-options", "--launcher"),
    "test": ("config", "checkpoint", "--stitches", "--out", "--backend"),
    "serve": (
        "FOLDER",
        "--deadline-ms",
        "--policy",
        "--points",
        "--metric",
        "--replicas",
        "--threads",
        "--device",
        "--host",
        "--port",
        "--address",
    ),
    "analysis_tools/benchmark": (
        "config",
        "--checkpoint",
        "--stitches",
        "--out",
        "--shape",
        "--batch-sizes",
        "--precision",
        "--channels-last",
        "--compile",
        "--cuda-graph",
        "--warmup",
        "--repeats",
        "--device",
        "--cfg-options",
    ),
    "analysis_tools/get_flops": ("config", "--shape", "--out"),
    "analysis_tools/plot_pareto": ("FILE.json", "--out", "--metric", "--better", "--cost", "--reference"),
    "analysis_tools/plot_route": ("config", "STITCH", "--out", "--cfg-options"),
    "analysis_tools/select_stitch": ("FILE.json", "--max-gflops", "--max-latency-ms", "--metric", "--out"),
    "deployment/export": ("config", "checkpoint", "STITCHES", "--format", "--out", "--points", "--quantize"),
    "deployment/ort_predict": ("image", "DIR", "--out", "--stitch", "--max-gflops", "--max-latency-ms"),
    "deployment/extract_stitch": ("config", "checkpoint", "STITCH", "--out"),
    "misc/publish_model": ("config", "checkpoint", "OUT", "--points"),
    "dataset_converters/make_shapes": ("OUT", "--layout", "--train", "--val", "--size", "--seed"),
    "model_converters/snnet_to_mmsnnet": ("SRC", "DST", "--family"),
    "model_converters/snnetv2_to_mmsnnet": ("SRC", "DST", "--merged", "--config"),
}

# Stands for a backbone that is none of ours.
PLAIN_CONFIG = """
default_scope = "mmseg"
model = dict(
    type="EncoderDecoder",
    backbone=dict(type="ResNetV1c", depth=18, base_channels=8, norm_cfg=dict(type="BN")),
    decode_head=dict(type="FCNHead", in_channels=64, channels=8, num_classes=8, num_convs=1, norm_cfg=dict(type="BN")),
    test_cfg=dict(mode="whole"),
)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the stitched quickstart model as it is built."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save({"state_dict": build_model(load_config(STITCHED)).state_dict()}, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder to run in."""
    path = tmp_path / "run"
    path.mkdir()
    return path


def is_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """Asserts that a command ended as after a user's mistake: status 2, and one error that says what was wrong."""
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    errors = [line for line in done.stderr.splitlines() if re.search(r"\berror: ", line)]
    assert len(errors) == 1 and re.search(message, errors[0]), said


@pytest.mark.parametrize("name", TOOLS)
def test_help_names_the_arguments(tool: Tool, folder: Path, name: str) -> None:
    done = tool(name, "--help", cwd=folder)
    assert done.stdout.startswith("usage: ")
    missing = [
        argument for argument in ARGUMENTS[name] if not re.search(rf"(?<![\w-]){argument}(?![\w-])", done.stdout)
    ]
    assert missing == []
    assert list(folder.iterdir()) == []


def test_every_tool_is_known() -> None:
    assert set(TOOLS) == set(ARGUMENTS)


@pytest.mark.parametrize("name", ["train", "test", "analysis_tools/get_flops"])
def test_a_missing_config(tool: Tool, checkpoint: Path, folder: Path, name: str) -> None:
    more = [checkpoint] if name == "test" else []
    is_refused(tool.attempt(name, "configs/nowhere.py", *more, cwd=folder), "configs/nowhere.py")
    assert list(folder.iterdir()) == []


def test_a_missing_checkpoint(tool: Tool, folder: Path) -> None:
    is_refused(tool.attempt("test", STITCHED, "nowhere.pth", cwd=folder), "nowhere.pth")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("stitch", ["555", "X9"])
def test_an_unknown_stitch(tool: Tool, checkpoint: Path, quickstart: Options, folder: Path, stitch: str) -> None:
    done = tool.attempt("test", STITCHED, checkpoint, "--stitches", f"0,{stitch}", *quickstart(1), cwd=folder)
    is_refused(done, f"no stitch {stitch!r}" if stitch == "X9" else f"no stitch {stitch}")
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == []


def test_get_flops_wants_a_stitched_backbone(tool: Tool, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "plain.py"
    config.write_text(PLAIN_CONFIG)
    is_refused(
        tool.attempt("analysis_tools/get_flops", config, "--out", "flops.json", cwd=folder), "mmsnnet.StitchedViT"
    )
    assert list(folder.iterdir()) == []


def test_data_parallelism_that_waits_for_what_a_stitch_leaves_out(
    tool: Tool, quickstart: Options, folder: Path
) -> None:
    wrapper = quickstart(1, model_wrapper_cfg__type="MMDistributedDataParallel")
    done = tool.attempt("train", STITCHED, "--launcher", "pytorch", *wrapper, cwd=folder)
    is_refused(done, r"model_wrapper_cfg=dict\(type='mmsnnet\.StitchedDataParallel'\)")
    assert list(folder.iterdir()) == []


def test_a_model_that_cannot_be_built(tool: Tool, quickstart: Options, folder: Path) -> None:
    done = tool.attempt("train", STITCHED, *quickstart(1, model__decode_head__num_conv=1), cwd=folder)
    is_refused(done, r"TypeError: .* unexpected keyword argument 'num_conv' \(.*\.py, line \d+\)")
    assert list(folder.iterdir()) == []


def test_a_missing_pretrained_file_is_named(tool: Tool, quickstart: Options, tmp_path: Path) -> None:
    pretrained = {f"model.backbone.anchors.{index}.pretrained": "nowhere.pth" for index in (0, 1)}
    is_refused(
        tool.attempt("train", STITCHED, "--work-dir", tmp_path / "work", *quickstart(1, **pretrained)), "nowhere.pth"
    )
    assert not list(tmp_path.rglob("*.pth"))


def test_training_without_the_init_hook_names_it(tool: Tool, quickstart: Options, tmp_path: Path) -> None:
    pretrained = {f"model.backbone.anchors.{index}.pretrained": None for index in (0, 1)}
    options = quickstart(1, custom_hooks=[], **pretrained)
    done = tool.attempt("train", STITCHED, "--work-dir", tmp_path / "work", *options)
    assert done.returncode != 0
    assert "mmsnnet.StitchInitHook" in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_well_formed(script: str) -> None:
    done = subprocess.run(["bash", "-n", REPOSITORY / script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_scripts_are_found() -> None:
    assert {"configs/quickstart/run.sh", "tools/dist_train.sh", "tools/dist_test.sh"} <= set(SCRIPTS)


def test_the_quickstart_runs_tools_and_configs_that_exist_from_anywhere(folder: Path, tmp_path: Path) -> None:
    """With a stand-in for Python that notes what it is called with."""
    python, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PWD" "$@" >> {calls}\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    script = REPOSITORY / "configs/quickstart/run.sh"
    done = subprocess.run(["bash", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in calls.read_text().splitlines()]
    tools = ["make_shapes", *["train"] * 3, "test", "plot_pareto", "publish_model"]
    assert [Path(line[1]).stem for line in lines] == tools
    assert {line[0] for line in lines} == {str(folder)}
    sources = [word for line in lines for word in line[1:] if word.endswith(".py")]
    assert len(sources) == 12 and [name for name in sources if not Path(name).is_file()] == []
    outputs = [word for line in lines for word in line[1:] if "work_dirs" in word]
    heads = [word for word in outputs if word.startswith("model.")]  # which begin with the large anchor's weights
    assert len(outputs) == 10 and len(heads) == 2
    assert all(word.rpartition("=")[2].startswith("work_dirs/quickstart/") for word in outputs)
