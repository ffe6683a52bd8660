"""A stitch: a route through the anchors as data, with its name and the keys of its stitching layers."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from string import ascii_uppercase


@dataclass(frozen=True)
class Segment:
    """A run of consecutive blocks ``[start, stop)`` of one anchor."""

    anchor: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"a segment needs 0 <= start < stop, got [{self.start}, {self.stop})")

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and self.start <= block < self.stop

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, order=True)
class LayerKey:
    """The key of a stitching layer: the two blocks that it joins, counted over all stages.

    The layer maps the output of block ``source_block`` of anchor ``source`` to the input of block ``target_block`` of
    anchor ``target``. If ``target_block`` equals the target's depth, no block follows: only taps use the layer. A layer
    that several crossings share has the key of the first one.
    """

    source: int
    source_block: int
    target: int
    target_block: int

    def __str__(self) -> str:
        return f"{self.source}_{self.source_block}-{self.target}_{self.target_block}"


@dataclass(frozen=True)
class Stitch:
    """One route through the anchors: ``layers[k]`` joins ``segments[k]`` and ``segments[k + 1]``.

    A route to a classifier may skip the final norm of a plain ViT: its last block is followed by the head.
    """

    id: int
    name: str
    kind: str
    segments: tuple[Segment, ...]
    layers: tuple[LayerKey, ...] = ()
    skips_final_norm: bool = False

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.segments) - 1:
            raise ValueError(f"stitch {self.name}: {len(self.segments)} segments need {len(self.segments) - 1} layers")

    def __str__(self) -> str:
        return f"{self.id} ({self.name})"


@dataclass(frozen=True)
class Tap:
    """An intermediate output of a route: the output of ``block`` of ``anchor``, mapped by ``layers``.

    Each of ``layers`` maps into the next larger anchor, so the result has the width of the largest one. A tap of the
    largest anchor has no layers.
    """

    anchor: int
    block: int
    layers: tuple[LayerKey, ...] = ()


def as_stages(stages: Sequence[int | Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """The blocks in each stage of each anchor; a number stands for one stage."""
    blocks = tuple((one,) if isinstance(one, int) else tuple(one) for one in stages)
    if not all(one and min(one) >= 1 for one in blocks):
        raise ValueError(f"an anchor needs at least one block in each stage, got {as_blocks(blocks)}")
    return blocks


def as_blocks(stages: Sequence[Sequence[int]]) -> tuple[int | tuple[int, ...], ...]:
    """The number of blocks of each anchor; for each stage, if there are several."""
    return tuple(blocks[0] if len(blocks) == 1 else tuple(blocks) for blocks in stages)


def labels(stages: Sequence[Sequence[int]]) -> str:
    """One letter for each anchor, for names and kinds."""
    if not 2 <= len(stages) <= len(ascii_uppercase):
        most = len(ascii_uppercase)
        raise ValueError(f"a stitch space takes two anchors or more, {most} at most; got blocks {as_blocks(stages)}")
    return {2: "SL", 3: "SML"}.get(len(stages), ascii_uppercase[: len(stages)])


class Routes:
    """Makes the stitches over anchors of these stages."""

    def __init__(self, stages: tuple[tuple[int, ...], ...]) -> None:
        self.stages = stages
        self.labels = labels(stages)

    def anchors(self) -> Iterator[Stitch]:
        """The routes through one anchor."""
        return (self.stitch(index, index) for index in range(len(self.stages)))

    def stitch(
        self, id_: int, start: int, crossings: Sequence[LayerKey] = (), layers: Sequence[LayerKey] | None = None
    ) -> Stitch:
        """The route from the stem of anchor ``start`` through ``crossings`` to the end.

        Args:
            layers: the key of the layer at each crossing, by default the crossing's own.
        """
        anchors = [start, *(key.target for key in crossings)]
        starts = [0, *(key.target_block for key in crossings)]
        stops = [*(key.source_block + 1 for key in crossings), sum(self.stages[anchors[-1]])]
        segments = tuple(Segment(*bounds) for bounds in zip(anchors, starts, stops, strict=True))
        kind = "".join(self.labels[anchor] for anchor in anchors)
        if not crossings:
            return Stitch(id_, kind, kind, segments)
        blocks = zip(anchors, [crossings[0].source_block, *starts[1:]], strict=True)
        name = "-".join(self.labels[anchor] + self._place(anchor, block) for anchor, block in blocks)
        return Stitch(id_, name, kind, segments, tuple(crossings if layers is None else layers))

    def _place(self, anchor: int, block: int) -> str:
        """A block in names: its number in a stage, after the stage's if there are several."""
        ends = list(accumulate(self.stages[anchor]))
        stage = bisect(ends, block)
        return f"{stage}.{block - ends[stage] + self.stages[anchor][stage]}" if len(ends) > 1 else str(block)
