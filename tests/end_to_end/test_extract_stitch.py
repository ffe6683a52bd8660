"""One stitch cut out of a trained model: evaluated, counted and fine-tuned from its folder, by the ordinary tools."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmsnnet.apis import build_model, load_config
from tests.conftest import Tool

Options = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the stitched quickstart model with weights of its own."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = build_model(load_config(STITCHED)).state_dict()
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1).abs_()
    torch.save({"state_dict": weights, "meta": {"iter": 2, "epoch": 0}}, path)
    return path


def test_an_extracted_stitch_is_a_model_like_any_other(
    tool: Tool,
    quickstart: Options,
    checkpoint: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "one"
    done = tool("deployment/extract_stitch", STITCHED, checkpoint, "L3-S2-L6", "--out", out, cwd=tmp_path)
    sizes = [path.stat().st_size / 1e6 for path in (checkpoint, out / "model.safetensors")]
    assert f"{checkpoint}: {sizes[0]:.2f} MB\n" in done.stdout
    assert re.search(rf"{out}/model\.safetensors: {sizes[1]:.2f} MB, sha256 [0-9a-f]{{64}}$", done.stdout)

    # From a folder with nothing in it: the metrics and the cost of the stitch in the whole model, to the last digit
    # that merging leaves.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    points = ("--out", tmp_path / "one.json", "--work-dir", tmp_path / "test_one", *quickstart(1))
    tool("test", out / "config.py", out, *points, cwd=elsewhere)
    points = ("--out", tmp_path / "whole.json", "--work-dir", tmp_path / "test_whole", *quickstart(1))
    tool("test", STITCHED, checkpoint, "--stitches", "L3-S2-L6", *points)
    [found], [expected] = (json.loads((tmp_path / f"{name}.json").read_text())["stitches"] for name in ("one", "whole"))
    assert found["metrics"] == pytest.approx(expected["metrics"], abs=0.1)
    assert expected["metrics"]["mIoU"] > 0
    assert found | {"metrics": None} == expected | {"metrics": None}
    tool("analysis_tools/get_flops", out / "config.py", "--out", tmp_path / "flops.json", cwd=elsewhere)
    [counted] = json.loads((tmp_path / "flops.json").read_text())["stitches"]
    assert (counted["flops"], counted["params"]) == (expected["flops"], expected["params"])

    # Fine-tuning with the whole model as teacher, validation included: every weight is trained, and none initialised.
    work, teacher = tmp_path / "tuned", dict(config=STITCHED, checkpoint=checkpoint)
    distill = {f"train_cfg__distill__teacher__{key}": path for key, path in teacher.items()}
    settings = quickstart(1, load_from=out, train_cfg__distill__outputs=1.0, **distill)
    tool("train", out / "config.py", "--work-dir", work, *settings, cwd=elsewhere)
    tuned, given = (
        torch.load(work / "iter_1.pth", weights_only=False)["state_dict"],
        load_file(out / "model.safetensors"),
    )
    assert [name for name in given if name not in tuned] == []
    assert torch.equal(tuned["backbone.draws"], torch.tensor(1))
    same = [name for name, tensor in given.items() if torch.equal(tuned[name], tensor)]
    assert same == [name for name in given if name.endswith(".grid")]  # which no training moves
    log = next(work.rglob("*.log")).read_text()
    assert "StitchInitHook: initialised" not in log and "L3-S2-L6/mIoU" in log
    assert float(re.search(r"distill\.loss_outputs: (\S+)", log)[1]) > 0


def test_a_stitch_with_statistics_of_its_own(
    tool: Tool, quickstart: Options, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Extracted with them, it has the figures that the whole model has with them."""
    out, options = tmp_path / "one", quickstart(1)
    name, recalibrate = "L3-S2-L6", ("--recalibrate", 5)
    data_root = ("--cfg-options", f"data_root={data}", "train_dataloader.batch_size=2")
    tool("deployment/extract_stitch", STITCHED, checkpoint, name, "--out", out, *recalibrate, *data_root, cwd=tmp_path)
    tool("test", out / "config.py", out, "--out", tmp_path / "one.json", *options, cwd=tmp_path)
    points = ("--stitches", name, "--out", tmp_path / "whole.json", *options)
    tool("test", STITCHED, checkpoint, *recalibrate, *points, cwd=tmp_path)
    found, expected = (json.loads((tmp_path / f"{file}.json").read_text()) for file in ("one", "whole"))
    assert expected["recalibrated"] == 5 and "recalibrated" not in found
    assert found["stitches"][0]["metrics"] == pytest.approx(expected["stitches"][0]["metrics"], abs=0.1)
    said = tool.error("test", STITCHED, checkpoint, "--recalibrate", 9, *points, cwd=tmp_path)
    assert "error: recalibrate=9, but the training set has 8 images: take fewer" in said


@pytest.mark.parametrize(
    ("stitch", "source", "out", "says"),
    [
        ("S4-L11", "model.pth", "out", "no stitch 'S4-L11' in this space of 32"),
        ("S", "nowhere.pth", "out", "nowhere.pth"),
        ("S", "without.pth", "out", r"missing: backbone\.network\.layers\.0_0-1_2\.weight"),
        ("S", "model.pth", ".", "exists: set the output to a new folder, or to an empty one"),
    ],
)
def test_mistakes_are_said_in_one_line(
    stitch: str, source: str, out: str, says: str, tool: Tool, checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / source
    if source != "nowhere.pth":
        weights = torch.load(checkpoint)["state_dict"]
        if source == "without.pth":
            weights = {name: tensor for name, tensor in weights.items() if ".layers." not in name}
        torch.save({"state_dict": weights}, path)
    before = sorted(tmp_path.rglob("*"))
    said = tool.error("deployment/extract_stitch", STITCHED, path, stitch, "--out", tmp_path / out)
    assert re.search(rf"error: .*{says}", said)
    assert sorted(tmp_path.rglob("*")) == before
