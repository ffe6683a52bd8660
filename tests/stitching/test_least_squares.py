"""Least-squares initialisation against torch.linalg.lstsq on all tokens at once."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mmsnnet.stitching import (
    Anchor,
    LayerKey,
    NormalEquations,
    StitchedNetwork,
    StitchSpace,
    solve_normal_equations,
)

MakeImages = Callable[..., Tensor]
MakeNetwork = Callable[..., StitchedNetwork]


def tokens_leaving(anchor: Anchor, images: Tensor) -> list[Tensor]:
    """The output tokens (M, C) of each block, prefix tokens included, from timm's forward."""
    with torch.no_grad():
        pairs = anchor.model.forward_intermediates(
            images, intermediates_only=True, return_prefix_tokens=True, output_fmt="NLC"
        )
    return [torch.cat([prefix, patches], dim=1).flatten(0, 1).double() for patches, prefix in pairs]


def pairs_of(network: StitchedNetwork, images: Tensor) -> dict[LayerKey, tuple[Tensor, Tensor]]:
    """The input tokens of each layer, with a 1 appended, and its target tokens."""
    leaving = [tokens_leaving(network.anchor(i), images) for i in range(2)]
    pairs = {}
    for key in network.space.layers:
        x, y = leaving[key.source][key.source_block], leaving[key.target][key.target_block - 1]
        pairs[key] = torch.cat([x, torch.ones_like(x[:, :1])], dim=1), y
    return pairs


def initialise(network: StitchedNetwork, batches: Sequence[Tensor]) -> NormalEquations:
    equations = NormalEquations(network)
    for images in batches:
        equations.add(images)
    equations.solve()
    return equations


def solution(network: StitchedNetwork, key: LayerKey) -> Tensor:
    """The weight and bias of a layer as one matrix (in + 1, out)."""
    layer = network.layer(key)
    return torch.cat([layer.weight.T, layer.bias[None]]).detach().double()


def residual(x: Tensor, y: Tensor, weights: Tensor) -> float:
    return (x @ weights - y).square().sum().item()


# The network's layers


