"""The parts of a route: each parameter belongs to one part."""

from collections.abc import Callable

from mmsnnet.stitching import Component, StitchedNetwork
from mmsnnet.stitching.anchors.base import SHARED, STEM
from mmsnnet.stitching.route_parts import AnchorPart, Part, classifier_parts, part_parameters, route_parts, tap_parts


def test_a_parameter_belongs_to_one_part(make_network: Callable[..., StitchedNetwork]) -> None:
    network = make_network(depths=(2, 3, 4), widths=(32, 32, 48), classifier=True, num_classes=3)
    parts: dict[Part, None] = dict.fromkeys(network.space.layers)
    for stitch in network.space:
        parts |= dict.fromkeys(classifier_parts(stitch))
    actual = [parameter for part in parts for parameter in part_parameters(network, part)]
    assert len(actual) == len(set(actual))
    assert set(actual) == set(network.parameters())


def test_a_tap_uses_its_layers_where_it_is(make_network: Callable[..., StitchedNetwork]) -> None:
    space = make_network(depths=(2, 4)).space
    layers = space.layers
    stem, shared = AnchorPart(0, STEM), AnchorPart(0, SHARED)
    blocks = [AnchorPart(0, Component("block", block)) for block in range(2)]
    assert list(route_parts(space["S"])) == [stem, shared, *blocks]
    assert tap_parts(space, space["S"], (1, 3)) == [stem, shared, blocks[0], layers[0], blocks[1], layers[1]]
    assert tap_parts(space, space["S"], (1,)) == [stem, shared, blocks[0], layers[0]]
    crossed = tap_parts(space, space["S0-L2"], (1, 3))
    assert crossed[:5] == [stem, shared, blocks[0], layers[0], layers[0]] and crossed[-1] == AnchorPart(
        1, Component("block", 3)
    )
