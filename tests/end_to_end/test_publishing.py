"""A trained model on its way to its users: published, evaluated and fine-tuned from the folder; and checkpoints that
the tools refuse, whether they lack a tensor or bring code along."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsnnet.apis import build_model, load_config
from tests.conftest import RunsCode, Tool

Options = Callable[..., list[str]]
REPOSITORY = Path(__file__).parents[2]
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
STITCHES = "S,L,S2-L6"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the stitched quickstart model, whose heads tell the stitches apart."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = build_model(load_config(STITCHED)).state_dict()
        for tensor in weights.values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.1).abs_()
    moments = {name: tensor.clone() for name, tensor in weights.items()}
    optimizer = {"state": {0: moments}, "param_groups": []}
    torch.save(
        {"state_dict": weights, "optimizer": optimizer, "message_hub": {}, "meta": {"iter": 2, "epoch": 0}}, path
    )
    return path


def figures(points: Path) -> dict[str, Any]:
    """What a file of operating points says of each stitch."""
    return {point["name"]: point["metrics"] for point in json.loads(points.read_text())["stitches"]}


def test_a_published_model_is_the_checkpoint(tool: Tool, quickstart: Options, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tool("misc/publish_model", STITCHED, checkpoint, out, cwd=tmp_path)
    size, published = checkpoint.stat().st_size / 1e6, (out / "model.safetensors").stat().st_size / 1e6
    assert published < 0.6 * size  # half is the optimizer's
    assert f"{checkpoint}: {size:.2f} MB\n" in done.stdout
    assert re.search(rf"{out}/model\.safetensors: {published:.2f} MB, sha256 [0-9a-f]{{64}}$", done.stdout)

    def points(name: str) -> tuple[object, ...]:
        return "--stitches", STITCHES, "--out", tmp_path / f"{name}.json", "--work-dir", tmp_path / name, *quickstart(1)

    # From a folder with nothing in it: the config has no bases, and the checkpoint is not where it was.
    (tmp_path / "elsewhere").mkdir()
    done = tool("test", out / "config.py", out, *points("published"), cwd=tmp_path / "elsewhere")
    tool("test", STITCHED, checkpoint, *points("checkpoint"))
    tool("test", out / "config.py", out / "model.safetensors", *points("file"))
    expected = figures(tmp_path / "checkpoint.json")
    assert list(expected) == STITCHES.split(",") and len({str(found) for found in expected.values()}) > 1
    assert figures(tmp_path / "published.json") == figures(tmp_path / "file.json") == expected

    # Fine-tuning: the file of the weights alone, nothing pretrained, and layers that need no initialisation.
    work = tmp_path / "tuned"
    tool(
        "train", out / "config.py", "--work-dir", work, *quickstart(1, load_from=out, optim_wrapper__optimizer__lr=0.0)
    )
    tuned, given = (
        torch.load(work / "iter_1.pth", weights_only=False)["state_dict"],
        torch.load(checkpoint)["state_dict"],
    )
    parameters = [name for name, _ in build_model(load_config(STITCHED)).named_parameters()]
    assert all(torch.equal(tuned[name], given[name]) for name in parameters)
    assert "StitchInitHook: initialised" not in next(work.rglob("*.log")).read_text()


def test_a_model_is_not_evaluated_with_random_weights(
    tool: Tool, quickstart: Options, checkpoint: Path, tmp_path: Path
) -> None:
    name = "decode_head.conv_seg.bias"
    weights = torch.load(checkpoint)["state_dict"]
    weights[f"{name}es"] = weights.pop(name)
    torch.save({"state_dict": weights}, tmp_path / "wrong.pth")
    out = tmp_path / "points.json"
    said = tool.error(
        "test", STITCHED, tmp_path / "wrong.pth", "--out", out, "--work-dir", tmp_path / "w", *quickstart(1)
    )
    says = rf"missing: {name} \(8,\); left over: {name}es \(8,\)$"
    assert re.search(rf"error: checkpoint '.*wrong\.pth' .*{says}", said)
    assert not out.exists()


@pytest.mark.parametrize("how", ["test", "publish", "resume"])
def test_a_hostile_checkpoint_is_not_run(
    how: str, tool: Tool, quickstart: Options, checkpoint: Path, tmp_path: Path
) -> None:
    mark, path, work = tmp_path / "mark", tmp_path / "hostile.pth", ("--work-dir", tmp_path / "work")
    torch.save({**torch.load(checkpoint), "code": RunsCode(mark)}, path)
    if how == "test":
        said = tool.error("test", STITCHED, path, *work, *quickstart(1))
    elif how == "publish":
        said = tool.error("misc/publish_model", STITCHED, path, tmp_path / "out")
    else:
        nothing = {f"model__backbone__anchors__{index}__pretrained": None for index in (0, 1)}
        said = tool.error("train", STITCHED, "--resume", *work, *quickstart(1, load_from=path, **nothing))
    assert re.search(r"error: .*hostile\.pth.*refused.*could run code", said)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have been


def test_what_is_there_is_not_published_over(tool: Tool, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_text("mine")
    assert re.search(r"error: .*out exists", tool.error("misc/publish_model", STITCHED, checkpoint, tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").read_text() == "mine"