@pytest.mark.parametrize("windows", [(2, 0), (2, 2), (3, 2)])
def test_windows_change_what_is_seen_but_not_which_tokens_correspond(
    windows: tuple[int, int], make_anchor: Callable[..., Anchor], make_images: MakeImages
) -> None:
    """Two copies of an anchor whose blocks are identities: every layer is solved as the identity."""
    pair = [make_anchor(2, 32, img_size=64, window_size=w or None, global_blocks=(0,) if w else None) for w in windows]
    pair[1].load_state_dict(pair[0].state_dict())
    for anchor in pair:
        for block in anchor.model.blocks:
            block.ls1.gamma.data.zero_()
            block.ls2.gamma.data.zero_()
    network = StitchedNetwork(pair, StitchSpace.two_way((2, 2)), rank=0).double().eval()
    initialise(network, [make_images(8, 64, 48, dtype=torch.float64)])
    for key in network.space.layers:
        torch.testing.assert_close(network.layer(key).weight, torch.eye(32).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("depths", [(2, 4), (3, 3), (2, 3)])
@pytest.mark.parametrize("batches", [[40], [7, 20, 13]])
@pytest.mark.parametrize("model", ["deit3_small_patch16_224", "vit_little_patch16_reg4_gap_256"])
def test_every_layer_is_the_least_squares_solution(
    depths: tuple[int, int], batches: list[int], model: str, make_network: MakeNetwork, make_images: MakeImages
) -> None:
    network = make_network(depths, model=model).double()
    images = make_images(40, dtype=torch.float64)
    for layer in network.layers.values():
        torch.nn.init.zeros_(layer.lora_B)
    initialise(network, images.split(batches))
    assert network.initialized
    for key, (x, y) in pairs_of(network, images).items():
        expected = torch.linalg.lstsq(x, y).solution
        torch.testing.assert_close(solution(network, key), expected, rtol=1e-6, atol=1e-7, msg=str(key))
        torch.testing.assert_close(network.layer(key)(x[:, :-1]), x @ expected, rtol=1e-6, atol=1e-7)


def test_in_float32_the_residual_is_within_one_percent(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((2, 4)), make_images(40, 32, 48)
    initialise(network, images.split(16))
    for key, (x, y) in pairs_of(network, images).items():
        best = residual(x, y, torch.linalg.lstsq(x, y).solution)
        assert best > 0
        assert residual(x, y, solution(network, key)) <= 1.01 * best, str(key)


def test_order_and_batching_of_images_do_not_matter(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4)).double()
    other = copy.deepcopy(network)
    images = make_images(40, dtype=torch.float64)
    initialise(network, images.split(40))
    initialise(other, images[torch.randperm(40)].split([1, 5, 30, 4]))
    for key in network.space.layers:
        torch.testing.assert_close(solution(network, key), solution(other, key), rtol=1e-8, atol=1e-8)


def test_sums_of_two_halves_are_the_sums_of_the_whole(make_network: MakeNetwork, make_images: MakeImages) -> None:
    """The sums of several processes add up, as in a distributed run."""
    network = make_network((2, 4)).double()
    images = make_images(40, dtype=torch.float64)
    whole = initialise(network, [images])
    expected = {key: solution(network, key) for key in network.space.layers}

    halves = [NormalEquations(network) for _ in range(2)]
    for half, part in zip(halves, (images[:25], images[25:]), strict=True):
        half.add(part)
    for ours, theirs, total in zip(*(equations.sums() for equations in (*halves, whole)), strict=True):
        ours.add_(theirs)
        torch.testing.assert_close(ours, total, rtol=1e-10, atol=1e-8)
    for layer in network.layers.values():
        layer.set_base(torch.zeros_like(layer.weight), torch.zeros_like(layer.bias))
    halves[0].solve()
    for key in network.space.layers:
        torch.testing.assert_close(solution(network, key), expected[key], rtol=1e-8, atol=1e-8)


def test_memory_does_not_depend_on_the_number_of_images(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4), widths=(32, 48))
    equations = NormalEquations(network)
    sizes = []
    for batch in (0, 1, 30):
        if batch:
            equations.add(make_images(batch))
        sizes.append(sum(total.numel() for total in equations.sums()))
        assert all(total.dtype == torch.float64 for total in equations.sums())
    # x x^T after small blocks 0, 1 and large block 1; x y^T for 0-1 (shared by both directions) and 1-3
    assert sizes == [2 * 33 * 33 + 49 * 49 + 2 * 33 * 49] * 3


def test_an_update_that_is_none_stays_none(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 2), rank=4)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    initialise(network, [make_images(20)])
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"layers.{key}.{part}" for key in network.space.layers for part in ("weight", "bias")}


def test_equal_anchors_are_joined_by_near_identities(
    make_anchor: Callable[..., Anchor], make_images: MakeImages
) -> None:
    anchor = make_anchor(depth=4).double()
    network = StitchedNetwork([anchor, copy.deepcopy(anchor)], StitchSpace.two_way((4, 4))).double().eval()
    initialise(network, make_images(60, dtype=torch.float64).split(20))
    unseen = make_images(2, 32, 48, seed=1, dtype=torch.float64)
    with torch.no_grad():
        expected = anchor.model.forward_intermediates(unseen, intermediates_only=True)
        for stitch in network.space:
            for tap, own in zip(network(unseen, stitch, range(4)), expected, strict=True):
                assert (tap - own).norm() < 1e-4 * own.norm(), str(stitch)


@pytest.mark.parametrize("fails", [False, True])
def test_training_modes_come_back(fails: bool, make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4), drop_path_rate=0.2).train()
    network.anchor(0).freeze(1)
    network.layers.eval()
    modes = [module.training for module in network.modules()]
    assert len(set(modes)) == 2
    equations = NormalEquations(network)
    if fails:
        with pytest.raises(ValueError, match="have 2 channels"):
            equations.add(make_images()[:, :2])
    else:
        equations.add(make_images())
    assert [module.training for module in network.modules()] == modes


