"""The stitched network: identities that must hold on every route, then routes worked out by hand."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.stitching import Anchor, LayerKey, StitchedNetwork, StitchSpace

MakeAnchor = Callable[..., Anchor]
MakeImages = Callable[..., Tensor]
MakeNetwork = Callable[..., StitchedNetwork]


def count_calls(modules: dict[Any, nn.Module]) -> Counter[Any]:
    """Count the runs of each module, by its key."""
    calls: Counter[Any] = Counter()

    def counter(key: Any) -> Callable[..., None]:
        return lambda *_: calls.update([key])

    for key, module in modules.items():
        module.register_forward_pre_hook(counter(key))
    return calls


def blocks_of(network: StitchedNetwork) -> dict[Any, nn.Module]:
    return {(a, b): block for a in range(2) for b, block in enumerate(network.anchor(a).model.blocks)}


def twins(anchor: Anchor, rank: int = 0) -> StitchedNetwork:
    """An anchor and its copy, joined by identity layers."""
    depths = (anchor.depth, anchor.depth)
    network = StitchedNetwork([anchor, copy.deepcopy(anchor)], StitchSpace.two_way(depths), rank=rank).eval()
    for key in network.space.layers:
        network.layer(key).set_base(torch.eye(anchor.width), torch.zeros(anchor.width))
    return network


# Properties


@pytest.mark.parametrize("kind", [dict(rel_pos_bias=True), dict(window_size=2, global_blocks=(1,))])
@torch.no_grad()
def test_equal_anchors_are_the_anchor_with_windows_or_a_bias_too(
    kind: dict[str, Any], make_anchor: MakeAnchor, make_images: MakeImages
) -> None:
    anchor, images = (
        make_anchor(depth=4, img_size=(48, 64), classifier=True, num_classes=5, **kind),
        make_images(2, 48, 64),
    )
    network = twins(anchor)
    expected = network(images, network.space.anchors[0], range(4))
    logits = network.classify(images, network.space.anchors[0])
    for stitch in network.space:
        for a, b in zip(network(images, stitch, range(4)), expected, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(network.classify(images, stitch), logits)


@torch.no_grad()
def test_taps_as_tokens(make_network: MakeNetwork, make_images: MakeImages) -> None:
    """The class token of an anchor alone is timm's, and the maps are the patches among the tokens."""
    network, images = make_network(depths=(2, 4), widths=(32, 48)), make_images(2, 32, 64)
    for stitch in network.space:
        taps = [tap.data for tap in network.taps(images, stitch, (1, 3))]
        for tap, actual in zip(taps, network(images, stitch, (1, 3)), strict=True):
            assert tap.shape == (2, 1 + 2 * 4, 48)
            assert torch.equal(tap[:, 1:].transpose(1, 2).reshape(2, 48, 2, 4), actual)
    large = network.anchor(1).model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    taps = [tap.data for tap in network.taps(images, network.space["L"], range(4))]
    for tap, prefix in zip(taps, large["image_intermediates_prefix"], strict=True):
        torch.testing.assert_close(tap[:, :1], prefix)


@pytest.mark.parametrize("model", ["deit3_small_patch16_224", "vit_tiny_patch16_224", "vit_base_patch16_gap_224"])
@pytest.mark.parametrize("rank", [0, 4])
@torch.no_grad()
def test_equal_anchors_joined_by_identities_are_the_anchor(
    model: str, rank: int, make_anchor: MakeAnchor, make_images: MakeImages
) -> None:
    anchor = make_anchor(depth=4, model=model, classifier=True, num_classes=5)
    images = make_images(2, 32, 48)
    expected = anchor.model.forward_intermediates(images, intermediates_only=True)
    logits = anchor.model(images)
    network = twins(anchor, rank)
    assert len(network.space) == 14
    for stitch in network.space:
        for index, tap in enumerate(network(images, stitch, range(4))):
            torch.testing.assert_close(tap, expected[index], msg=f"{stitch}, tap {index}")
        torch.testing.assert_close(network.classify(images, stitch), logits)


