"""What a route is made of: the parts of a stitched network that it runs, in order, and the parameters of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from mmsnnet.stitching.network import StitchedNetwork
from mmsnnet.stitching.space import LayerKey, Stitch, StitchSpace


@dataclass(frozen=True)
class Component:
    """A part of an anchor: its stem, the positions that its blocks are told (a rotary embedding's learned frequencies),
    one of its blocks, or its classifier."""

    kind: str
    anchor: int
    block: int = 0


Part = Component | LayerKey


def route_parts(stitch: Stitch) -> Iterator[Part]:
    """The parts that a route runs from end to end, in order."""
    yield Component("stem", stitch.segments[0].anchor)
    for segment, crossing in zip(stitch.segments, (*stitch.layers, None), strict=True):
        yield Component("positions", segment.anchor)
        for block in range(segment.start, segment.stop):
            yield Component("block", segment.anchor, block)
        if crossing is not None:
            yield crossing


def tap_parts(space: StitchSpace, stitch: Stitch, out_indices: Sequence[int]) -> list[Part]:
    """The parts that a route runs to hand out its taps, in order: up to the last one, and the layers that project them.
    A layer that both a tap and a crossing use is there twice, and run once."""
    waiting: dict[Part, tuple[LayerKey, ...]] = {
        Component("block", tap.anchor, tap.block): tap.layers for tap in space.taps(stitch, out_indices)
    }
    parts: list[Part] = []
    for part in route_parts(stitch):
        parts += [part, *waiting.pop(part, ())]
        if not waiting:
            break
    return parts


def classifier_parts(stitch: Stitch) -> list[Part]:
    """The parts that a route runs to end in the classifier of its last anchor."""
    return [*route_parts(stitch), Component("classifier", stitch.segments[-1].anchor)]


def part_parameters(network: StitchedNetwork, part: Part) -> list[nn.Parameter]:
    """The parameters that a part of ``network`` uses, frozen ones included."""
    if isinstance(part, LayerKey):
        return list(network.layer(part).parameters())
    anchor = network.anchor(part.anchor)
    if part.kind == "block":
        return list(anchor.block(part.block).parameters())
    of_kind = {
        "stem": anchor.stem_parameters,
        "positions": anchor.position_parameters,
        "classifier": anchor.classifier_parameters,
    }
    return of_kind[part.kind]()
