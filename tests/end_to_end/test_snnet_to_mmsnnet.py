"""The converter of SN-Net's released checkpoints, run as a user runs it, at full size."""

import re
from pathlib import Path

import pytest
import timm
import torch

from mmsnnet.apis import build_model, load_config
from tests.conftest import Tool
from tests.converters.published_snnet import FAMILIES, Weights, create_models, released_weights

CONVERTER = "model_converters/snnet_to_mmsnnet"
CONFIG = Path(__file__).parents[2] / "configs/imagenet/stitched-levit-192-256_8xb128-100e_imagenet-224x224.py"
LEVIT = FAMILIES["levit"]._replace(anchors=(dict(model="levit_192"), dict(model="levit_256")), size=224)


@pytest.fixture(scope="module")
def released() -> tuple[list[timm.models.levit.Levit], Weights]:
    models = create_models(LEVIT)
    return models, released_weights(LEVIT, models)


def test_a_converted_checkpoint_is_one_of_its_config(
    released: tuple[list[timm.models.levit.Levit], Weights], tool: Tool, tmp_path: Path
) -> None:
    models, weights = released
    torch.save({"model": weights, "epoch": 99}, tmp_path / "released.pth")
    there = tool(CONVERTER, "released.pth", "ours.safetensors", "--family", "levit", cwd=tmp_path)
    assert (there.returncode, there.stderr) == (0, "")
    rows = [line.split() for line in there.stdout.splitlines()]
    tensors = len(models[0].state_dict())
    assert ["anchors.0.*", "backbone.network.anchors.0.model.*", f"{tensors}"] in rows
    assert ["stitch_layers.1.0.*", "backbone.network.layers.0_{j}-1_{k}.*", "6"] in rows
    assert ["*.attention_bias_idxs*", "(dropped)", "28"] in rows
    assert there.stdout.splitlines()[-1] == "written to ours.safetensors"
    model = build_model(load_config(CONFIG), tmp_path / "ours.safetensors")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for stitch, timms in zip(model.backbone.space.anchors, models, strict=True):
            model.backbone.set_stitch(stitch)
            assert torch.equal(model(images), timms(images))


def test_a_mistake_ends_with_one_line_and_writes_nothing(tool: Tool, tmp_path: Path) -> None:
    weights = {
        "anchors.0.layer1.0.conv1.weight": torch.zeros(2),
        "anchors.1.layers.0.blocks.0.norm1.bias": torch.zeros(2),
    }
    torch.save({"state_dict": weights}, tmp_path / "released.pth")
    (tmp_path / "ours.pth").write_bytes(b"old")
    done = tool.attempt(CONVERTER, "released.pth", "ours.pth", "--family", "resnet", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    errors = [line for line in done.stderr.splitlines() if re.search(r"\berror: ", line)]
    assert len(errors) == 1 and "Traceback" not in done.stderr
    assert errors[0].endswith(
        "error: checkpoint 'released.pth': its names are those of the family resnet_swin, not of resnet: set --family "
        "resnet_swin"
    )
    assert (tmp_path / "ours.pth").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"released.pth", "ours.pth"}
