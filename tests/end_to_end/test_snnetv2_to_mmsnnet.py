"""The converter of released checkpoints, run as a user runs it."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.conftest import Tool
from tests.converters.published_snnetv2 import Published, released_weights

CONVERTER = "model_converters/snnetv2_to_mmsnnet"
MODEL = Published(depths=(2, 4), widths=(16, 24), heads=(2, 3), grid=(2, 2), rank=3)


def test_a_released_checkpoint_is_converted(tool: Tool, tmp_path: Path) -> None:
    weights = released_weights(MODEL)
    torch.save({"state_dict": weights, "meta": {}}, tmp_path / "released.pth")
    there = tool(CONVERTER, "released.pth", "ours.safetensors", cwd=tmp_path)
    assert (there.returncode, there.stderr) == (0, "")
    # 6 blocks with a table and an index each, 2 layers to the large anchor. Long rows are folded.
    rows = [line.split() for line in there.stdout.splitlines()]
    gamma = ["backbone.anchors.{a}.layers.{i}.gamma_1", "backbone.network.anchors.{a}.model.blocks.{i}.ls1.gamma", "6"]
    layer = ["backbone.stitch_layers.0.{i}.transform.bias", "backbone.network.layers.0_{j}-1_{k}.bias", "2"]
    index = ["backbone.anchors.{a}.layers.{i}.attn.relative_position_index", "(dropped)", "6"]
    assert [row for row in (gamma, layer, index, ["(added)", "backbone.draws", "1"]) if row not in rows] == []
    assert there.stdout.splitlines()[-2:] == [
        "segmentation, 2 anchors: depths 2 and 4, widths 16 and 24, rank 3, 2 x 2 patches, with relative position bias",
        "written to ours.safetensors",
    ]
    # Without six indices; with the draws and the grids of two anchors.
    assert len(load_file(tmp_path / "ours.safetensors")) == len(weights) - 6 + 3


def test_a_mistake_ends_with_one_line_and_writes_nothing(tool: Tool, tmp_path: Path) -> None:
    weights = released_weights(MODEL)
    weights["backbone.anchors.0.layers.1.gamma"] = weights.pop("backbone.anchors.0.layers.1.gamma_1")
    torch.save({"state_dict": weights}, tmp_path / "released.pth")
    (tmp_path / "ours.pth").write_bytes(b"old")
    done = tool.attempt(CONVERTER, "released.pth", "ours.pth", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if re.search(r"\berror: ", line)]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert errors[0].endswith(
        "error: checkpoint 'released.pth': missing: backbone.anchors.0.layers.1.gamma_1 (16,); "
        "left over: backbone.anchors.0.layers.1.gamma (16,)"
    )
    assert (tmp_path / "ours.pth").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"released.pth", "ours.pth"}