@torch.no_grad()
def test_equal_anchors_in_a_sliding_window_are_the_anchor_where_each_block_runs_once(
    make_anchor: MakeAnchor, make_images: MakeImages
) -> None:
    """The other routes of the window run blocks of both anchors that correspond."""
    anchor, images = make_anchor(depth=4, classifier=True, num_classes=5), make_images()
    space = StitchSpace.sliding_window((anchor.depth, anchor.depth))
    network = StitchedNetwork([anchor, copy.deepcopy(anchor)], space, rank=0).eval()
    for key in space.layers:
        network.layer(key).set_base(torch.eye(anchor.width), torch.zeros(anchor.width))
    logits, equal = anchor.model(images), 0
    for stitch in space:
        once = sum(map(len, stitch.segments)) == anchor.depth
        found = network.classify(images, stitch)
        equal += once
        assert torch.allclose(found, logits, rtol=1e-5, atol=1e-5) == once
    assert equal == 2 + 3  # the anchors, and a crossing after each block but the last


@pytest.mark.parametrize("depths", [(2, 4), (2, 3), (3, 3)])
@pytest.mark.parametrize(("height", "width", "grid"), [(32, 32, (2, 2)), (32, 96, (2, 6)), (40, 71, (3, 5))])
@torch.no_grad()
def test_every_stitch_gives_one_map_of_the_large_width_per_tap(
    depths: tuple[int, int],
    height: int,
    width: int,
    grid: tuple[int, int],
    make_network: MakeNetwork,
    make_images: MakeImages,
) -> None:
    network, images = make_network(depths, widths=(32, 48)), make_images(2, height, width)
    for stitch in network.space:
        taps = network(images, stitch, (0, depths[1] - 1, 1))
        assert [tap.shape for tap in taps] == [(2, 48, *grid)] * 3
        assert all(tap.is_contiguous() and tap.isfinite().all() for tap in taps)


@torch.no_grad()
def test_taps_come_in_the_order_asked_for(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((3, 6)), make_images()
    for stitch in network.space:
        up = network(images, stitch, (0, 3, 5))
        down = network(images, stitch, (5, 3, 0, 5))
        for a, b in zip((*up[::-1], up[2]), down, strict=True):
            assert torch.equal(a, b)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((2, 4)), make_images(3)
    for stitch in network.space:
        (batched,) = network(images, stitch, (3,))
        alone = [network(image[None], stitch, (3,))[0] for image in images]
        torch.testing.assert_close(batched, torch.cat(alone))


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), (2, 2), (5,), (3, 0), tuple(range(6))])
@torch.no_grad()
def test_nothing_runs_twice_or_beyond_the_last_tap(
    out_indices: tuple[int, ...], make_network: MakeNetwork, make_images: MakeImages
) -> None:
    network = make_network((3, 6))
    stems = {("stem", index): network.anchor(index).model.patch_embed for index in range(2)}
    layers = {key: network.layer(key) for key in network.space.layers}
    calls = count_calls({**blocks_of(network), **stems, **layers})
    for stitch in network.space:
        calls.clear()
        network(make_images(1), stitch, out_indices)

        route = [(s.anchor, b) for s in stitch.segments for b in range(s.start, s.stop)]
        tapped = [place for i in set(out_indices) for place in route if place in ((1, i), (0, i // 2))]
        run = route[: 1 + max(route.index(place) for place in tapped)]
        crossed = [key for key in stitch.layers if (key.target, key.target_block) in run]
        projecting = [key for key in layers if key.source == 0 and (0, key.source_block) in tapped]
        expected = {("stem", stitch.segments[0].anchor), *run, *crossed, *projecting}
        assert calls == dict.fromkeys(expected, 1), str(stitch)


@pytest.mark.parametrize("drop_path_rate", [0.0, 0.3])
def test_recomputing_activations_changes_no_gradient(
    drop_path_rate: float, make_network: MakeNetwork, make_images: MakeImages
) -> None:
    network = make_network((3, 6), drop_path_rate=drop_path_rate).train()
    calls = count_calls(blocks_of(network))
    stitch = network.space["L1-S1-L4"]
    gradients, counts = [], []
    for with_cp in (False, True):
        network.with_cp = with_cp
        network.zero_grad(set_to_none=True)
        calls.clear()
        torch.manual_seed(7)
        torch.cat(network(make_images(), stitch, (1, 3, 5))).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        counts.append(calls.total())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert counts == [5, 10]  # L0 L1 S1 L4 L5, and each of them once more in the backward pass


def test_nothing_is_recomputed_in_evaluation(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4), with_cp=True)
    calls = count_calls(blocks_of(network))
    network(make_images(), network.space["L"], (3,))[0].sum().backward()
    assert calls.total() == 4


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True])
def test_bfloat16_autocast(with_cp: bool, make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((3, 6), with_cp=with_cp).train(), make_images()
    for stitch in network.space:
        exact = network(images, stitch, (1, 3, 5))
        network.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            taps = network(images, stitch, (1, 3, 5))
            loss = sum(tap.float().square().mean() for tap in taps)
        loss.backward()
        for tap, reference in zip(taps, exact, strict=True):
            assert (tap.float() - reference).norm() < 0.05 * reference.norm()
            assert not torch.equal(tap.float(), reference)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        assert gradients and all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)


