"""The weights of a checkpoint are compared with the model before they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import get_state_dict, load_checkpoint
from timm.layers import resample_abs_pos_embed
from torch import nn

from mmsnnet.errors import DataError
from mmsnnet.models import StitchedBackbone, check_weights, model_weights, read_weights
from mmsnnet.stitching.anchors.attention import resize_table
from tests.models.toy_run import Toy, same

MakeBackbone = Callable[..., StitchedBackbone]


@pytest.mark.parametrize("wrap", ["model", "state_dict in state_dict"])
def test_where_a_runner_would_find_no_weights(wrap: str, tmp_path: Path) -> None:
    """What a model is used with has its weights where mmengine's runner looks: it would load none, and say little."""
    weights = Toy().state_dict()
    content = {"model": weights} if wrap == "model" else {"state_dict": {"model": weights}}
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"^checkpoint '\S+odd\.pth' should have .* under 'state_dict'.* has model\."):
        read_weights(Toy(), tmp_path / "odd.pth")
    torch.save({"state_dict": weights}, tmp_path / "odd.pth")
    assert same(read_weights(Toy(), tmp_path / "odd.pth"), dict(weights))


def changed(weights: dict[str, Any], how: str) -> tuple[dict[str, Any], str]:
    """Weights of a backbone with one thing wrong, and what has to be said of it."""
    name = "network.anchors.1.model.blocks.2.mlp.fc1.bias"
    weights = dict(weights)
    tensor = weights.pop(name)
    if how == "missing":
        return weights, rf"missing: {name} \(192,\)$"
    if how == "renamed":
        return {**weights, name + "es": tensor}, rf"missing: {name} \(192,\); left over: {name}es \(192,\)$"
    if how == "shape":
        return {**weights, name: tensor[1:]}, rf"of another shape: {name} \(191,\) instead of \(192,\)$"
    return {**weights, name: tensor, "more": torch.zeros(2, 3)}, r"left over: more \(2, 3\)$"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["missing", "renamed", "shape", "more"])
