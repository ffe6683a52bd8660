"""Costs: sums of components equal a direct count, and the published figures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

from mmsnnet.stitching import (
    Anchor,
    Component,
    Cost,
    CostModel,
    PrefixPlan,
    SharedPrefixes,
    StitchedNetwork,
    StitchSpace,
    cost_model,
    count_flops,
    create_anchor,
)
from mmsnnet.stitching.anchors.base import NORM, SHARED, STEM
from mmsnnet.stitching.route_parts import AnchorPart
from mmsnnet.stitching.stitch import Stitch

MakeNetwork = Callable[..., StitchedNetwork]

# The FLOPs of all 134 stitches as published with SN-Netv2 (arXiv 2307.00154) for ImageNet at 224 x 224.
PUBLISHED = Path(__file__).parent / "data" / "imagenet_deit3_s_l_flops.json"


class Route(nn.Module):
    """One route of a network as a module: its taps, or its logits without taps."""

    def __init__(self, network: StitchedNetwork, stitch: Stitch, out_indices: tuple[int, ...] | None) -> None:
        super().__init__()
        self.network, self.stitch, self.out_indices = network, stitch, out_indices

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.out_indices is None:
            return (self.network.classify(images, self.stitch),)
        return self.network(images, self.stitch, self.out_indices)


def parameters_with_gradient(route: Route, images: Tensor) -> int:
    route.requires_grad_(True).zero_grad(set_to_none=True)
    torch.stack([output.square().mean() for output in route(images)]).sum().backward()
    return sum(p.numel() for p in route.parameters() if p.grad is not None)


@pytest.fixture(scope="module")
def imagenet_costs() -> CostModel:
    """The published pair with uninitialised weights: counting needs shapes only."""
    with torch.device("meta"):
        names = ("deit3_small_patch16_224", "deit3_large_patch16_224")
        anchors = [create_anchor(name, 224, classifier=True) for name in names]
        network = StitchedNetwork(anchors, StitchSpace.two_way((12, 24)), rank=64)
    return cost_model(network.to_empty(device="cpu"), (224, 224))


@pytest.mark.slow
def test_the_published_flops_of_all_134_stitches(imagenet_costs: CostModel) -> None:
    published = {int(id_): flops for id_, flops in json.loads(PUBLISHED.read_text())["flops"].items()}
    assert len(published) == 134
    assert {s.id: imagenet_costs.classifier(s).flops for s in imagenet_costs.space} == published


def test_the_parameters_of_the_published_anchors(imagenet_costs: CostModel) -> None:
    """As timm counts them: 22.06 M for DeiT3-S, 304.37 M for DeiT3-L."""
    for stitch, millions in zip(imagenet_costs.space.anchors, (22.06, 304.37), strict=True):
        assert round(imagenet_costs.classifier(stitch).params / 1e6, 2) == millions


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depths", "out_indices"),
    [((2, 4), (0, 1, 2, 3)), ((2, 4), (0,)), ((2, 3), (2, 0)), ((3, 3), (1, 1, 2)), ((2, 3), (1,))],
)
def test_composed_cost_is_the_direct_count(
    depths: tuple[int, int], out_indices: tuple[int, ...], make_network: MakeNetwork, make_images: Callable[..., Tensor]
) -> None:
    network, images = make_network(depths), make_images(1, 32, 64)
    costs = cost_model(network, (32, 64))
    merged = network.merged()
    for stitch in network.space:
        route = Route(merged, stitch, out_indices)
        cost = costs.stitch(stitch, out_indices)
        assert cost.flops == count_flops(route, images), str(stitch)
        assert cost.params == parameters_with_gradient(route, images), str(stitch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        dict(rel_pos_bias=True),
        dict(window_size=2, global_blocks=(1,)),
        dict(window_size=3, global_blocks=(0,), rel_pos_bias=True),
        dict(window_size=2, global_blocks=(), model="vit_base_patch16_gap_224"),
    ],
)
def test_composed_cost_with_windows_and_bias(
    kind: dict[str, Any], make_network: MakeNetwork, make_images: Callable[..., Tensor]
) -> None:
    """Padding and the copies of prefix tokens count, because they are computed."""
    network, images = make_network((2, 4), img_size=(64, 80), **kind), make_images(1, 64, 80)
    costs = cost_model(network, (64, 80))
    merged = network.merged()
    for stitch in network.space:
        route = Route(merged, stitch, (1, 3))
        cost = costs.stitch(stitch, (1, 3))
        assert cost.flops == count_flops(route, images), str(stitch)
        assert cost.params == parameters_with_gradient(route, images), str(stitch)


def test_windowed_attention_by_hand() -> None:
    """Six windows of 2 x 2 patches and a class token over 4 x 5 patches, against one sequence of 21 tokens."""
    windowed, plain = (
        create_anchor("deit3_small_patch16_224", (64, 80), embed_dim=32, depth=1, num_heads=2, **kind)
        for kind in (dict(window_size=2, global_blocks=()), {})
    )
    block = [
        cost_model(StitchedNetwork([anchor], StitchSpace.single(1)), (64, 80)).parts[
            AnchorPart(0, Component("block", 0))
        ]
        for anchor in (windowed, plain)
    ]
    per_token = 12 * 32 * 32 + 2 * 5 * 32
    assert [cost.flops for cost in block] == [
        6 * (2 * 5 * 5 * 32 + 5 * per_token),
        2 * 21 * 21 * 32 + 21 * per_token,
    ]
    assert block[0].params == block[1].params


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", ["deit3_small_patch16_224", "vit_little_patch16_reg4_gap_256", "vit_tiny_patch16_224"]
)
def test_composed_cost_of_classifiers(
    model: str, make_network: MakeNetwork, make_images: Callable[..., Tensor]
) -> None:
    network = make_network((2, 2), model=model, classifier=True, num_classes=5)
    costs = cost_model(network, (32, 32))
    merged = network.merged()
    for stitch in network.space:
        route = Route(merged, stitch, None)
        assert costs.classifier(stitch).flops == count_flops(route, make_images(1)), str(stitch)
        assert costs.classifier(stitch).params == parameters_with_gradient(route, make_images()), str(stitch)


def test_counting_changes_nothing(make_network: MakeNetwork) -> None:
    network = make_network((2, 2)).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    cost_model(network, (32, 32))
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].device.type == "cpu" for name in before)
    assert [module.training for module in network.modules()] == modes
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "with_cp"), [(0, True), (1, False), (8, True)])
def test_settings_of_the_training_do_not_count(with_cp: bool, rank: int, make_network: MakeNetwork) -> None:
    """Rank (updates are merged), drop path, recomputation and mode do not change the cost."""
    plain = make_network((2, 2), rank=0)
    trained = make_network((2, 2), rank=rank, with_cp=with_cp, drop_path_rate=0.3).train()
    costs = [cost_model(network, (32, 32)) for network in (plain, trained)]
    assert costs[0].parts == costs[1].parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_precision_does_not_count(dtype: torch.dtype, make_network: MakeNetwork) -> None:
    network = make_network((2, 2))
    costs = cost_model(network, (32, 32)).parts
    assert cost_model(make_network((2, 2)).to(dtype), (32, 32)).parts == costs
    assert cost_model(network.to(dtype), (32, 32)).parts == costs  # after it was counted in another


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("heads", "tokens", "width"), [(2, 5, 32), (4, 9, 64)])
def test_attention_by_hand(fused: bool, heads: int, tokens: int, width: int) -> None:
    """A block: two N x N x d products for each head, four linear layers, two norms at fvcore's 5 per element."""
    anchor = create_anchor("deit3_small_patch16_224", 32, embed_dim=width, depth=1, num_heads=heads)
    block = anchor.model.blocks[0].eval()
    block.attn.fused_attn = fused
    attention = 2 * heads * tokens * tokens * (width // heads)
    linear = tokens * width * (3 * width + width + 4 * width + 4 * width)
    norms = 2 * 5 * tokens * width
    assert count_flops(block, torch.zeros(1, tokens, width)) == attention + linear + norms


def test_cross_attention_by_hand() -> None:
    """Queries, keys and values of different lengths and widths."""

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 7, 8), torch.zeros(2, 3, 7, 4)
    assert count_flops(Attend(), q, k, v) == 2 * 3 * (5 * 7 * 8 + 5 * 7 * 4)


