from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.apis import build_model, build_space, load_config
from mmsnnet.apis.model import check_channels

MakeImages = Callable[..., Tensor]
REPOSITORY = Path(__file__).parents[2]
STITCHED = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


@pytest.fixture
def config() -> Config:
    """The stitched quickstart model. The files of its anchors do not exist."""
    nowhere = {f"model.backbone.anchors.{index}.pretrained": "nowhere.pth" for index in (0, 1)}
    return load_config(STITCHED, nowhere)


@torch.no_grad()
def logits(model: BaseModel, images: Tensor) -> Tensor:
    return model(images, mode="tensor")


def test_the_model_is_in_evaluation_mode_and_reads_no_anchors(config: Config) -> None:
    model = build_model(config)
    assert type(model).__name__ == "EncoderDecoder" and type(model.backbone).__name__ == "StitchedBackbone"
    assert [name for name, module in model.named_modules() if module.training] == []
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_the_first_stitch_is_the_largest_anchor(config: Config, make_images: MakeImages) -> None:
    model, images = build_model(config), make_images(2, 64, 64)
    assert model.backbone.stitch.name == "L"
    seen: dict[str, Tensor] = {}
    for key, name in ((1, "L"), ("S", "S"), (0, "S"), ("S2-L6", "S2-L6"), ("L", "L")):
        model.backbone.set_stitch(key)
        assert model.backbone.stitch.name == name
        output = logits(model, images)
        assert output.shape[:2] == (2, 8) and torch.equal(seen.setdefault(name, output), output)
    assert not any(torch.equal(seen[a], seen[b]) for a, b in (("S", "L"), ("S", "S2-L6"), ("L", "S2-L6")))


def test_the_checkpoint_is_loaded(
    config: Config, make_images: MakeImages, randomise: Callable[[nn.Module], None], tmp_path: Path
) -> None:
    saved, path, images = build_model(config), tmp_path / "model.pth", make_images(1, 64, 64)
    randomise(saved)
    torch.save({"state_dict": saved.state_dict()}, path)
    loaded, fresh = build_model(config, str(path)), build_model(config)
    state = saved.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert not any(module.training for module in loaded.modules())
    for stitch in ("S", "L", "S2-L6"):
        for model in (saved, loaded, fresh):
            model.backbone.set_stitch(stitch)
        assert torch.equal(logits(loaded, images), logits(saved, images))
        assert not torch.equal(logits(fresh, images), logits(saved, images))


def test_the_model_is_put_on_the_device(config: Config) -> None:
    model = build_model(config, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_missing_checkpoint_is_named(config: Config) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        build_model(config, "nowhere.pth")


def test_the_space_is_built_without_weights(config: Config) -> None:
    assert len(build_space(config)) == 32


@pytest.mark.parametrize("reader", ["decode_head", "auxiliary_head", "neck"])
def test_a_head_or_neck_of_another_width_is_named(reader: str, config: Config) -> None:
    if reader == "neck":
        config.model.neck = dict(type="MultiLevelNeck", in_channels=[128, 64], out_channels=64, scales=[1, 1])
        config.model.decode_head.in_channels = 64  # of the neck's making
    else:
        config.model[reader].in_channels = 64
    with pytest.raises(ValueError, match=rf"model\.{reader}\.in_channels is .*64.* maps have 128 channels"):
        build_space(config)


def test_a_model_without_a_stitched_backbone_has_no_channels_to_check(config: Config) -> None:
    check_channels(config, nn.Linear(2, 2))
