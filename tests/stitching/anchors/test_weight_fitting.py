"""Weights fitted to an anchor: stems of another number of channels, and values that are no numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch

from mmsnnet.errors import DataError
from mmsnnet.stitching import Anchor, StitchedNetwork, StitchSpace, create_anchor, load_pretrained

MakeAnchor = Callable[..., Anchor]

SIZES = dict(embed_dim=32, depth=2, num_heads=2)
PATCHES = "patch_embed.proj.weight"
# Of each class that is adapted, with timm's names and with OpenAI's.
FAMILIES = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_clip_224"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("model", FAMILIES)
def test_stems_are_adapted_as_timm_does(model: str, channels: int, tmp_path: Path) -> None:
    path = str(tmp_path / "rgb.pth")
    sizes = dict(SIZES, img_size=32, patch_size=8)
    torch.save(timm.create_model(model, **sizes).state_dict(), path)
    overlay = dict(file=path, num_classes=timm.get_pretrained_cfg(model).num_classes)
    timms = timm.create_model(model, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    anchor = create_anchor(model, 32, in_chans=channels, patch_size=8, **SIZES)
    report = load_pretrained(anchor, path)
    assert anchor.model.patch_embed.proj.weight.shape == (32, channels, 8, 8)
    assert torch.equal(anchor.model.patch_embed.proj.weight, timms.patch_embed.proj.weight)
    assert report.adapted == (None if channels == 3 else (3, channels)) and not report.resized
    assert (f"the first convolution adapted from 3 to {channels} channels" in str(report)) == (channels != 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_and_patches_at_once(channels: int, tmp_path: Path) -> None:
    path, model = str(tmp_path / "rgb.pth"), "vit_tiny_patch16_224"
    torch.save(timm.create_model(model, img_size=64, patch_size=16, **SIZES).state_dict(), path)
    overlay = dict(file=path, num_classes=1000)
    sizes = dict(SIZES, img_size=32, patch_size=8)
    timms = timm.create_model(model, in_chans=channels, pretrained=True, pretrained_cfg_overlay=overlay, **sizes)
    anchor = create_anchor(model, 32, in_chans=channels, patch_size=8, **SIZES)
    report = load_pretrained(anchor, path)
    torch.testing.assert_close(anchor.model.patch_embed.proj.weight, timms.patch_embed.proj.weight)
    assert report.adapted == (3, channels) and report.resized == (PATCHES,)


@pytest.mark.parametrize("channels", [1, 4])
def test_a_one_anchor_checkpoint_is_adapted_too(channels: int, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    source, anchor = make_anchor(img_size=(32, 64)), make_anchor(img_size=(32, 64), in_chans=channels)
    network = StitchedNetwork([source], StitchSpace.single(2))
    torch.save({f"backbone.network.{k}": v for k, v in network.state_dict().items()}, tmp_path / "w.pth")
    assert load_pretrained(anchor, tmp_path / "w.pth").adapted == (3, channels)
    colours = source.model.patch_embed.proj.weight
    red = colours.sum(dim=1) if channels == 1 else colours[:, 0] * 3 / 4
    torch.testing.assert_close(anchor.model.patch_embed.proj.weight[:, 0], red)
    assert torch.equal(anchor.model.patch_embed.proj.bias, source.model.patch_embed.proj.bias)


@pytest.mark.parametrize(("channels", "wanted"), [(4, 3), (1, 3), (4, 6), (6, 1), (2, 4)])
def test_only_three_channels_are_adapted(channels: int, wanted: int, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """timm refuses other numbers or reinitialises the stem; ours is an error that names the setting."""
    torch.save(make_anchor(in_chans=channels).model.state_dict(), tmp_path / "w.pth")
    anchor = make_anchor(in_chans=wanted)
    before = anchor.model.patch_embed.proj.weight.clone()
    with pytest.raises(DataError, match=rf"images of {channels} channels.*set in_chans={channels} in the anchor"):
        load_pretrained(anchor, tmp_path / "w.pth")
    assert torch.equal(anchor.model.patch_embed.proj.weight, before)
    same = make_anchor(in_chans=channels)
    assert load_pretrained(same, tmp_path / "w.pth").adapted is None


# Values that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["cls_token", "blocks.1.mlp.fc2.bias", PATCHES, "pos_embed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_nan_is_loaded(value: float, name: str, dtype: torch.dtype, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in make_anchor().model.state_dict().items()}
    weights[name].view(-1)[-1] = value
    torch.save({"model": weights}, tmp_path / "w.pth")
    anchor = make_anchor()
    before = {key: tensor.clone() for key, tensor in anchor.state_dict().items()}
    with pytest.raises(DataError, match=rf"w\.pth' has NaN or infinity in {name}\. The run") as caught:
        load_pretrained(anchor, tmp_path / "w.pth")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in anchor.state_dict().items())


def test_a_file_full_of_nan(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """The message names the first tensors. NaN compares as equal, so two copies count as one model."""
    weights = {key: torch.full_like(tensor, float("nan")) for key, tensor in make_anchor().model.state_dict().items()}
    torch.save({"model": weights, "ema": {key: tensor.clone() for key, tensor in weights.items()}}, tmp_path / "w.pth")
    with pytest.raises(DataError, match=r"NaN or infinity in cls_token, pos_embed, \S+, \S+, \S+ and \d+ more\."):
        load_pretrained(make_anchor(), tmp_path / "w.pth")


def test_nan_in_what_is_not_loaded(make_anchor: MakeAnchor, tmp_path: Path) -> None:
    """A classifier may have NaN if the anchor does not keep it."""
    weights = make_anchor(classifier=True).model.state_dict()
    weights["head.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "w.pth")
    assert "head.bias" in load_pretrained(make_anchor(), tmp_path / "w.pth").left_out
    with pytest.raises(DataError, match=r"infinity in head\.bias"):
        load_pretrained(make_anchor(classifier=True), tmp_path / "w.pth")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_eight_bits_are_looked_at_too(dtype: torch.dtype, make_anchor: MakeAnchor, tmp_path: Path) -> None:
    weights = {key: tensor.to(dtype) for key, tensor in make_anchor().model.state_dict().items()}
    weights["cls_token"] = torch.full_like(weights["cls_token"], float("nan"), dtype=torch.float32).to(dtype)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(DataError, match="infinity in cls_token"):
        load_pretrained(make_anchor(), tmp_path / "w.pth")