def test_components(make_anchor: Callable[..., Anchor]) -> None:
    anchor = make_anchor(depth=2, width=32)
    costs = cost_model(StitchedNetwork([anchor], StitchSpace.single(2)), (32, 64))
    components = (STEM, SHARED, NORM, Component("block", 0), Component("block", 1))
    assert set(costs.parts) == {AnchorPart(0, component) for component in components}
    patches = 2 * 4
    assert costs.parts[AnchorPart(0, STEM)] == Cost(
        flops=patches * 3 * 16 * 16 * 32, params=3 * 16 * 16 * 32 + 32 + 4 * 32 + 32
    )
    assert costs.input_shape == (32, 64)
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)


def test_the_cost_of_a_tree_is_the_count_of_a_shared_run(make_network: MakeNetwork) -> None:
    network = make_network((4, 8))
    merged, model = network.merged().eval(), cost_model(network, (32, 32))

    class Tree(nn.Module):
        def __init__(self, stitches: tuple[Stitch, ...]) -> None:
            super().__init__()
            self.network, self.stitches = merged, stitches

        def forward(self, images: Tensor) -> list[Tensor]:
            shared = SharedPrefixes(self.network, PrefixPlan(network.space, self.stitches, (3, 7), keep=True))
            maps = []
            for stitch in self.stitches:
                shared.begin()
                maps += [one.map() for one in self.network.taps(images, stitch, (3, 7), shared)]
            return maps

    by_kind = {stitch.kind: stitch for stitch in network.space}
    for kinds in (("S", "L"), ("S", "SL", "L"), ("LS", "L", "LSL", "SLS"), ("S", "S")):
        stitches = tuple(by_kind[kind] for kind in kinds)
        assert model.tree(stitches, (3, 7)).flops == count_flops(Tree(stitches), torch.zeros(1, 3, 32, 32))
    everything = model.tree(network.space.stitches, (3, 7))
    alone = model.stitches((3, 7))
    assert max(cost.flops for cost in alone.values()) < everything.flops < sum(cost.flops for cost in alone.values())
    for stitch in network.space:
        assert model.tree([stitch, stitch], (3, 7)) == alone[stitch.id]


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, (3, 1), stride=(2, 1), padding=(1, 0), dilation=(2, 1), bias=False),
        nn.Conv2d(4, 8, 3, padding=1, groups=4),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.ConvTranspose2d(4, 6, 2, stride=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
    ],
    ids=str,
)
def test_convolutions_that_are_not_computed_count(convolution: nn.Module, make_images: Callable[..., Tensor]) -> None:
    """They and what follows them cost the same as in fvcore alone, which computes them."""
    channels = convolution.out_channels
    model = nn.Sequential(nn.Conv2d(3, 4, 1), convolution, nn.BatchNorm2d(channels), nn.Conv2d(channels, 2, 1))
    images = make_images(2, 12, 10)
    computed = FlopCountAnalysis(model.eval(), images)
    assert count_flops(model, images) == computed.total() > 0
    if convolution.padding != "same":
        assert count_flops(model.to("meta"), images.to("meta")) == computed.total()
