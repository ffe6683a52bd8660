"""Prefix reuse: nothing changes but the number of blocks that run."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mmsnnet.stitching import (
    Anchor,
    Component,
    Features,
    PrefixPlan,
    SharedPrefixes,
    Stitch,
    StitchedNetwork,
    StitchSpace,
    cost_model,
    create_anchor,
    prefix_order,
)
from mmsnnet.stitching.route_parts import AnchorPart

MakeNetwork = Callable[..., StitchedNetwork]
MakeImages = Callable[..., Tensor]

SPACES = {
    "S-L": dict(),
    "equal depths": dict(depths=(3, 3)),
    "no whole ratio": dict(depths=(2, 5)),
    "windows": dict(depths=(4, 8), window_size=1, global_blocks=(1, 3)),
    "bias": dict(rel_pos_bias=True),
    "rotary": dict(model="vit_small_patch16_dinov3"),
}


@pytest.fixture(params=SPACES)
def network(request: pytest.FixtureRequest, make_network: MakeNetwork) -> StitchedNetwork:
    return make_network(**SPACES[request.param])


@pytest.fixture
def three_anchors(make_anchor: Callable[..., Anchor], randomise: Callable[..., None]) -> StitchedNetwork:
    anchors = [make_anchor(depth, width) for depth, width in ((2, 32), (2, 48), (4, 64))]
    network = StitchedNetwork(anchors, StitchSpace.two_way((2, 2, 4)), rank=2).eval()
    randomise(network.layers)
    return network


def route(stitch: Stitch) -> tuple[tuple[int, int], ...]:
    return tuple((s.anchor, block) for s in stitch.segments for block in range(s.start, s.stop))


def count_blocks(network: StitchedNetwork) -> list[int]:
    """Count the blocks that run, in the first entry."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for index in range(len(network.anchors)):
        for block in network.anchor(index).model.blocks:
            block.register_forward_hook(count)
    return calls


def equal(a: Sequence[Features], b: Sequence[Features]) -> bool:
    return len(a) == len(b) and all(torch.equal(x.data, y.data) for x, y in zip(a, b, strict=True))


# Properties


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
@torch.no_grad()
def test_taps_are_the_same_to_the_bit(network: StitchedNetwork, ordered: bool, make_images: MakeImages) -> None:
    """Several calls for each stitch, of different sizes, in the best order and in a random order."""
    last = network.space.depths[-1] - 1
    batches = [make_images(2, 32, 32), make_images(1, 48, 32, seed=1), make_images(2, 32, 32, seed=2)]
    for out_indices in ((last,), (0, last), (last - 1, 0)):
        stitches = prefix_order(network.space, network.space.stitches, out_indices)
        if not ordered:
            stitches = random.Random(0).sample(stitches, len(stitches))
        shared = SharedPrefixes(network, PrefixPlan(network.space, stitches, out_indices))
        for stitch in stitches:
            shared.begin()
            for images in batches:
                actual = network.taps(images.clone(), stitch, out_indices, shared)
                assert equal(actual, network.taps(images, stitch, out_indices)), stitch


@pytest.mark.parametrize("out_indices", [(3,), (1, 3), (2,), None])
@torch.no_grad()
def test_each_shared_prefix_runs_once_and_is_freed(
    out_indices: tuple[int, ...] | None, make_network: MakeNetwork, make_images: MakeImages
) -> None:
    """By brute force: as many blocks run as the routes, up to the last tap, have different beginnings."""
    network = make_network(classifier=out_indices is None, **(dict(num_classes=5) if out_indices is None else {}))
    space, images = network.space, make_images()
    stitches = prefix_order(space, space.stitches, out_indices)
    assert sorted(s.id for s in stitches) == [s.id for s in space]
    plan = PrefixPlan(space, stitches, out_indices)
    shared, calls, beginnings, kept = SharedPrefixes(network, plan), count_blocks(network), set(), []
    for stitch in stitches:
        shared.begin()
        if out_indices is None:
            network.classify(images, stitch, shared)
            blocks = route(stitch)
        else:
            network.taps(images, stitch, out_indices, shared)
            taps = [(tap.anchor, tap.block) for tap in space.taps(stitch, out_indices)]
            blocks = route(stitch)[: 1 + max(map(route(stitch).index, taps))]
        beginnings |= {blocks[: length + 1] for length in range(len(blocks))}
        assert calls[0] == len(beginnings)
        kept.append(len(shared._calls[0].outputs))
    assert calls[0] == len(plan) == len(beginnings)
    assert kept[-1] == 0 and max(kept) <= 2 + (0 if out_indices is None else len(out_indices))