@pytest.mark.parametrize("wrap", [False, True])
def test_what_does_not_fit_is_listed(how: str, wrap: bool, make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    weights, says = changed(backbone.state_dict(), how)
    with pytest.raises(ValueError, match=rf"^checkpoint 'a\.pth' .*{says}"):
        check_weights(backbone, {"state_dict": weights} if wrap else weights, "a.pth")


def test_long_lists_are_cut(make_backbone: MakeBackbone) -> None:
    backbone = make_backbone()
    count = len(backbone.state_dict()) - 3  # without draws and the grids of two anchors
    with pytest.raises(ValueError) as raised:
        check_weights(backbone, {"a": torch.zeros(1)}, "a.pth")
    missing, left_over = str(raised.value).split("missing: ")[1].split("; left over: ")
    assert missing.endswith(f" and {count - 20} more") and missing.count("network.") == 20
    assert left_over == "a (1,)"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_model_with_nan_is_not_evaluated(value: float, make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """In one line that names the file and the tensor. Infinity that the model itself has, in a mask, is no fault."""
    backbone = make_backbone()
    name = "network.anchors.1.model.blocks.2.mlp.fc1.bias"
    weights = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    weights[name][7] = value
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    with pytest.raises(DataError, match=rf"a\.pth' has NaN or infinity in {name}\. The run") as raised:
        read_weights(backbone, tmp_path / "a.pth")
    assert "\n" not in str(raised.value)
    backbone.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_weights(backbone, backbone.state_dict(), "a.pth")


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_fits(prefix: str, draws: bool, wrapped: bool, make_backbone: MakeBackbone) -> None:
    """As mmengine would load it: with what DistributedDataParallel puts before names, with and without the draws."""
    backbone = make_backbone()
    weights = {prefix + name: tensor for name, tensor in backbone.state_dict().items() if draws or name != "draws"}
    model = nn.DataParallel(backbone) if wrapped else backbone
    check_weights(model, {"state_dict": weights}, "a.pth")
    assert set(model_weights({"state_dict": weights}, "a.pth")) | {"draws"} == set(backbone.state_dict())


def other_size(make_backbone: MakeBackbone) -> tuple[StitchedBackbone, StitchedBackbone]:
    """Two backbones with position biases, for 4 x 2 patches and for 2 x 4."""
    bias = dict(rel_pos_bias=True)
    one, other = (make_backbone(small=bias, large=bias, img_size=size) for size in ((64, 32), (32, 64)))
    return one, other


def is_resampled(found: StitchedBackbone, source: StitchedBackbone) -> None:
    for own, other in zip(found.network.anchors, source.network.anchors, strict=True):
        expected = resample_abs_pos_embed(other.model.pos_embed, [2, 4], [4, 2], num_prefix_tokens=1)
        torch.testing.assert_close(own.model.pos_embed.data, expected.data)
        for block, theirs in zip(own.model.blocks, other.model.blocks, strict=True):
            expected = resize_table(theirs.attn.relative_position_bias_table, (4, 2), (2, 4))
            torch.testing.assert_close(block.attn.relative_position_bias_table.data, expected.data)


@pytest.mark.parametrize("way", ["load_checkpoint", "init_cfg", "strict"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_checkpoint_of_another_image_size(
    way: str, parallel: bool, make_backbone: MakeBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resampled and said, whatever loads it; with the names of mmengine's own state dict, as the runner saves them."""
    source, backbone = other_size(make_backbone)
    weights = get_state_dict(source)
    assert weights["network.anchors.0.grid"].tolist() == [4, 2]
    path, at = tmp_path / "w.pth", "module." if parallel else ""
    torch.save({"state_dict": {f"{at}{key}": value for key, value in weights.items()}, "meta": {}}, path)
    if way == "load_checkpoint":
        load_checkpoint(backbone, str(path), strict=True)
    elif way == "init_cfg":
        backbone.init_cfg = dict(type="Pretrained", checkpoint=str(path))
        backbone.init_weights()
    else:
        backbone.load_state_dict(read_weights(backbone, path), strict=True)
    is_resampled(backbone, source)
    said = [record.getMessage() for record in caplog.records if record.name == "mmsnnet"]
    assert [text.split(":")[0] for text in said] == ["network.anchors.0", "network.anchors.1"]


def test_another_size_fits_where_the_grid_is_recorded(make_backbone: MakeBackbone) -> None:
    source, backbone = other_size(make_backbone)
    check_weights(backbone, source.state_dict(), "w.pth")
    square = make_backbone(img_size=64, small=dict(rel_pos_bias=True), large=dict(rel_pos_bias=True))
    weights = source.state_dict()
    check_weights(square, weights, "w.pth")
    del weights["network.anchors.1.grid"]
    with pytest.raises(ValueError, match=r"of another shape: network\.anchors\.1\.model\.pos_embed") as caught:
        check_weights(square, weights, "w.pth")
    assert "anchors.0" not in str(caught.value) and "missing" not in str(caught.value)
    # No other tensor may be of another size.
    weights = source.state_dict()
    weights["network.anchors.1.model.cls_token"] = torch.zeros(1, 1, 7)
    with pytest.raises(ValueError, match=r"of another shape: network\.anchors\.1\.model\.cls_token \(1, 1, 7\)"):
        check_weights(square, weights, "w.pth")
    # Nor is a grid let pass that the tensors contradict, or that is none.
    with pytest.raises(ValueError, match=r"another shape: network\.anchors\.0\.model\.pos_embed"):
        check_weights(square, source.state_dict() | {"network.anchors.0.grid": torch.tensor([3, 3])}, "w.pth")
    with pytest.raises(ValueError, match=r"left over: network\.anchors\.0\.grid \(1,\)"):
        check_weights(backbone, source.state_dict() | {"network.anchors.0.grid": torch.tensor([3])}, "w.pth")


def test_averaged_weights_are_of_a_grid_too(make_backbone: MakeBackbone) -> None:
    source, backbone = other_size(make_backbone)
    averages = [ExponentialMovingAverage(model, update_buffers=True) for model in (source, backbone)]
    averages[0].update_parameters(source)
    averages[1].load_state_dict(averages[0].state_dict(), strict=True)
    is_resampled(averages[1].module, source)
