"""The stitch space of SN-Netv2 (arXiv 2307.00154): which routes there are, in which order. No tensors.

Two anchors of depths ``D0 <= D1``. Block ``i`` of the large anchor corresponds to block ``m(i) = floor(i * D0 / D1)``
of the small one; the blocks of the large anchor that correspond to one small block are a *group*. A route may change
over wherever a group ends, so that whatever it runs through, no group is run twice or left out. With a whole ratio
``r = D1 / D0`` this is the published construction, ids included; any other ratio follows from the same rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar


class UnknownStitchError(KeyError, ValueError):
    """A stitch was asked for that the space does not have."""

    __str__ = Exception.__str__


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
    """Names a stitching layer by what it joins: the tokens leaving block ``source_block`` of anchor ``source`` become
    the tokens entering block ``target_block`` of anchor ``target`` (``target_block`` may equal the target's depth: then
    nothing of it is left to run and the layer serves a tap only)."""

    source: int
    source_block: int
    target: int
    target_block: int

    def __str__(self) -> str:
        return f"{self.source}_{self.source_block}-{self.target}_{self.target_block}"


@dataclass(frozen=True)
class Stitch:
    """One route through the anchors: ``segments[k]`` and ``segments[k + 1]`` are joined by ``layers[k]``."""

    id: int
    name: str
    kind: str
    segments: tuple[Segment, ...]
    layers: tuple[LayerKey, ...] = ()

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.segments) - 1:
            raise ValueError(f"stitch {self.name}: {len(self.segments)} segments need {len(self.segments) - 1} layers")

    def __str__(self) -> str:
        return f"{self.id} ({self.name})"


@dataclass(frozen=True)
class Tap:
    """Where a route hands out an intermediate output: after ``block`` of ``anchor``, mapped into the width of the
    largest anchor by ``layers``, one after the other (empty for the largest anchor itself)."""

    anchor: int
    block: int
    layers: tuple[LayerKey, ...] = ()


@dataclass(frozen=True)
class StitchSpace:
    """The ordered set of stitches of some anchors: immutable, comparable, indexable by published id or by name.

    Build one with :meth:`two_way`, :meth:`one_way` or :meth:`single`. ``layers`` are all stitching layers that the
    space owns, those that only taps need included; a layer is shared by every stitch that crosses there.
    """

    depths: tuple[int, ...]
    scheme: str
    stitches: tuple[Stitch, ...]
    layers: tuple[LayerKey, ...] = ()

    @classmethod
    def two_way(cls, depths: Sequence[int]) -> StitchSpace:
        """SN-Netv2's space over two anchors, smallest first: S, L, SL, LS, LSL and SLS, with the published ids.

        Raises:
            ValueError: the depths are not two, not in ascending order, or leave no place to change over.
        """
        small, large, pair = _Pair.of(depths)
        sl, ls = pair.small_to_large(), pair.large_to_small()
        stitches = [small, large, *_single_crossings(pair, sl, first_id=2)]
        # The last SL layer leaves nothing of the large anchor to run: it keeps its id, but is no stitch.
        next_id = 2 + len(sl)
        stitches += _single_crossings(pair, ls, first_id=next_id)
        next_id += len(ls)
        for first, inner in ((ls, sl), (sl, ls)):
            for outward in first:
                for back in inner:
                    if back.source_block < outward.target_block or back.target_block >= pair.depth(back.target):
                        continue
                    stitches.append(pair.stitch(next_id, (outward, back)))
                    next_id += 1
        return cls(pair.depths, "two_way", tuple(stitches), (*sl, *ls))

    @classmethod
    def one_way(cls, depths: Sequence[int]) -> StitchSpace:
        """SN-Net's space (arXiv 2302.06586) over two anchors, smallest first: S, L and SL, ids as in :meth:`two_way`.

        Raises:
            ValueError: the depths are not two, not in ascending order, or leave no place to change over.
        """
        small, large, pair = _Pair.of(depths)
        sl = pair.small_to_large()
        return cls(pair.depths, "one_way", (small, large, *_single_crossings(pair, sl, first_id=2)), tuple(sl))

    @classmethod
    def single(cls, depth: int) -> StitchSpace:
        """The space of one anchor alone: one stitch, named ``A``, with id 0."""
        if depth < 1:
            raise ValueError(f"an anchor needs at least one block, got depth {depth}")
        return cls((depth,), "single", (Stitch(0, "A", "A", (Segment(0, 0, depth),)),))

    def __len__(self) -> int:
        return len(self.stitches)

    def __iter__(self) -> Iterator[Stitch]:
        return iter(self.stitches)

    def __contains__(self, key: object) -> bool:
        """Whether this is a stitch of the space, or the id or name of one."""
        if isinstance(key, int | str):
            return (int(key) if isinstance(key, str) and key.isdigit() else key) in self._by_key
        return key in self.stitches

    def __getitem__(self, key: int | str) -> Stitch:
        """The stitch with this published id or this name; a string of digits counts as an id.

        Raises:
            UnknownStitchError: no such stitch; the message says which there are.
        """
        if isinstance(key, str) and key.isdigit():
            key = int(key)
        try:
            return self._by_key[key]
        except KeyError:
            raise UnknownStitchError(self._no_such_stitch(key)) from None

    def select(self, spec: str | Sequence[int | str]) -> tuple[Stitch, ...]:
        """The stitches that a specification names, in the order of the space: ``'all'``, ``'anchors'``, or ids and
        names, in a sequence or separated by commas or ``|``.

        Raises:
            UnknownStitchError: the space lacks one of them.
        """
        if spec == "all":
            return self.stitches
        if spec == "anchors":
            return self.anchors
        keys = spec.replace("|", ",").split(",") if isinstance(spec, str) else spec
        chosen = {self[key.strip() if isinstance(key, str) else key].id for key in keys}
        return tuple(stitch for stitch in self.stitches if stitch.id in chosen)

    @property
    def anchors(self) -> tuple[Stitch, ...]:
        """The stitches that are an anchor alone, smallest anchor first."""
        alone = (s for s in self.stitches if len(s.segments) == 1)
        return tuple(sorted(alone, key=lambda s: s.segments[0].anchor))

    def taps(self, stitch: Stitch, out_indices: Sequence[int]) -> tuple[Tap, ...]:
        """Where ``stitch`` taps for each of ``out_indices``, blocks of the largest anchor, in their order.

        While the route is in the small anchor, block ``m(i)`` stands for block ``i`` of the large one, and the
        stitching layer that leaves it brings its tokens into the large width.

        Raises:
            ValueError: an index is not a block of the largest anchor.
        """
        return tuple(self._tap(stitch, self._check_block(index)) for index in out_indices)

    def corresponding_block(self, anchor: int, index: int) -> int:
        """The block ``floor(index * D_anchor / D_largest)`` of ``anchor`` that stands for block ``index`` of the
        largest one."""
        return index * self.depths[anchor] // self.depths[-1]

    def _tap(self, stitch: Stitch, index: int) -> Tap:
        largest = len(self.depths) - 1
        for segment in stitch.segments:
            block = self.corresponding_block(segment.anchor, index)
            if block in segment:
                if segment.anchor == largest:
                    return Tap(largest, block)
                return Tap(segment.anchor, block, (self._layer_leaving[segment.anchor, block],))
        raise AssertionError(f"stitch {stitch} has no block for tap {index}")

    def _check_block(self, index: int) -> int:
        if not 0 <= index < self.depths[-1]:
            raise ValueError(f"out_indices are blocks of the largest anchor, 0 to {self.depths[-1] - 1}; got {index}")
        return index

    @cached_property
    def _by_key(self) -> dict[int | str, Stitch]:
        return {key: stitch for stitch in self.stitches for key in (stitch.id, stitch.name)}

    @cached_property
    def _layer_leaving(self) -> dict[tuple[int, int], LayerKey]:
        return {(key.source, key.source_block): key for key in self.layers if key.target > key.source}

    def _no_such_stitch(self, key: object) -> str:
        ids, names = [s.id for s in self.stitches], [s.name for s in self.stitches]
        if isinstance(key, int) and ids[0] < key < ids[-1]:
            return f"stitch id {key} is not in the space: its segments would leave nothing of the large anchor to run"
        skipped = sorted(set(range(ids[-1])) - set(ids))
        without = f" without {', '.join(map(str, skipped))}" if skipped else ""
        return (
            f"no stitch {key!r} in this space of {len(self)}: ids run from {ids[0]} to {ids[-1]}{without}, "
            f"names are like {', '.join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))}"
        )


@dataclass(frozen=True)
class _Pair:
    """The correspondence between the blocks of a small (0) and a large (1) anchor."""

    depths: tuple[int, int]
    labels: ClassVar[tuple[str, str]] = ("S", "L")

    @staticmethod
    def of(depths: Sequence[int]) -> tuple[Stitch, Stitch, _Pair]:
        if len(depths) != 2:
            raise ValueError(f"this space stitches two anchors, got depths {tuple(depths)}")
        d0, d1 = depths
        if not 0 < d0 <= d1:
            raise ValueError(
                f"anchors go from the smallest to the largest and the first may not be the deeper one, "
                f"got depths {d0} and {d1}"
            )
        if d0 == 1:
            raise ValueError(
                f"depths {d0} and {d1} cannot be stitched: an anchor of one block has no place between two blocks "
                "where a route could change over"
            )
        pair = _Pair((d0, d1))
        small = Stitch(0, "S", "S", (Segment(0, 0, d0),))
        large = Stitch(1, "L", "L", (Segment(1, 0, d1),))
        return small, large, pair

    def depth(self, anchor: int) -> int:
        return self.depths[anchor]

    def to_small(self, block: int) -> int:
        return block * self.depths[0] // self.depths[1]

    def group_stop(self, small_block: int) -> int:
        """The first large block beyond the group of ``small_block``: ceil((small_block + 1) * D1 / D0)."""
        return -(-(small_block + 1) * self.depths[1] // self.depths[0])

    def small_to_large(self) -> list[LayerKey]:
        return [LayerKey(0, f, 1, self.group_stop(f)) for f in range(self.depths[0])]

    def large_to_small(self) -> list[LayerKey]:
        """One layer at the end of each group but the last."""
        return [LayerKey(1, self.group_stop(f) - 1, 0, f + 1) for f in range(self.depths[0] - 1)]

    def stitch(self, id_: int, layers: tuple[LayerKey, ...]) -> Stitch:
        anchors = [layers[0].source, *(key.target for key in layers)]
        starts = [0, *(key.target_block for key in layers)]
        stops = [*(key.source_block + 1 for key in layers), self.depth(anchors[-1])]
        segments = tuple(Segment(*bounds) for bounds in zip(anchors, starts, stops, strict=True))
        entries = [layers[0].source_block, *starts[1:]]
        name = "-".join(f"{self.labels[a]}{block}" for a, block in zip(anchors, entries, strict=True))
        return Stitch(id_, name, "".join(self.labels[a] for a in anchors), segments, layers)


def _single_crossings(pair: _Pair, layers: Sequence[LayerKey], first_id: int) -> list[Stitch]:
    return [
        pair.stitch(first_id + k, (key,)) for k, key in enumerate(layers) if key.target_block < pair.depth(key.target)
    ]