@torch.no_grad()
def test_three_anchors(three_anchors: StitchedNetwork, make_images: MakeImages) -> None:
    images, space = make_images(), three_anchors.space
    stitches = prefix_order(space, space.stitches, (1, 3))
    shared = SharedPrefixes(three_anchors, PrefixPlan(space, stitches, (1, 3)))
    for stitch in stitches:
        shared.begin()
        actual = three_anchors.taps(images, stitch, (1, 3), shared)
        assert equal(actual, three_anchors.taps(images, stitch, (1, 3)))
    assert not shared._calls[0].outputs


@torch.no_grad()
def test_logits_are_the_same_to_the_bit(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network(classifier=True, num_classes=5), make_images()
    stitches = prefix_order(network.space, network.space.stitches, None)
    shared = SharedPrefixes(network, PrefixPlan(network.space, stitches, None))
    for stitch in stitches:
        shared.begin()
        logits = network.classify(images, stitch, shared)
        assert torch.equal(logits, network.classify(images, stitch))


@torch.no_grad()
def test_stitches_out_of_turn_or_beyond_the_plan(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network(), make_images()
    planned = network.space.select("S,L,2")
    shared = SharedPrefixes(network, PrefixPlan(network.space, planned, (3,)))
    others = network.space.stitches[2:5]
    for stitch in (*reversed(planned), *others, planned[1], planned[1]):
        shared.begin()
        actual = network.taps(images, stitch, (3,), shared)
        assert equal(actual, network.taps(images, stitch, (3,)))


# Examples


def test_the_tree_of_depths_2_and_2() -> None:
    """Routes by hand: S = S0 S1, L = L0 L1, S0-L1 and L0-S1. Those that change over come first, each after its
    beginning, which the anchor then shares."""
    space = StitchSpace.two_way((2, 2))
    stitches = prefix_order(space, space.stitches, (1,))
    assert [stitch.name for stitch in stitches] == ["S0-L1", "S", "L0-S1", "L"]
    plan = PrefixPlan(space, stitches, (1,))
    assert len(plan) == 6
    paths = [plan.paths[stitch.id].nodes for stitch in stitches]
    assert paths == [(0, 1), (0, 2), (3, 4), (3, 5)]
    assert plan.last_use == [1, 0, 1, 3, 2, 3]


@pytest.mark.slow
def test_the_share_of_the_published_pair() -> None:
    """134 stitches of DeiT3-S and -L at 512 x 512: 9.75 instead of 26.5 TMACs in the backbone's blocks
    (shared/reference/sn-net.md: 2.72 times fewer)."""
    with torch.device("meta"):
        anchors = [create_anchor(f"deit3_{size}_patch16_224", 512) for size in ("small", "large")]
        network = StitchedNetwork(anchors, StitchSpace.two_way((12, 24)))
    costs = cost_model(network.to_empty(device="cpu"), (512, 512)).parts
    flops = [costs[AnchorPart(anchor, Component("block", 0))].flops for anchor in (0, 1)]
    routes = [route(stitch) for stitch in network.space]
    alone = sum(flops[anchor] for blocks in routes for anchor, _ in blocks)
    shared = sum(flops[node[-1][0]] for node in {r[: k + 1] for r in routes for k in range(len(r))})
    assert alone == pytest.approx(26.5e12, rel=0.01) and shared == pytest.approx(9.75e12, rel=0.01)
    plan = PrefixPlan(network.space, prefix_order(network.space, network.space.stitches, (23,)), (23,))
    assert len(plan) == len({r[: k + 1] for r in routes for k in range(len(r))})


# Guards


@torch.no_grad()
def test_other_images_are_noticed(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network(), make_images()
    shared = SharedPrefixes(network, PrefixPlan(network.space, network.space.stitches, (3,)))
    list(shared.walk(images, network.space["S"]))
    for other in (images + 1e-6, images[:1], images.double(), make_images(2, 32, 48)):
        shared.begin()
        with pytest.raises(RuntimeError, match=r"call 1 .* other images"):
            list(shared.walk(other, network.space["L"]))


def test_gradients_are_refused(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network()
    shared = SharedPrefixes(network, PrefixPlan(network.space, network.space.stitches, (3,)))
    with pytest.raises(RuntimeError, match="no_grad"):
        list(shared.walk(make_images(), network.space["S"]))
