"""``only`` of the backbone: the parts of one stitch, with the results and cost of the whole backbone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching import NormalEquations, UnknownStitchError
from mmsnnet.stitching.anchors.base import CLASSIFIER, STEM

MakeBackbone = Callable[..., StitchedBackbone]
Config = Callable[..., dict[str, Any]]

WINDOWS = dict(rel_pos_bias=True, window_size=2, global_blocks=(1,))
WHOLE = {
    "taps": dict(out_indices=(1, 3)),
    "an early tap": dict(out_indices=(1,)),
    "a tap for training": dict(out_indices=dict(train=(0, 3), test=(3,))),
    "no update": dict(out_indices=(0, 2, 3), rank=0),
    "one way": dict(scheme="one_way", out_indices=(2, 3)),
    "classifiers": dict(num_classes=5),
    "a skipped norm": dict(num_classes=5, scheme="sliding_window", skip_final_norm=True, small=dict(depth=4), rank=0),
    "windows and biases": dict(small=WINDOWS, large=WINDOWS, out_indices=(1, 3), img_size=(64, 80)),
    "rotary": dict(small=dict(model="vit_small_patch16_dinov3"), large=dict(model="vit_small_patch16_dinov3")),
    "learned rotations": dict(
        small=dict(model="vit_small_patch16_rope_mixed_224"), large=dict(model="vit_small_patch16_rope_mixed_224")
    ),
}


def cut(whole: StitchedBackbone, config: dict[str, Any], stitch: str) -> StitchedBackbone:
    """One stitch of a backbone, with its weights: those of the same names, once updates are merged."""
    taps = {} if whole.num_classes is not None else dict(out_indices=whole.test_out_indices)
    one = MODELS.build(config | taps | dict(only=stitch, rank=0))
    weights = whole.state_dict()
    for key in whole.space.layers:
        merged = whole.network.layer(key).merged().state_dict()
        weights |= {f"network.layers.{key}.{name}": tensor for name, tensor in merged.items()}
    one.load_state_dict({name: weights[name] for name in one.state_dict()})
    return one


def outputs(backbone: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        actual = backbone.eval()(images)
    if isinstance(actual, Tensor):
        return [actual]
    # The class tokens too: an anchor that has dropped its stem still hands them out.
    return [tap for tap in (*actual, *(actual.class_tokens or ())) if tap is not None]


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Properties


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_each_stitch_gives_and_costs_what_it_does_in_the_whole(
    kind: str, make_backbone: MakeBackbone, backbone_config: Config, make_images: Callable[..., Tensor]
) -> None:
    whole, config = make_backbone(**WHOLE[kind]), backbone_config(**WHOLE[kind])
    images = make_images(2, *whole.img_size)
    for stitch in whole.space:
        one = cut(whole, config, stitch.name)
        assert one.space.stitches == (one.stitch,) == (stitch,)
        assert one.network.initialized
        whole.set_stitch(stitch.id)
        for actual, expected in zip(outputs(one, images), outputs(whole, images), strict=True):
            if whole.network.layer(whole.space.layers[0]).rank:
                torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(actual, expected)
        assert one.costs() == {stitch.id: whole.costs()[stitch.id]}
        assert numel(one) == whole.costs()[stitch.id].params
        assert not any(tensor.is_meta for tensor in (*one.parameters(), *one.buffers()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", WHOLE)
def test_everything_that_is_left_is_trained(
    kind: str, make_backbone: MakeBackbone, backbone_config: Config, make_images: Callable[..., Tensor]
) -> None:
    whole, config = make_backbone(**WHOLE[kind]), backbone_config(**WHOLE[kind])
    images = make_images(2, *whole.img_size)
    for stitch in whole.space.stitches[:: 1 + len(whole.space) // 4]:
        one = cut(whole, config, stitch.name).train()
        actual = one(images)
        torch.stack(
            [tap.square().mean() for tap in ([actual] if isinstance(actual, Tensor) else actual)]
        ).sum().backward()
        assert one.drawn == stitch and one.draws == 1
        assert [name for name, p in one.named_parameters() if p.grad is None] == []


@pytest.mark.slow
def test_three_anchors(backbone_config: Config, make_images: Callable[..., Tensor]) -> None:
    """Taps of the smallest anchor go through the middle width, even if no middle block runs."""
    config = backbone_config(out_indices=(1, 3))
    config["anchors"] = [
        dict(config["anchors"][0], embed_dim=width, depth=d) for width, d in ((16, 2), (32, 3), (48, 4))
    ]
    whole = MODELS.build(config)
    for layer in whole.network.layers.values():
        nn.init.normal_(layer.lora_B)
        layer.initialized = True
    images = make_images()
    for stitch in whole.space:
        one = cut(whole, config, stitch.name)
        whole.set_stitch(stitch.id)
        for actual, expected in zip(outputs(one, images), outputs(whole, images), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        assert numel(one) == one.costs()[stitch.id].params == whole.costs()[stitch.id].params
    assert [str(layer) for layer in cut(whole, config, "S").space.layers] == [
        "0_0-1_2",
        "0_1-1_3",
        "1_1-2_3",
        "1_2-2_4",
    ]
    assert numel(cut(whole, config, "S").network.anchor(1)) == 0


# Examples


def test_what_is_left_of_a_small_large_route(backbone_config: Config) -> None:
    """S0-L2 of depths 2 and 4 runs block 0 of the small anchor, crosses over, and runs blocks 2 and 3 of the large one.
    Tap 1 is in the group of the small anchor's block 0, and uses the layer of the crossing."""
    one = MODELS.build(backbone_config(only="S0-L2", out_indices=(1, 3)))
    small, large = one.network.anchor(0), one.network.anchor(1)
    assert (small.blocks, large.blocks) == ((0,), (2, 3))
    assert STEM in small.components and STEM not in large.components
    names = {name.removeprefix("network.") for name in one.state_dict()}
    kept = {name.split(".")[1] + "." + ".".join(name.split(".")[3:5]) for name in names if ".model." in name}
    assert kept == {"0.pos_embed", "0.cls_token", "0.patch_embed.proj", "0.blocks.0", "1.blocks.2", "1.blocks.3"}
    assert {name for name in names if name.endswith(".grid")} == {"anchors.0.grid"}
    layer = {"layers.0_0-1_2.weight", "layers.0_0-1_2.bias", "layers.0_0-1_2.lora_A", "layers.0_0-1_2.lora_B"}
    assert {name for name in names if name.startswith("layers.")} == layer


