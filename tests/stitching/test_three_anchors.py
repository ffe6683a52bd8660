"""Three anchors in one network: properties of two anchors hold for three, taps included."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsnnet.stitching import (
    Anchor,
    LayerKey,
    NormalEquations,
    Stitch,
    StitchedNetwork,
    StitchSampler,
    StitchSpace,
    cost_model,
    count_flops,
    flops_bins,
)

MakeImages = Callable[..., Tensor]
MakeNetwork = Callable[..., StitchedNetwork]

WIDTHS = (32, 48, 64)


class Route(nn.Module):
    """One route of a network as a module."""

    def __init__(self, network: StitchedNetwork, stitch: Stitch, out_indices: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.stitch, self.out_indices = network, stitch, out_indices

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.network(images, self.stitch, self.out_indices)


def dense(network: StitchedNetwork, tokens: Tensor, *key: int) -> Tensor:
    """Apply the layer of this key to tokens, with its update multiplied out."""
    layer = network.layer(LayerKey(*key))
    return F.linear(tokens, layer.weight + layer.lora_B @ layer.lora_A / layer.rank, layer.bias)


def grid(tokens: Tensor) -> Tensor:
    """Tokens (B, 1 + 2 * 3, C) behind a class token as a map (B, C, 2, 3)."""
    return tokens[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)


def embed(anchor: Anchor, images: Tensor) -> Tensor:
    return anchor.model._pos_embed(anchor.model.patch_embed(images))


# Properties


@pytest.mark.parametrize("number", [3, 4])
@torch.no_grad()
def test_equal_anchors_joined_by_identities_are_the_anchor(
    number: int, make_anchor: Callable[..., Anchor], make_images: MakeImages
) -> None:
    anchor, images = make_anchor(depth=3, classifier=True, num_classes=5), make_images(2, 32, 48)
    expected = anchor.model.forward_intermediates(images, intermediates_only=True)
    logits = anchor.model(images)
    anchors = [copy.deepcopy(anchor) for _ in range(number)]
    network = StitchedNetwork(anchors, StitchSpace.two_way((3,) * number), rank=0).eval()
    for key in network.space.layers:
        network.layer(key).set_base(torch.eye(anchor.width), torch.zeros(anchor.width))
    assert len(network.space) == number + (number - 1) * (2 + 2 + 1 + 1)
    for stitch in network.space:
        for index, tap in enumerate(network(images, stitch, range(3))):
            torch.testing.assert_close(tap, expected[index], msg=f"{stitch}, tap {index}")
        torch.testing.assert_close(network.classify(images, stitch), logits)


@pytest.mark.slow
@pytest.mark.parametrize("depths", [(2, 2, 4), (2, 3, 7), (3, 4, 4)])
@torch.no_grad()
def test_every_stitch_gives_maps_of_the_largest_width(
    depths: tuple[int, ...], make_network: MakeNetwork, make_images: MakeImages
) -> None:
    network, images = make_network(depths, WIDTHS), make_images(2, 40, 71)
    merged = network.merged()
    for stitch in network.space:
        taps = network(images, stitch, range(depths[-1]))
        assert [tap.shape for tap in taps] == [(2, 64, 3, 5)] * depths[-1]
        for tap, same in zip(taps, merged(images, stitch, range(depths[-1])), strict=True):
            torch.testing.assert_close(tap, same, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("depths", "out_indices", "kind"),
    [
        ((2, 2, 4), (0, 1, 2, 3), dict()),
        ((2, 3, 5), (4, 0, 2), dict()),
        ((2, 3, 4), (1, 1, 3), dict(rel_pos_bias=True)),
        ((2, 2, 3), (2,), dict(window_size=2, global_blocks=(1,))),
    ],
)
def test_composed_cost_is_the_direct_count(
    depths: tuple[int, ...],
    out_indices: tuple[int, ...],
    kind: dict[str, Any],
    make_network: MakeNetwork,
    make_images: MakeImages,
) -> None:
    """FLOPs as fvcore counts the merged network's forward, parameters as those that get a gradient."""
    network, images = make_network(depths, WIDTHS, img_size=(32, 64), **kind), make_images(1, 32, 64)
    costs, merged = cost_model(network, (32, 64)), network.merged()
    for stitch in network.space:
        route = Route(merged, stitch, out_indices)
        cost = costs.stitch(stitch, out_indices)
        assert cost.flops == count_flops(route, images), str(stitch)
        route.requires_grad_(True).zero_grad(set_to_none=True)
        torch.cat(route(images)).square().mean().backward()
        assert cost.params == sum(p.numel() for p in route.parameters() if p.grad is not None), str(stitch)


@pytest.mark.parametrize("out_indices", [(1,), (0, 4), (2, 2, 3), (0, 1, 2, 3, 4)])
@torch.no_grad()
def test_nothing_runs_twice_or_beyond_the_last_tap(
    out_indices: tuple[int, ...], make_network: MakeNetwork, make_images: MakeImages
) -> None:
    """Stitching layers too: two taps never use one layer with different tokens."""
    network = make_network((2, 3, 5), WIDTHS)
    calls: Counter[Any] = Counter()
    modules: dict[Any, nn.Module] = {key: network.layer(key) for key in network.space.layers}
    for index in range(3):
        modules |= {(index, block): network.anchor(index).block(block) for block in range(network.anchor(index).depth)}
    for key, module in modules.items():
        module.register_forward_pre_hook(lambda *_, key=key: calls.update([key]))
    for stitch in network.space:
        calls.clear()
        network(make_images(1), stitch, out_indices)
        taps = network.space.taps(stitch, out_indices)
        route = [(s.anchor, b) for s in stitch.segments for b in range(s.start, s.stop)]
        run = route[: 1 + max(route.index((tap.anchor, tap.block)) for tap in taps)]
        crossed = [key for key in stitch.layers if (key.target, key.target_block) in run]
        assert calls == dict.fromkeys([*run, *crossed, *(key for tap in taps for key in tap.layers)], 1), str(stitch)