def test_drop_path_is_off(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((2, 4), drop_path_rate=0.5, proj_drop_rate=0.5), make_images(4)
    sums = []
    for mode in (True, False):
        equations = NormalEquations(network.train(mode))
        equations.add(images)
        sums.append(list(equations.sums()))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*sums, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite(value: float, make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((2, 4)), make_images(20)
    images[3, 0, 5, 5] = value
    with pytest.raises(ValueError, match="not finite"):
        initialise(network, [images])
    assert not network.initialized


def test_no_images(make_network: MakeNetwork) -> None:
    network = make_network((2, 4))
    with pytest.raises(ValueError, match="at least one image"):
        initialise(network, [])
    assert not network.initialized


# The equations


def sums_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    return x, x.T @ x, x.T @ y


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_channels_of_very_different_size(spread: float) -> None:
    """ViTs have a few huge channels; without scaling, the solution would lose the small ones."""
    scales = torch.logspace(0, 1, 12, base=spread, dtype=torch.float64)
    x = torch.randn(200, 12, dtype=torch.float64) * scales + 3
    y = x / scales @ torch.randn(12, 5, dtype=torch.float64) + torch.randn(200, 5, dtype=torch.float64)
    rows, gram, cross = sums_of(x, y)
    weight, bias = solve_normal_equations(gram, cross)
    expected = torch.linalg.lstsq(rows, y).solution
    torch.testing.assert_close(weight.T * scales[:, None], expected[:-1] * scales[:, None], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bias, expected[-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "case", ["fewer tokens than channels", "repeated channels", "dead channel", "constant channel"]
)
def test_rank_deficient_tokens_leave_no_more_error_than_lstsq(case: str) -> None:
    x = torch.randn(8 if case.startswith("fewer") else 60, 20, dtype=torch.float64)
    y = torch.randn(len(x), 6, dtype=torch.float64)
    if case == "repeated channels":
        x[:, 10:] = 2 * x[:, :10]
    elif case == "dead channel":
        x[:, 3] = 0
    elif case == "constant channel":
        x[:, 3] = 5
    rows, gram, cross = sums_of(x, y)
    weight, bias = solve_normal_equations(gram, cross)
    assert weight.isfinite().all() and weight.abs().max() < 1e3
    best = residual(rows, y, torch.linalg.lstsq(rows, y, driver="gelsd").solution)
    assert residual(rows, y, torch.cat([weight.T, bias[None]])) <= 1.01 * best + 1e-8 * y.square().sum()


def test_rank_deficient_channels_of_very_different_size() -> None:
    x = torch.randn(60, 10, dtype=torch.float64) * torch.logspace(-4, 4, 10, dtype=torch.float64)
    x = torch.cat([x, 2 * x], dim=1)
    y = x[:, :1] * 1e4 + torch.randn(60, 6, dtype=torch.float64)
    rows, gram, cross = sums_of(x, y)
    weight, bias = solve_normal_equations(gram, cross)
    distinct = rows[:, [*range(10), 20]]
    best = residual(distinct, y, torch.linalg.lstsq(distinct, y).solution)
    assert residual(rows, y, torch.cat([weight.T, bias[None]])) <= 1.01 * best


def test_one_image_is_enough(make_network: MakeNetwork, make_images: MakeImages) -> None:
    """5 tokens for 33 or 49 unknowns have a solution without error."""
    network, images = make_network((2, 4)).double(), make_images(1, dtype=torch.float64)
    initialise(network, [images])
    for key, (x, y) in pairs_of(network, images).items():
        assert residual(x, y, solution(network, key)) < 1e-6 * y.square().sum(), str(key)


def test_sums_are_left_as_they_are() -> None:
    _, gram, cross = sums_of(torch.randn(50, 4, dtype=torch.float64), torch.randn(50, 3, dtype=torch.float64))
    before = gram.clone(), cross.clone()
    solve_normal_equations(gram, cross)
    assert torch.equal(gram, before[0]) and torch.equal(cross, before[1])
