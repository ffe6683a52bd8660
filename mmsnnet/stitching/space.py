"""The stitch space of SN-Netv2 (arXiv 2307.00154): all routes, in order. No tensors.

Take two anchors of depths ``D0 <= D1``. Block ``i`` of the large anchor corresponds to block
``m(i) = floor(i * D0 / D1)`` of the small one; the blocks of the large anchor that correspond to one small block are a
*group*. A route may cross to the other anchor wherever a group ends, and goes on with the next group there. So for each
group it runs either the group itself or its one small block, exactly once. A route crosses at most twice: there, or
there and back. If ``D1`` is a multiple of ``D0``, this gives the published stitches with their published ids. The same
rule covers other depths.

With three or more anchors, each *pair* of neighbours is stitched this way, and no route leaves its pair. Within a pair,
the published ids 0 and 1 are the two anchors, and ``D0 + (D0 - 1)^2`` further ids ``p >= 2`` are its crossing routes.
Here the ``K`` anchors come first (ids 0 to ``K - 1``), then the crossing routes of each pair in turn, the smallest pair
first: ``p`` becomes ``K + n + p - 2``, where ``n`` is the number of such ids of the earlier pairs. With two anchors
this is ``p``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from string import ascii_uppercase

from mmsnnet.errors import UserError


class UnknownStitchError(UserError, KeyError, ValueError):
    """The space has no such stitch."""

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
    """The key of a stitching layer: the two blocks that it joins.

    The layer maps the output of block ``source_block`` of anchor ``source`` to the input of block ``target_block`` of
    anchor ``target``. If ``target_block`` equals the target's depth, no block follows: only taps use the layer.
    """

    source: int
    source_block: int
    target: int
    target_block: int

    def __str__(self) -> str:
        return f"{self.source}_{self.source_block}-{self.target}_{self.target_block}"


@dataclass(frozen=True)
class Stitch:
    """One route through the anchors: ``layers[k]`` joins ``segments[k]`` and ``segments[k + 1]``."""

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
    """An intermediate output of a route: the output of ``block`` of ``anchor``, mapped by ``layers``.

    Each of ``layers`` maps into the next larger anchor, so the result has the width of the largest one. A tap of the
    largest anchor has no layers.
    """

    anchor: int
    block: int
    layers: tuple[LayerKey, ...] = ()


@dataclass(frozen=True)
class StitchSpace:
    """The ordered set of stitches over some anchors, indexed by published id or by name.

    Build a space with :meth:`two_way`, :meth:`one_way` or :meth:`single`; :meth:`only` reduces it to one stitch.

    Attributes:
        depths: the number of blocks of each anchor, smallest anchor first.
        scheme: ``'two_way'``, ``'one_way'`` or ``'single'``.
        stitches: all stitches, by ascending id.
        layers: all stitching layers, including those that only taps use. Stitches that cross at the same place share
            the layer.
    """

    depths: tuple[int, ...]
    scheme: str
    stitches: tuple[Stitch, ...]
    layers: tuple[LayerKey, ...] = ()

    @classmethod
    def two_way(cls, depths: Sequence[int]) -> StitchSpace:
        """Build SN-Netv2's space over anchors of these depths, smallest first.

        It has the anchors, then SL, LS, LSL and SLS of each pair of neighbours, with the published ids. The top of this
        file states the ids for more than one pair. Two anchors are named S and L, three S, M and L, more A, B, C, ...
        The name ``S4-L10`` leaves the small anchor after its block 4 and enters the large one at its block 10.

        Raises:
            ValueError: there are fewer than two depths or more than 26; or the message names a pair of neighbours whose
                depths do not ascend, or whose smaller anchor has only one block, so that no route can cross.
        """
        labels = _labels(depths)
        pairs = [_Pair(small, of_pair) for small, of_pair in enumerate(pairwise(depths))]
        stitches = [_stitch(labels, depths, index, start=index) for index in range(len(depths))]
        next_id = len(depths)
        for pair in pairs:
            for id_, layers in enumerate(pair.routes(), start=next_id):
                # No block of the large anchor follows the last SL layer. It is no stitch and serves taps only. Its id
                # stays unused, so that all other ids are the published ones.
                if layers[-1].target_block < depths[layers[-1].target]:
                    stitches.append(_stitch(labels, depths, id_, layers[0].source, layers))
            next_id += len(pair.routes())
        keys = tuple(key for pair in pairs for key in (*pair.small_to_large(), *pair.large_to_small()))
        return cls(tuple(depths), "two_way", tuple(stitches), keys)

    @classmethod
    def one_way(cls, depths: Sequence[int]) -> StitchSpace:
        """Build SN-Net's space (arXiv 2302.06586): the anchors, and SL of each pair of neighbours.

        Ids and names are those of :meth:`two_way`.

        Raises:
            ValueError: as :meth:`two_way`.
        """
        both = cls.two_way(depths)
        layers = tuple(key for key in both.layers if key.source < key.target)
        stitches = tuple(stitch for stitch in both if set(stitch.layers) <= set(layers))
        return cls(both.depths, "one_way", stitches, layers)

    @classmethod
    def single(cls, depth: int) -> StitchSpace:
        """Build the space of one anchor: one stitch, named ``A``, with id 0."""
        if depth < 1:
            raise ValueError(f"an anchor needs at least one block, got depth {depth}")
        return cls((depth,), "single", (Stitch(0, "A", "A", (Segment(0, 0, depth),)),))

    @classmethod
    def of(cls, scheme: str, depths: Sequence[int]) -> StitchSpace:
        """Build a space by the name of its scheme, ``'two_way'`` or ``'one_way'``.

        One depth gives :meth:`single`, for either scheme.

        Raises:
            ValueError: there is no such scheme, or as :meth:`two_way`.
        """
        schemes = {"two_way": cls.two_way, "one_way": cls.one_way}
        if scheme not in schemes:
            raise ValueError(f"scheme is one of {', '.join(schemes)}; got {scheme!r}")
        return cls.single(depths[0]) if len(depths) == 1 else schemes[scheme](depths)

    def only(self, key: int | str, layers: Collection[LayerKey]) -> StitchSpace:
        """Reduce the space to one stitch, which keeps its id and name.

        Args:
            key: id or name of the stitch.
            layers: the stitching layers to keep: those that the route crosses and its taps use. They keep their names,
                so that a checkpoint of the whole model has the weights under the names that this stitch needs.

        Raises:
            UnknownStitchError: the space has no stitch of this id or name.
        """
        return replace(self, stitches=(self[key],), layers=tuple(layer for layer in self.layers if layer in layers))

    def __len__(self) -> int:
        return len(self.stitches)

    def __iter__(self) -> Iterator[Stitch]:
        return iter(self.stitches)

    def __contains__(self, key: object) -> bool:
        """Whether ``key`` is a stitch of the space, or the id or name of one."""
        if isinstance(key, int | str):
            return (int(key) if isinstance(key, str) and key.isdigit() else key) in self._by_key
        return key in self.stitches

    def __getitem__(self, key: int | str) -> Stitch:
        """The stitch with this published id or name; a string of digits is an id.

        Raises:
            UnknownStitchError: there is no such stitch; the message states the range of ids and some names.
        """
        if isinstance(key, str) and key.isdigit():
            key = int(key)
        try:
            return self._by_key[key]
        except KeyError:
            raise UnknownStitchError(self._no_such_stitch(key)) from None

    def select(self, spec: str | Sequence[int | str]) -> tuple[Stitch, ...]:
        """Select stitches, in the order of the space.

        Args:
            spec: ``'all'``, ``'anchors'``, or ids and names, as a sequence or separated by commas or ``|``.

        Raises:
            UnknownStitchError: the space lacks one of them.
        """
        if spec == "all":
            return self.stitches
        if spec == "anchors" and self.anchors:
            return self.anchors
        keys = spec.replace("|", ",").split(",") if isinstance(spec, str) else spec
        chosen = {self[key.strip() if isinstance(key, str) else key].id for key in keys}
        return tuple(stitch for stitch in self.stitches if stitch.id in chosen)

    @property
    def anchors(self) -> tuple[Stitch, ...]:
        """The stitches that run one anchor only, smallest anchor first."""
        alone = (s for s in self.stitches if len(s.segments) == 1)
        return tuple(sorted(alone, key=lambda s: s.segments[0].anchor))

    def taps(self, stitch: Stitch, out_indices: Sequence[int]) -> tuple[Tap, ...]:
        """The tap of ``stitch`` for each of ``out_indices``, in their order.

        While the route is in a smaller anchor, it taps the block that corresponds to the index. The stitching layer
        that leaves this block maps its output to the output of a block of the next larger anchor. The layer that leaves
        that block maps it further, up to the width of the largest anchor.

        Args:
            out_indices: blocks of the largest anchor.

        Raises:
            ValueError: an index is not a block of the largest anchor.
        """
        return tuple(self._tap(stitch, index) for index in out_indices)

    def corresponding_block(self, anchor: int, index: int) -> int:
        """The block of ``anchor`` that corresponds to block ``index`` of the largest anchor.

        It is ``floor(index * D / D_larger)``, computed from each anchor to the next smaller one, down to ``anchor``.
        """
        # Not in one step: at depths 8, 12, 24 floor(index * 8 / 24) can name a block that a route does not run.
        for smaller in range(len(self.depths) - 2, anchor - 1, -1):
            index = index * self.depths[smaller] // self.depths[smaller + 1]
        return index

    def _tap(self, stitch: Stitch, index: int) -> Tap:
        if not 0 <= index < self.depths[-1]:
            raise ValueError(f"out_indices are blocks of the largest anchor, 0 to {self.depths[-1] - 1}; got {index}")
        # A route runs exactly one of the corresponding blocks. Let the route be in the pair (a, a + 1), where block u
        # of a + 1 and block m(u) of a correspond to the index. Within its pair the route runs each group once: the
        # group of m(u), which contains u, either as block m(u) of a or whole in a + 1. This needs m(u) to be the block
        # of u's group, and floor(index * D_a / D_largest) is not always that block: at depths 8, 12, 24 and index 3,
        # u = 1 and m(u) = 0, not 1.
        for segment in stitch.segments:
            block = self.corresponding_block(segment.anchor, index)
            if block in segment:
                return Tap(segment.anchor, block, self._path_to_largest(segment.anchor, block))
        raise AssertionError(f"stitch {stitch} has no block for tap {index}")

    def _path_to_largest(self, anchor: int, block: int) -> tuple[LayerKey, ...]:
        path: list[LayerKey] = []
        while anchor < len(self.depths) - 1:
            path.append(self._layer_leaving[anchor, block])
            anchor, block = path[-1].target, path[-1].target_block - 1
        return tuple(path)

    @cached_property
    def _by_key(self) -> dict[int | str, Stitch]:
        return {key: stitch for stitch in self.stitches for key in (stitch.id, stitch.name)}

    @cached_property
    def _layer_leaving(self) -> dict[tuple[int, int], LayerKey]:
        return {(key.source, key.source_block): key for key in self.layers if key.target > key.source}

    def _no_such_stitch(self, key: object) -> str:
        if len(self) == 1:
            return f"no stitch {key!r} in this space of one: {self.stitches[0]}"
        ids, names = [s.id for s in self.stitches], [s.name for s in self.stitches]
        if isinstance(key, int) and ids[0] < key < ids[-1]:
            return f"stitch id {key} is not in the space: {self._why_skipped(key)}"
        gaps = [(a + 1, b - 1) for a, b in pairwise(ids) if b > a + 1]
        skipped = ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in gaps)
        without = f" without {skipped}" if skipped else ""
        return (
            f"no stitch {key!r} in this space of {len(self)}: ids run from {ids[0]} to {ids[-1]}{without}, "
            f"names are like {', '.join(dict.fromkeys((names[0], names[len(names) // 2], names[-1])))}"
        )

    def _why_skipped(self, id_: int) -> str:
        """Why an id between the first and the last one has no stitch."""
        if self.scheme == "one_way":
            both = StitchSpace.two_way(self.depths)
            if id_ in both:
                return f"{both[id_].name} changes over to a smaller anchor, which only scheme 'two_way' allows"
        before = max((stitch for stitch in self if stitch.id < id_), key=lambda stitch: stitch.id)
        larger = _labels(self.depths)[before.segments[-1].anchor]
        return f"its route would run nothing of the larger anchor, {larger}, after the crossing"


@dataclass(frozen=True)
class _Pair:
    """Two neighbouring anchors, ``small`` and ``small + 1``, and their depths."""

    small: int
    depths: tuple[int, int]

    def __post_init__(self) -> None:
        small, large = self.depths
        refused = f"anchors {self.small} and {self.small + 1} cannot be stitched"
        if not 0 < small <= large:
            raise ValueError(
                f"{refused}: order the anchors from the smallest to the largest, none deeper than the next; got depths "
                f"{small} and {large}"
            )
        if small == 1:
            raise ValueError(
                f"{refused}: a route changes over between two blocks, and an anchor of one block has no such place; "
                f"got depths {small} and {large}"
            )

    def group_stop(self, small_block: int) -> int:
        """The first large block after the group of ``small_block``: ceil((small_block + 1) * D1 / D0)."""
        return -(-(small_block + 1) * self.depths[1] // self.depths[0])

    def small_to_large(self) -> list[LayerKey]:
        """One layer at the end of each block of the small anchor."""
        return [LayerKey(self.small, f, self.small + 1, self.group_stop(f)) for f in range(self.depths[0])]

    def large_to_small(self) -> list[LayerKey]:
        """One layer at the end of each group but the last."""
        return [LayerKey(self.small + 1, self.group_stop(f) - 1, self.small, f + 1) for f in range(self.depths[0] - 1)]

    def routes(self) -> list[tuple[LayerKey, ...]]:
        """The layers of each route in published order (SL, LS, LSL, SLS).

        There is one entry for each published id from 2 on.
        """
        sl, ls = self.small_to_large(), self.large_to_small()
        there_and_back = [
            (there, back)
            for first, second in ((ls, sl[:-1]), (sl, ls))
            for there in first
            for back in second
            if back.source_block >= there.target_block
        ]
        return [*((key,) for key in (*sl, *ls)), *there_and_back]


def _labels(depths: Sequence[int]) -> str:
    """One letter for each anchor, for names and kinds."""
    if not 2 <= len(depths) <= len(ascii_uppercase):
        most = len(ascii_uppercase)
        raise ValueError(f"a stitch space takes two anchors or more, {most} at most; got depths {tuple(depths)}")
    return {2: "SL", 3: "SML"}.get(len(depths), ascii_uppercase[: len(depths)])


def _stitch(labels: str, depths: Sequence[int], id_: int, start: int, layers: tuple[LayerKey, ...] = ()) -> Stitch:
    """Build the route from the stem of anchor ``start`` through ``layers`` to the end."""
    anchors = [start, *(key.target for key in layers)]
    starts = [0, *(key.target_block for key in layers)]
    stops = [*(key.source_block + 1 for key in layers), depths[anchors[-1]]]
    segments = tuple(Segment(*bounds) for bounds in zip(anchors, starts, stops, strict=True))
    kind = "".join(labels[anchor] for anchor in anchors)
    if not layers:
        return Stitch(id_, kind, kind, segments)
    entries = [layers[0].source_block, *starts[1:]]
    name = "-".join(f"{label}{block}" for label, block in zip(kind, entries, strict=True))
    return Stitch(id_, name, kind, segments, layers)
