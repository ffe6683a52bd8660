"""The stitch spaces of SN-Netv2 (arXiv 2307.00154) and SN-Net (arXiv 2302.06586): all routes, in order. No tensors.

Take two anchors of depths ``D0 <= D1``. Block ``i`` of the large anchor corresponds to block
``m(i) = floor(i * D0 / D1)`` of the small one; the blocks of the large anchor that correspond to one small block are a
*group*. A route may cross to the other anchor wherever a group ends, and goes on with the next group there. So for each
group it runs either the group itself or its one small block, exactly once. A route crosses at most twice: there, or
there and back. If ``D1`` is a multiple of ``D0``, this gives the published stitches with their published ids. The same
rule covers other depths.

The blocks of a hierarchical model are divided into stages, and the rule holds stage by stage: block ``i`` of a stage of
``n1`` blocks corresponds to block ``floor(i * n0 / n1)`` of the same stage of the small anchor, which has ``n0`` there.
Where the small anchor is the deeper one, a group of its blocks corresponds to one large block. A plain ViT has one
stage.

With three or more anchors, each *pair* of neighbours is stitched this way, and no route leaves its pair. Within a pair,
the published ids 0 and 1 are the two anchors, and ``G + (G - 1)^2`` further ids ``p >= 2`` are its crossing routes,
where ``G`` is the number of groups (``D0`` without stages).
Here the ``K`` anchors come first (ids 0 to ``K - 1``), then the crossing routes of each pair in turn, the smallest pair
first: ``p`` becomes ``K + n + p - 2``, where ``n`` is the number of such ids of the earlier pairs. With two anchors
this is ``p``.

SN-Net's own spaces (:meth:`StitchSpace.sliding_window`) follow other rules: a route may run corresponding blocks twice,
and several crossings share a layer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from mmsnnet.errors import UserError
from mmsnnet.stitching.correspondence import Pair
from mmsnnet.stitching.stitch import LayerKey, Routes, Segment, Stitch, Tap, as_stages, labels


class UnknownStitchError(UserError, KeyError, ValueError):
    """The space has no such stitch."""

    __str__ = Exception.__str__


@dataclass(frozen=True)
class StitchSpace:
    """The ordered set of stitches over some anchors, indexed by published id or by name.

    Build a space with :meth:`two_way`, :meth:`one_way`, :meth:`sliding_window` or :meth:`single`; :meth:`only` reduces
    it to one stitch.

    Attributes:
        stages: the number of blocks in each stage of each anchor, smallest anchor first. A plain ViT has one stage.
        scheme: ``'two_way'``, ``'one_way'``, ``'sliding_window'`` or ``'single'``.
        stitches: all stitches, by ascending id.
        layers: all stitching layers, including those that only taps use. Stitches that cross at the same place share
            the layer.
    """

    stages: tuple[tuple[int, ...], ...]
    scheme: str
    stitches: tuple[Stitch, ...]
    layers: tuple[LayerKey, ...] = ()

    @classmethod
    def two_way(cls, stages: Sequence[int | Sequence[int]]) -> StitchSpace:
        """Build SN-Netv2's space over anchors of these stages, smallest first; a number stands for one stage.

        It has the anchors, then SL, LS, LSL and SLS of each pair of neighbours, with the published ids. The top of this
        file states the ids for more than one pair. Two anchors are named S and L, three S, M and L, more A, B, C, ...
        The name ``S4-L10`` leaves the small anchor after its block 4 and enters the large one at its block 10. With
        stages, ``S2.1-L2.4`` names blocks 1 and 4 of stage 2.

        Raises:
            ValueError: there are fewer than two anchors or more than 26; or the message names a pair of neighbours that
                differ in their numbers of stages, whose depths do not ascend, or whose smaller anchor has only one
                block, so that no route can cross.
        """
        stages = as_stages(stages)
        routes = Routes(stages)
        pairs = [Pair(small, of_pair) for small, of_pair in enumerate(pairwise(stages))]
        stitches = list(routes.anchors())
        next_id = len(stages)
        for pair in pairs:
            for id_, layers in enumerate(pair.routes(), start=next_id):
                # No block of the large anchor follows the last SL layer. It is no stitch and serves taps only. Its id
                # stays unused, so that all other ids are the published ones.
                if layers[-1].target_block < sum(stages[layers[-1].target]):
                    stitches.append(routes.stitch(id_, layers[0].source, layers))
            next_id += len(pair.routes())
        keys = tuple(key for pair in pairs for key in (*pair.small_to_large(), *pair.large_to_small()))
        return cls(stages, "two_way", tuple(stitches), keys)

    @classmethod
    def one_way(cls, stages: Sequence[int | Sequence[int]]) -> StitchSpace:
        """Build the part of :meth:`two_way` that crosses to larger anchors alone: the anchors, and SL of each pair.

        Ids and names are those of :meth:`two_way`.

        Raises:
            ValueError: as :meth:`two_way`.
        """
        both = cls.two_way(stages)
        layers = tuple(key for key in both.layers if key.source < key.target)
        stitches = tuple(stitch for stitch in both if set(stitch.layers) <= set(layers))
        return cls(both.stages, "one_way", stitches, layers)

    @classmethod
    def sliding_window(
        cls, stages: Sequence[int | Sequence[int]], skip: Collection[int] = (), skip_final_norm: bool = False
    ) -> StitchSpace:
        """Build SN-Net's space (arXiv 2302.06586): the anchors, and small to large within each pair and stage.

        A crossing ``(j, k)`` leaves the small anchor after its block ``j`` of a stage and enters the large one at its
        block ``k`` of this stage. Between anchors without stages, a window of two blocks slides over both; each window
        has a layer, and all crossings from one of its blocks to one of its blocks, unless an earlier window has them.
        In stages of equal depth these are the crossings ``(k - 1, k)`` alone. In stages of ``n0 < n1`` blocks they are
        ``(floor(k * n0 / n1), k)`` for ``k >= 1``, of which those with one ``floor((k - 1) * n0 / n1)`` share a layer.
        The layers serve no taps: a backbone with ``out_indices`` needs another scheme.

        Args:
            stages: as of :meth:`two_way`.
            skip: stages without crossings. The published spaces skip the last stage, of ResNets the first one too.
            skip_final_norm: routes that cross go from the last block to the head, without the final norm of a plain
                ViT. SN-Net's DeiTs were trained this way. Anchors alone have their norm.

        Raises:
            ValueError: as :meth:`two_way`; or the smaller anchor of a pair has more blocks in a stage, or there is no
                crossing.
        """
        stages = as_stages(stages)
        routes, keys = Routes(stages), []
        stitches = list(routes.anchors())
        pairs = [Pair(small, of_pair) for small, of_pair in enumerate(pairwise(stages))]
        for stage in set(range(len(stages[0]))) - set(skip):
            for pair in pairs:
                for window in pair.windows(stage):
                    keys.append(window[0])
                    for crossing in window:
                        stitches.append(routes.stitch(len(stitches), pair.small, (crossing,), (window[0],)))
        if not keys:
            raise ValueError(f"stages {stages} have no crossing but in the stages {tuple(skip)}, which skip leaves out")
        if skip_final_norm:
            stitches = [replace(stitch, skips_final_norm=bool(stitch.layers)) for stitch in stitches]
        return cls(stages, "sliding_window", tuple(stitches), tuple(keys))

    @classmethod
    def single(cls, stages: int | Sequence[int]) -> StitchSpace:
        """Build the space of one anchor: one stitch, named ``A``, with id 0."""
        (blocks,) = as_stages([stages])
        return cls((blocks,), "single", (Stitch(0, "A", "A", (Segment(0, 0, sum(blocks)),)),))

    @classmethod
    def of(
        cls,
        scheme: str,
        stages: Sequence[int | Sequence[int]],
        skip: Collection[int] = (),
        skip_final_norm: bool = False,
    ) -> StitchSpace:
        """Build a space by the name of its scheme: ``'two_way'``, ``'one_way'`` or ``'sliding_window'``.

        One anchor gives :meth:`single`, for any scheme.

        Args:
            skip, skip_final_norm: as of :meth:`sliding_window`, and for it alone.

        Raises:
            ValueError: there is no such scheme, another one has ``skip`` or ``skip_final_norm``, or as :meth:`two_way`.
        """
        schemes = ("two_way", "one_way", "sliding_window")
        if scheme not in schemes:
            raise ValueError(f"scheme is one of {', '.join(schemes)}; got {scheme!r}")
        if skip and scheme != "sliding_window":
            raise ValueError(f"only scheme='sliding_window' skips stages; got {scheme!r} and skip={tuple(skip)}")
        if skip_final_norm and scheme != "sliding_window":
            raise ValueError(f"only routes of scheme='sliding_window' skip the final norm; got {scheme!r}")
        if len(stages) == 1:
            return cls.single(stages[0])
        if scheme == "sliding_window":
            return cls.sliding_window(stages, skip, skip_final_norm)
        return getattr(cls, scheme)(stages)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The number of blocks of each anchor, smallest anchor first."""
        return tuple(map(sum, self.stages))

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

    def crossings(self, layer: LayerKey) -> tuple[LayerKey, ...]:
        """The places that a layer joins: its own key, and those of other crossings that share it."""
        places = {layer: None}
        for stitch in self.stitches:
            for key, before, after in zip(stitch.layers, stitch.segments, stitch.segments[1:], strict=False):
                if key == layer:
                    places[LayerKey(before.anchor, before.stop - 1, after.anchor, after.start)] = None
        return tuple(places)

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

        It is the last block of the corresponding group, in stages ``floor(index * n / n_larger)``, computed from each
        anchor to the next smaller one, down to ``anchor``. The depth corresponds to the depth.
        """
        # Not in one step: at depths 8, 12, 24 floor(index * 8 / 24) can name a block that a route does not run.
        for smaller in range(len(self.depths) - 2, anchor - 1, -1):
            index = next(
                (end - 1 for end, larger_end in self._pairs[smaller].ends if larger_end > index), self.depths[smaller]
            )
        return index

    def _tap(self, stitch: Stitch, index: int) -> Tap:
        if not 0 <= index < self.depths[-1]:
            raise ValueError(f"out_indices are blocks of the largest anchor, 0 to {self.depths[-1] - 1}; got {index}")
        # A route runs exactly one of the corresponding blocks. Let the route be in the pair (a, a + 1), where block u
        # of a + 1 and block m(u) of a correspond to the index. Within its pair the route runs each group once: the
        # group of m(u), which contains u, either as block m(u) of a or whole in a + 1. This needs m(u) to be the block
        # of u's group, and floor(index * D_a / D_largest) is not always that block: at depths 8, 12, 24 and index 3,
        # u = 1 and m(u) = 0, not 1.
        if self.scheme == "sliding_window":
            raise ValueError("out_indices need scheme='two_way' or 'one_way': a sliding window has no layers for taps")
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
    def _pairs(self) -> tuple[Pair, ...]:
        return tuple(Pair(small, of_pair) for small, of_pair in enumerate(pairwise(self.stages)))

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
            both = StitchSpace.two_way(self.stages)
            if id_ in both:
                return f"{both[id_].name} changes over to a smaller anchor, which only scheme 'two_way' allows"
        before = max((stitch for stitch in self if stitch.id < id_), key=lambda stitch: stitch.id)
        larger = labels(self.stages)[before.segments[-1].anchor]
        return f"its route would run nothing of the larger anchor, {larger}, after the crossing"