def test_every_layer_of_every_pair_is_the_least_squares_solution(
    make_network: MakeNetwork, make_images: MakeImages
) -> None:
    """A block of the middle anchor is where layers of both pairs end and begin."""
    network = make_network((2, 3, 5), WIDTHS).double()
    images = make_images(48, dtype=torch.float64)
    for layer in network.layers.values():
        nn.init.zeros_(layer.lora_B)
    equations = NormalEquations(network)
    for batch in images.split([20, 28]):
        equations.add(batch)
    equations.solve()
    assert network.initialized
    leaving = []
    for index in range(3):
        pairs = network.anchor(index).model.forward_intermediates(
            images, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
        )
        leaving.append([torch.cat([prefix, patches], dim=1).flatten(0, 1).detach() for patches, prefix in pairs])
    for key in network.space.layers:
        x, y = leaving[key.source][key.source_block], leaving[key.target][key.target_block - 1]
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        layer = network.layer(key)
        actual = torch.cat([layer.weight.T, layer.bias[None]])
        torch.testing.assert_close(actual, torch.linalg.lstsq(x, y).solution, rtol=1e-6, atol=1e-7, msg=str(key))


def test_every_stitch_is_in_a_bin_and_is_drawn(make_network: MakeNetwork) -> None:
    network = make_network((2, 2, 4), WIDTHS)
    costs = cost_model(network, (32, 32))
    flops = {stitch.id: costs.stitch(stitch, (3,)).flops for stitch in network.space}
    bins = flops_bins(flops, 2e4)
    assert sorted(id_ for ids in bins for id_ in ids) == sorted(flops) and len(bins) > 3
    sampler = StitchSampler(bins)
    assert {sampler.draw(n) for n in range(400)} == set(flops)


# By hand


@torch.no_grad()
def test_taps_of_the_smallest_anchor_by_hand(make_network: MakeNetwork, make_images: MakeImages) -> None:
    """Depths 2, 3, 6. S0's group is M0 and M1, so its tokens become those leaving M1, and these those leaving L3; S1's
    become those leaving M2, the last, and these those leaving L5."""
    network, images = make_network((2, 3, 6), WIDTHS), make_images(2, 32, 48)
    blocks = network.anchor(0).model.blocks
    s0 = blocks[0](embed(network.anchor(0), images))
    s1 = blocks[1](s0)
    low = dense(network, dense(network, s0, 0, 0, 1, 2), 1, 1, 2, 4)
    high = dense(network, dense(network, s1, 0, 1, 1, 3), 1, 2, 2, 6)
    # L0 to L3 are in the groups of M0 and M1, L4 and L5 in that of M2.
    for tap, expected in zip(network(images, network.space["S"], range(6)), [low] * 4 + [high] * 2, strict=True):
        torch.testing.assert_close(tap, grid(expected))


@torch.no_grad()
def test_middle_small_middle_by_hand(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((3, 3, 6), WIDTHS, classifier=True, num_classes=5)
    images = make_images(2, 32, 48)
    small, middle = (network.anchor(i).model.blocks for i in range(2))
    m0 = middle[0](embed(network.anchor(1), images))
    s1 = small[1](dense(network, m0, 1, 0, 0, 1))
    up = dense(network, s1, 0, 1, 1, 2)
    m2 = middle[2](up)
    stitch = network.space["M0-S1-M2"]
    taps = network(images, stitch, (0, 3, 5))
    # The crossing out of S1 is the first half of its tap's way up.
    for tap, expected in zip(
        taps,
        (dense(network, m0, 1, 0, 2, 2), dense(network, up, 1, 1, 2, 4), dense(network, m2, 1, 2, 2, 6)),
        strict=True,
    ):
        torch.testing.assert_close(tap, grid(expected))
    model = network.anchor(1).model
    torch.testing.assert_close(network.classify(images, stitch), model.head(model.norm(m2)[:, 0]))


def test_names_and_shapes_in_the_state_dict(make_network: MakeNetwork) -> None:
    network = make_network((2, 3, 6), WIDTHS, rank=3)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in network.state_dict().items()
        if name.startswith("layers.") and name.endswith(".weight")
    }
    up = {"0_0-1_2": (48, 32), "0_1-1_3": (48, 32), "1_0-2_2": (64, 48), "1_1-2_4": (64, 48), "1_2-2_6": (64, 48)}
    down = {"1_1-0_1": (32, 48), "2_1-1_1": (48, 64), "2_3-1_2": (48, 64)}
    assert shapes == {f"layers.{key}.weight": shape for key, shape in (up | down).items()}
    assert {name.split(".")[1] for name in network.state_dict() if name.startswith("anchors.")} == {"0", "1", "2"}


def test_the_middle_anchor_must_fit_too(make_anchor: Callable[..., Anchor]) -> None:
    anchors = [make_anchor(2), make_anchor(2, patch_size=8), make_anchor(2)]
    with pytest.raises(ValueError, match=r"patch_size.*\(16, 16\) and \(8, 8\) and \(16, 16\)"):
        StitchedNetwork(anchors, StitchSpace.two_way((2, 2, 2)))
