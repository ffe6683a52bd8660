"""Backbones of hierarchical anchors: stages as taps, channels of each map, shared prefixes, one stitch alone."""

from typing import Any

import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmsnnet.apis.model import check_channels
from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS

PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = dict(
    swin=(
        dict(model="swin_tiny_patch4_window7_224", embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
        dict(model="swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8)),
    ),
    resnet=(
        dict(model="resnet18", layers=(1, 1, 2, 1), channels=(16, 24, 32, 40)),
        dict(model="resnet18", layers=(2, 2, 3, 2), channels=(24, 48, 96, 192)),
    ),
    resnet_swin=(
        dict(model="resnet18", layers=(1, 1, 2, 1), channels=(16, 24, 32, 40)),
        dict(model="swin_tiny_patch4_window7_224", embed_dim=24, depths=(2, 2, 3, 2), num_heads=(1, 2, 4, 8)),
    ),
)
CHANNELS = (24, 48, 96, 192)


def make(pair: str, img_size: Any = 64, **settings: Any) -> StitchedBackbone:
    torch.manual_seed(0)
    anchors = [dict(anchor) for anchor in PAIRS[pair]]
    backbone = MODELS.build(
        dict(type="mmsnnet.StitchedViT", anchors=anchors, img_size=img_size, rank=2, flops_step=1e5, **settings)
    )
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
        if layer.rank:
            nn.init.normal_(layer.lora_B)
    return backbone.eval()


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_maps_are_those_of_stages_in_the_widths_of_the_largest_anchor(pair: str) -> None:
    backbone = make(pair, (64, 96))
    assert backbone.channels == CHANNELS and backbone.out_indices == (1, 3, 6, 8)
    x = torch.randn(2, 3, 64, 96)
    for stitch in backbone.space:
        backbone.set_stitch(stitch)
        maps = backbone(x)
        assert [tuple(m.shape) for m in maps] == [(2, c, 16 >> i, 24 >> i) for i, c in enumerate(CHANNELS)]
        assert maps.class_tokens is None and all(m.is_contiguous() for m in maps)
    assert [m.shape for m in backbone.zeros(x)] == [m.shape for m in maps]
    costs = backbone.costs()
    assert costs[0].flops < costs[1].flops and len(costs) == len(backbone.space)


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_shared_prefixes_change_nothing(pair: str) -> None:
    backbone, x = make(pair, out_indices=(1, 3)), torch.randn(2, 3, 64, 64)
    order, alone = backbone.prefix_order(backbone.space), {}
    for stitch in order:
        backbone.set_stitch(stitch)
        alone[stitch.id] = backbone(x)
    with backbone.reuse_prefixes(order):
        for stitch in order:
            backbone.set_stitch(stitch)
            assert all(map(torch.equal, backbone(x), alone[stitch.id]))


@pytest.mark.parametrize("pair", PAIRS)
@torch.no_grad()
def test_one_stitch_alone_is_that_of_the_whole(pair: str) -> None:
    backbone, x = make(pair, out_indices=dict(train=(2, 3), test=(3,))), torch.randn(2, 3, 64, 64)
    for stitch in backbone.space.stitches[2::5]:
        backbone.set_stitch(stitch)
        alone = make(pair, out_indices=dict(train=(2, 3), test=(3,)), only=stitch.name)
        weights = backbone.state_dict()
        alone.load_state_dict({name: weights[name] for name in alone.state_dict()})
        skipped, expected = backbone(x)
        assert skipped is None and torch.equal(alone(x)[1], expected)
    assert backbone.taps.as_setting(backbone.taps.places) == (2, 3)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_training_step_reaches_what_the_drawn_stitch_uses(pair: str) -> None:
    backbone = make(pair).train()
    sum(one.square().mean() for one in backbone(torch.randn(2, 3, 64, 64))).backward()
    reached = {p for p in backbone.parameters() if p.grad is not None}
    used = set(backbone.trained_parameters(backbone.drawn))
    # The bias of a convolution before a batch norm has a gradient, too, of zero.
    assert reached == used


def test_sizes_at_which_two_classes_round_differently_are_refused() -> None:
    small, large = PAIRS["resnet"][0], dict(model="convnext_tiny", dims=CHANNELS, depths=(2, 2, 3, 2))
    backbone = MODELS.build(dict(type="mmsnnet.StitchedViT", anchors=[small, large], img_size=64)).eval()
    for layer in backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    with torch.no_grad():
        assert [m.shape[-1] for m in backbone(torch.zeros(1, 3, 64, 96))] == [24, 12, 6, 3]
        with pytest.raises(
            SettingError, match=r"images of 64 x 90: what leaves block 0 of anchor 0.* are maps of 16 x 23 and 16 x 22"
        ):
            backbone(torch.zeros(1, 3, 64, 90))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(out_indices=(4,)), r"out_indices are stages of the largest anchor, 0 to 3; got \[4\]"),
        (dict(out_indices=()), "at least one stage"),
        (dict(scheme="one_way", skip_stages=(1,)), "only scheme='sliding_window' skips stages"),
        (dict(anchors=[PAIRS["swin"][0], dict(model="vit_tiny_patch16_224", depth=12)]), "stages do not correspond"),
        (dict(anchors=[PAIRS["swin"][0], dict(PAIRS["swin"][1], patch_size=8)]), "agree in strides"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MODELS.build(dict(type="mmsnnet.StitchedViT", anchors=list(PAIRS["swin"]), img_size=64) | settings)


@pytest.mark.parametrize(
    ("reader", "setting", "fits"),
    [
        ("decode_head", dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3]), True),
        ("decode_head", dict(in_channels=192, in_index=3), True),
        ("decode_head", dict(in_channels=192), True),
        ("decode_head", dict(in_channels=list(CHANNELS)), True),
        ("decode_head", dict(in_channels=96), False),
        ("decode_head", dict(in_channels=[16, 48, 96, 192], in_index=[0, 1, 2, 3]), False),
        ("decode_head", dict(in_channels=192, in_index=4), False),
        ("auxiliary_head", dict(in_channels=96, in_index=2), True),
        ("auxiliary_head", dict(in_channels=192, in_index=2), False),
        ("neck", dict(in_channels=list(CHANNELS)), True),
        ("neck", dict(in_channels=list(CHANNELS[1:])), False),
        ("neck", dict(in_channels=192), False),
    ],
)
def test_heads_and_necks_are_compared_with_the_channels_of_their_maps(
    reader: str, setting: dict[str, Any], fits: bool
) -> None:
    config = Config(dict(model={reader: setting}))
    if fits:
        check_channels(config, make("swin"))
    else:
        with pytest.raises(ValueError, match=rf"model\.{reader}\.in_channels is .* have 24, 48, 96, 192 channels"):
            check_channels(config, make("swin"))
