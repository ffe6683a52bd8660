"""Routes that skip the final norm, as those of SN-Net's DeiT (arXiv 2302.06586)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.stitching import (
    Anchor,
    PrefixPlan,
    SharedPrefixes,
    StitchedNetwork,
    StitchSpace,
    cost_model,
    count_flops,
    create_anchor,
    prefix_order,
)
from mmsnnet.stitching.stitch import Stitch

MakeAnchor = Callable[..., Anchor]
MakeImages = Callable[..., Tensor]
SIZES = ((3, 32), (3, 48), (3, 64))


@pytest.fixture
def network(make_anchor: MakeAnchor, randomise: Callable[[nn.Module], None]) -> StitchedNetwork:
    anchors = [make_anchor(depth, width, classifier=True, num_classes=5) for depth, width in SIZES]
    space = StitchSpace.sliding_window([depth for depth, _ in SIZES], skip_final_norm=True)
    network = StitchedNetwork(anchors, space, rank=0).eval()
    randomise(network.layers)
    return network


class Route(nn.Module):
    def __init__(self, network: StitchedNetwork, stitch: Stitch) -> None:
        super().__init__()
        self.network, self.stitch = network, stitch

    def forward(self, images: Tensor) -> Tensor:
        return self.network.classify(images, self.stitch)


@torch.no_grad()
def test_the_head_takes_what_leaves_the_last_block(network: StitchedNetwork, make_images: MakeImages) -> None:
    images = make_images()
    for stitch in network.space:
        model = network.anchor(stitch.segments[-1].anchor).model
        *_, last = network.walk(images, stitch)
        tokens = last.projected[()].data
        crosses = len(stitch.segments) > 1
        expected = model.head((tokens if crosses else model.norm(tokens))[:, 0])
        torch.testing.assert_close(network.classify(images, stitch), expected)
        assert torch.allclose(model.head(model.norm(tokens)[:, 0]), expected) != crosses


def test_cost_and_parameters_are_those_of_the_forward(network: StitchedNetwork, make_images: MakeImages) -> None:
    costs, images = cost_model(network, (32, 32)), make_images(1)
    for stitch in network.space:
        route = Route(network, stitch)
        assert costs.classifier(stitch).flops == count_flops(route, images)
        route.zero_grad(set_to_none=True)
        route(images).square().sum().backward()
        trained = sum(p.numel() for p in route.parameters() if p.grad is not None)
        assert costs.classifier(stitch).params == trained
        norm = network.anchor(stitch.segments[-1].anchor).model.norm
        assert (norm.weight.grad is None) == (len(stitch.segments) > 1)


@torch.no_grad()
def test_shared_prefixes_change_nothing(network: StitchedNetwork, make_images: MakeImages) -> None:
    images, stitches = make_images(), prefix_order(network.space, network.space.stitches, None)
    shared = SharedPrefixes(network, PrefixPlan(network.space, stitches, None))
    for stitch in stitches:
        shared.begin()
        assert torch.equal(network.classify(images, stitch, shared), network.classify(images, stitch))


def test_the_routes_are_otherwise_the_same() -> None:
    kept, skipped = (StitchSpace.of("sliding_window", (3, 3), (), skips) for skips in (False, True))
    assert kept != skipped and kept.layers == skipped.layers
    for one, other in zip(kept, skipped, strict=True):
        assert (one.id, one.name, one.segments, one.layers) == (other.id, other.name, other.segments, other.layers)
    with pytest.raises(ValueError, match="only routes of scheme='sliding_window' skip the final norm; got 'two_way'"):
        StitchSpace.of("two_way", (3, 3), (), True)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("deit_tiny_patch16_224", dict(embed_dim=16, depth=3, num_heads=2)),  # without a classifier
        ("vit_tiny_patch16_224", dict(embed_dim=16, depth=3, num_heads=2, classifier=True, global_pool="avg")),
        ("resnet18", dict(channels=(8, 8, 8, 8), classifier=True)),
        ("swin_tiny_patch4_window7_224", dict(embed_dim=8, num_heads=(1, 1, 1, 1), classifier=True)),
    ],
)
def test_an_anchor_without_such_a_norm_is_refused(model: str, settings: dict[str, Any]) -> None:
    anchors = [create_anchor(model, 32, **settings) for _ in range(2)]
    space = StitchSpace.sliding_window([anchor.stages for anchor in anchors], skip_final_norm=True)
    with pytest.raises(ValueError, match=r"skip_final_norm=True needs plain ViTs .*anchor 1 is none: leave out skip_"):
        StitchedNetwork(anchors, space, rank=0)