@torch.no_grad()
def test_merged_computes_the_same_and_leaves_the_original(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((3, 6), rank=4), make_images()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    merged = network.merged()
    assert not any("lora" in name for name in merged.state_dict())
    for stitch in network.space:
        for a, b in zip(network(images, stitch, range(6)), merged(images, stitch, range(6)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for parameter in merged.parameters():
        parameter.zero_()
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
@torch.no_grad()
def test_state_dict_round_trip(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, other, images = make_network((2, 4)), make_network((2, 4)), make_images()
    for layer in network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    assert network.initialized and not other.initialized
    assert not torch.equal(network(images, network.space["S"], (3,))[0], other(images, other.space["S"], (3,))[0])
    other.load_state_dict(network.state_dict())
    assert other.initialized
    for stitch in network.space:
        for a, b in zip(network(images, stitch, (0, 3)), other(images, stitch, (0, 3)), strict=True):
            assert torch.equal(a, b)


def test_initialized_once_every_layer_is(make_network: MakeNetwork, make_anchor: MakeAnchor) -> None:
    network = make_network((2, 2))
    for key in network.space.layers:
        assert not network.initialized
        layer = network.layer(key)
        layer.set_base(layer.weight, layer.bias)
    assert network.initialized
    assert StitchedNetwork([make_anchor()], StitchSpace.single(2)).initialized


# Routes by hand


def dense(network: StitchedNetwork, tokens: Tensor, *key: int) -> Tensor:
    """Apply the layer of this key to tokens, with its update multiplied out."""
    layer = network.layer(LayerKey(*key))
    return F.linear(tokens, layer.weight + layer.lora_B @ layer.lora_A / layer.rank, layer.bias)


def grid(tokens: Tensor) -> Tensor:
    """Tokens (B, 1 + 2 * 3, C) behind a class token as a map (B, C, 2, 3)."""
    return tokens[:, 1:].unflatten(1, (2, 3)).permute(0, 3, 1, 2)


def embed(anchor: Anchor, images: Tensor) -> Tensor:
    return anchor.model._pos_embed(anchor.model.patch_embed(images))


@torch.no_grad()
def test_large_small_large_by_hand(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((3, 6)), make_images(2, 32, 48)
    small, large = (network.anchor(i).model.blocks for i in range(2))
    l1 = large[1](large[0](embed(network.anchor(1), images)))
    s1 = small[1](dense(network, l1, 1, 1, 0, 1))
    l5 = large[5](large[4](dense(network, s1, 0, 1, 1, 4)))
    taps = network(images, network.space["L1-S1-L4"], (1, 3, 5))
    for tap, expected in zip(taps, (l1, dense(network, s1, 0, 1, 1, 4), l5), strict=True):
        torch.testing.assert_close(tap, grid(expected))


@torch.no_grad()
def test_small_large_small_by_hand(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network, images = make_network((3, 6), classifier=True, num_classes=5), make_images(2, 32, 48)
    small, large = (network.anchor(i).model.blocks for i in range(2))
    s0 = small[0](embed(network.anchor(0), images))
    l3 = large[3](large[2](dense(network, s0, 0, 0, 1, 2)))
    s2 = small[2](dense(network, l3, 1, 3, 0, 2))
    stitch = network.space["S0-L2-S2"]
    expected = (dense(network, s0, 0, 0, 1, 2), l3, dense(network, s2, 0, 2, 1, 6))
    for tap, by_hand in zip(network(images, stitch, (0, 3, 5)), expected, strict=True):
        torch.testing.assert_close(tap, grid(by_hand))
    model = network.anchor(0).model
    torch.testing.assert_close(network.classify(images, stitch), model.head(model.norm(s2)[:, 0]))


@torch.no_grad()
def test_a_route_ends_in_the_classifier_of_its_last_anchor(make_anchor: MakeAnchor, make_images: MakeImages) -> None:
    anchors = [
        make_anchor(depth, width, classifier=True, num_classes=n) for depth, width, n in ((3, 32, 5), (3, 48, 7))
    ]
    network = StitchedNetwork(anchors, StitchSpace.two_way((3, 3))).eval()
    images = make_images()
    for stitch in network.space:
        assert network.classify(images, stitch).shape == (2, {"S": 5, "L": 7}[stitch.kind[-1]])
    for anchor, stitch in zip(anchors, network.space.anchors, strict=True):
        torch.testing.assert_close(network.classify(images, stitch), anchor.model(images))


def test_layers_have_the_widths_that_they_join(make_network: MakeNetwork) -> None:
    network = make_network((2, 4), widths=(32, 48), rank=3)
    shapes = {str(key): tuple(network.layer(key).weight.shape) for key in network.space.layers}
    assert shapes == {"0_0-1_2": (48, 32), "0_1-1_4": (48, 32), "1_1-0_1": (32, 48)}
    assert {network.layer(key).rank for key in network.space.layers} == {3}


# Errors


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (dict(patch_size=8), r"patch_size.*\(16, 16\) and \(8, 8\)"),
        (dict(model="vit_base_patch16_gap_224"), "num_prefix_tokens.*1 and 0"),
        (dict(model="vit_little_patch16_reg4_gap_256"), "num_prefix_tokens.*1 and 4"),
        (dict(img_size=(32, 64)), r"img_size.*\(32, 32\) and \(32, 64\)"),
        (dict(depth=3), r"\(2, 2\).*\(2, 3\)"),
        (dict(in_chans=4), "in_chans, the channels of their images; got 3 and 4: set the same in_chans in every"),
        (dict(in_chans=1), "got 3 and 1"),
    ],
)
def test_anchors_that_do_not_fit(other: dict[str, Any], says: str, make_anchor: MakeAnchor) -> None:
    with pytest.raises(SettingError, match=says):
        StitchedNetwork([make_anchor(), make_anchor(**other)], StitchSpace.two_way((2, 2)))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@torch.no_grad()
def test_images_of_any_number_of_channels(channels: int, make_network: MakeNetwork) -> None:
    """Every route takes images of the anchors' number of channels; other images are an error before any layer runs."""
    network = make_network((2, 2), in_chans=channels)
    for stitch in network.space:
        assert network(torch.randn(1, channels, 32, 32), stitch, (1,))[0].shape == (1, 48, 2, 2)
        for other in {1, 3, 5} - {channels}:
            says = rf"have {other} channels, but the anchors take {channels}: set in_chans={other} in every anchor, or"
            with pytest.raises(SettingError, match=says):
                network(torch.randn(1, other, 32, 32), stitch, (1,))


def test_as_many_anchors_as_the_space_has(make_anchor: MakeAnchor) -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2,\)"):
        StitchedNetwork([make_anchor()], StitchSpace.two_way((2, 2)))


@pytest.mark.parametrize("index", [-1, 4])
def test_a_tap_outside_the_largest_anchor(index: int, make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4))
    with pytest.raises(ValueError, match=str(index)):
        network(make_images(), network.space["S"], (index,))


def test_classify_needs_classifiers(make_network: MakeNetwork, make_images: MakeImages) -> None:
    network = make_network((2, 4))
    with pytest.raises(ValueError, match="classifier=True"):
        network.classify(make_images(), network.space["S"])


def test_anchors_in_the_wrong_order(make_anchor: MakeAnchor) -> None:
    anchors = [make_anchor(2, width) for width in (32, 64, 48)]
    with pytest.raises(ValueError, match="anchor 1 is 64 wide and anchor 2 48"):
        StitchedNetwork(anchors, StitchSpace.two_way((2, 2, 2)))
