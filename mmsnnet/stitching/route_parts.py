"""The parts of a stitched network that a route runs, and the parameters of each part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from mmsnnet.stitching.anchors.base import CLASSIFIER, NORM, SHARED, STEM, Component
from mmsnnet.stitching.network import StitchedNetwork
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import LayerKey, Stitch


class AnchorPart(NamedTuple):
    """A component of an anchor."""

    anchor: int
    component: Component


Part = AnchorPart | LayerKey


def route_parts(stitch: Stitch) -> Iterator[Part]:
    """Yield the parts of a whole route, in order."""
    yield AnchorPart(stitch.segments[0].anchor, STEM)
    for segment, crossing in zip(stitch.segments, (*stitch.layers, None), strict=True):
        yield AnchorPart(segment.anchor, SHARED)
        for block in range(segment.start, segment.stop):
            yield AnchorPart(segment.anchor, Component("block", block))
        if crossing is not None:
            yield crossing


def tap_parts(space: StitchSpace, stitch: Stitch, out_indices: Sequence[int]) -> list[Part]:
    """The parts that a route runs for its taps, in order.

    They end at the last tap, and include the layers that project taps. A layer that a tap and a crossing share is
    listed twice, but runs once.
    """
    waiting: dict[Part, tuple[LayerKey, ...]] = {
        AnchorPart(tap.anchor, Component("block", tap.block)): tap.layers for tap in space.taps(stitch, out_indices)
    }
    parts: list[Part] = []
    for part in route_parts(stitch):
        parts += [part, *waiting.pop(part, ())]
        if not waiting:
            break
    return parts


def classifier_parts(stitch: Stitch) -> list[Part]:
    """The parts of a whole route and the norm and classifier of its last anchor, in order."""
    end = (CLASSIFIER,) if stitch.skips_final_norm else (NORM, CLASSIFIER)
    return [*route_parts(stitch), *(AnchorPart(stitch.segments[-1].anchor, component) for component in end)]


def parts_run(space: StitchSpace, stitch: Stitch, out_indices: Sequence[int] | None) -> list[Part]:
    """The parts that a route runs, in order.

    They are those of its taps at ``out_indices``, or those of its classifier if ``out_indices`` is None.
    """
    return classifier_parts(stitch) if out_indices is None else tap_parts(space, stitch, out_indices)


def part_parameters(network: StitchedNetwork, part: Part) -> list[nn.Parameter]:
    """The parameters that a part of ``network`` uses, frozen ones included."""
    if isinstance(part, LayerKey):
        return list(network.layer(part).parameters())
    return network.anchor(part.anchor).parameters_of(part.component)
