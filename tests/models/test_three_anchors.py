"""``StitchedBackbone`` with three anchors: drawn, optimised, frozen and saved as with two."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from mmsnnet.engine import StitchLogHook
from mmsnnet.models import StitchedBackbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching import StitchSpace
from mmsnnet.stitching.anchors.base import STEM

MakeBackbone = Callable[..., StitchedBackbone]
MakeImages = Callable[..., Tensor]

DEPTHS, WIDTHS = (2, 3, 6), (32, 48, 64)
ANCHORS = [
    dict(model="vit_tiny_patch16_224", num_heads=2, embed_dim=width, depth=depth)
    for width, depth in zip(WIDTHS, DEPTHS, strict=True)
]


@pytest.fixture
def backbone(make_backbone: MakeBackbone) -> StitchedBackbone:
    return make_backbone(anchors=ANCHORS, out_indices=dict(train=(0, 3, 5), test=(5,)))


def test_every_stitch_in_evaluation_mode(backbone: StitchedBackbone, make_images: MakeImages) -> None:
    assert backbone.space == StitchSpace.two_way(DEPTHS)
    assert backbone.stitch.name == "L", "the largest anchor by default"
    backbone.eval()
    for stitch in backbone.space:
        backbone.set_stitch(stitch.name)
        maps = backbone(make_images(2, 32, 48))
        assert maps[:2] == (None, None) and maps[2].shape == (2, 64, 2, 3)
        assert maps.class_tokens[2].shape == (2, 64)


def test_training_draws_every_stitch_and_trains_its_layers(backbone: StitchedBackbone, make_images: MakeImages) -> None:
    drawn = set()
    for _ in range(60):
        backbone.zero_grad(set_to_none=True)
        torch.cat([m.flatten() for m in backbone(make_images(1))]).square().mean().backward()
        stitch = backbone.drawn
        drawn.add(stitch.id)
        taps = backbone.space.taps(stitch, (0, 3, 5))
        used = {*stitch.layers, *(key for tap in taps for key in tap.layers)}
        trained = {key for key in backbone.space.layers if backbone.network.layer(key).lora_B.grad is not None}
        assert trained == used, str(stitch)
    assert drawn == {stitch.id for stitch in backbone.space}


def test_the_share_of_flops_that_is_logged(backbone: StitchedBackbone, make_images: MakeImages) -> None:
    runner, hook = SimpleNamespace(model=backbone, message_hub=MessageHub("three anchors")), StitchLogHook()
    hook.before_train(runner)
    costs = backbone.training_costs()
    for iteration in range(5):
        backbone(make_images(1))
        hook.after_train_iter(runner, iteration)
        share = runner.message_hub.get_scalar("train/flops_share").current()
        assert share == pytest.approx(costs[backbone.drawn.id].flops / costs[2].flops)


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (dict(frozen_stages=0), (0, 0, 0)),
        # L's blocks 0 and 1 are the group of M0; with 2 and 3, that of M1, they are those that S0 stands for.
        (dict(frozen_stages=2), (0, 1, 2)),
        (dict(frozen_stages=3), (0, 1, 3)),
        (dict(frozen_stages=4), (1, 2, 4)),
        (dict(frozen_stages=6), (2, 3, 6)),
        (dict(frozen_anchors=(1,)), (-1, 3, -1)),
    ],
)
def test_frozen_parts(settings: dict[str, Any], first: tuple[int, ...], make_backbone: MakeBackbone) -> None:
    """``first`` blocks of each anchor that are trained; -1: those and the stem."""
    backbone = make_backbone(anchors=ANCHORS, **settings)
    for index, start in enumerate(first):
        anchor = backbone.network.anchor(index)
        trained = [any(p.requires_grad for p in anchor.block(b).parameters()) for b in range(anchor.depth)]
        assert trained == [block >= start for block in range(anchor.depth)]
        assert any(p.requires_grad for p in anchor.parameters_of(STEM)) == (start < 0)


def test_groups_of_parameters_with_decay_over_layers(backbone: StitchedBackbone) -> None:
    config = dict(
        type="OptimWrapper",
        constructor="mmsnnet.StitchOptimWrapperConstructor",
        optimizer=dict(type="SGD", lr=2.0),
        paramwise_cfg=dict(layer_decay_rate=0.5, stitching_lr_mult=10.0, head_lr_mult=3.0),
    )
    model = nn.Sequential(backbone, nn.Linear(64, 2))
    groups = build_optim_wrapper(model, config).optimizer.param_groups
    rate_of = {p: group["lr"] for group in groups for p in group["params"]}
    assert rate_of.keys() == {p for p in model.parameters() if p.requires_grad}
    for index, depth in enumerate(DEPTHS):
        anchor = backbone.network.anchor(index)
        actual = [rate_of[anchor.block(block).mlp.fc1.weight] for block in range(depth)]
        assert actual == [2 * 0.5 ** (depth - block) for block in range(depth)]
    assert {rate_of[p] for p in backbone.network.layers.parameters() if p.requires_grad} == {20.0}
    assert rate_of[model[1].weight] == 6.0


def test_a_state_dict_goes_to_another_backbone_of_three(backbone: StitchedBackbone, make_images: MakeImages) -> None:
    other = MODELS.build(
        dict(type="mmsnnet.StitchedViT", anchors=ANCHORS, img_size=32, rank=2, out_indices=(0, 3, 5), flops_step=2e4)
    )
    assert not other.network.initialized
    backbone.draws = 7
    other.load_state_dict(backbone.state_dict())
    assert other.network.initialized and other.draws == 7
    for stitch in backbone.space:
        for module in (backbone, other):
            module.eval().set_stitch(stitch.id)
        assert torch.equal(backbone(make_images())[2], other(make_images())[2])


def test_one_way_and_logits(make_backbone: MakeBackbone, make_images: MakeImages) -> None:
    backbone = make_backbone(anchors=ANCHORS, scheme="one_way", num_classes=5).eval()
    assert [s.name for s in backbone.space] == ["S", "M", "L", "S0-M2", "M0-L2", "M1-L4"]
    for stitch in backbone.space:
        backbone.set_stitch(stitch.id)
        assert backbone(make_images()).shape == (2, 5)


@pytest.mark.parametrize(
    ("order", "says"),
    [((0, 2, 1), "anchors 1 and 2 .*depths 6 and 3"), ((2, 1, 0), "anchors 0 and 1 .*depths 6 and 3")],
)
def test_a_pair_that_cannot_be_stitched_is_named(
    order: tuple[int, ...], says: str, make_backbone: MakeBackbone
) -> None:
    with pytest.raises(ValueError, match=says):
        make_backbone(anchors=[ANCHORS[index] for index in order])