@pytest.mark.parametrize(("stitch", "anchor"), [("S", 0), ("L", 1)])
def test_of_an_anchor_alone_the_classifier_is_its_own(stitch: str, anchor: int, backbone_config: Config) -> None:
    one = MODELS.build(backbone_config(only=stitch, num_classes=5))
    has_classifier = [CLASSIFIER in one.network.anchor(index).components for index in (0, 1)]
    assert has_classifier == [anchor == 0, anchor == 1]
    assert len(one.network.layers) == 0
    assert {name.split(".")[2] for name, _ in one.named_parameters()} == {str(anchor)}


def test_the_weights_of_an_anchor_that_is_left_out_are_not_drawn(backbone_config: Config) -> None:
    """An anchor of terabytes that the stitch does not run needs no memory."""
    config = backbone_config(large=dict(embed_dim=2**16, depth=20), only="S", num_classes=5)
    MODELS.build(config)


def test_a_place_without_a_tap(make_backbone: MakeBackbone, make_images: Callable[..., Tensor]) -> None:
    one = make_backbone(only="S0-L2", out_indices=(None, 3))
    for mode in (True, False):
        maps = one.train(mode)(make_images())
        assert maps[0] is None and maps[1].shape == (2, 48, 2, 2)
    assert one.out_indices == one.test_out_indices == (3,)


def test_frozen_stages_of_what_is_left(make_backbone: MakeBackbone) -> None:
    one = make_backbone(only="S0-L2", frozen_stages=3)
    assert [name for name, p in one.network.anchor(0).named_parameters() if p.requires_grad] == []
    trained = {name.split(".")[2] for name, p in one.network.anchor(1).named_parameters() if p.requires_grad}
    assert trained == {"3"}


# Mistakes


def test_another_stitch_is_not_there(make_backbone: MakeBackbone) -> None:
    one = make_backbone(only="S0-L2")
    with pytest.raises(UnknownStitchError, match=r"no stitch 'L' in this space of one: 2 \(S0-L2\)"):
        one.set_stitch("L")
    with pytest.raises(UnknownStitchError, match="no stitch 'S9-L2' in this space of"):
        make_backbone(only="S9-L2")


def test_pretrained_anchors_do_not_go_with_it(make_backbone: MakeBackbone) -> None:
    with pytest.raises(ValueError, match=r"only='S' builds .* leave out 'pretrained' of the anchors"):
        make_backbone(only="S", small=dict(pretrained=True))


def test_its_layers_cannot_be_initialised(make_backbone: MakeBackbone, make_images: Callable[..., Tensor]) -> None:
    one = make_backbone(only="S0-L2", initialized=False)
    with pytest.raises(SettingError, match=r"one stitch lacks blocks .* load its checkpoint \(load_from\)"):
        NormalEquations(one.network)
    with pytest.raises(RuntimeError, match="load a checkpoint"):
        one.train()(make_images())
