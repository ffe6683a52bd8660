"""Which blocks of two neighbouring anchors correspond, and the layers that join them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from mmsnnet.stitching.stitch import LayerKey


@dataclass(frozen=True)
class Pair:
    """Two neighbouring anchors, ``small`` and ``small + 1``, and their stages."""

    small: int
    stages: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        small, large = self.stages
        refused = f"anchors {self.small} and {self.small + 1} cannot be stitched"
        if len(small) != len(large):
            raise ValueError(
                f"{refused}: their stages do not correspond; got blocks {small} and {large}. Choose anchors with "
                "equally many stages: hierarchical models with each other, plain ViTs with each other"
            )
        if sum(small) > sum(large):
            raise ValueError(
                f"{refused}: order the anchors from the smallest to the largest, none deeper than the next; got depths "
                f"{sum(small)} and {sum(large)}"
            )
        if sum(map(min, small, large)) == 1:
            raise ValueError(
                f"{refused}: a route changes over between two blocks, and an anchor of one block has no such place; "
                f"got depths {sum(small)} and {sum(large)}"
            )

    @cached_property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """The first block after each group, in the small and in the large anchor.

        In a stage where one anchor has ``few`` blocks and the other ``n``, block ``f`` of the former corresponds to the
        blocks before ``ceil((f + 1) * n / few)`` of the latter.
        """
        ends, before = [], (0, 0)
        for blocks in zip(*self.stages, strict=True):
            few = min(blocks)
            for f in range(few):
                small, large = (start - (-(f + 1) * n // few) for start, n in zip(before, blocks, strict=True))
                ends.append((small, large))
            before = ends[-1]
        return tuple(ends)

    def windows(self, stage: int) -> Iterator[list[LayerKey]]:
        """The crossings of SN-Net's sliding window in a stage, those that share a layer together."""
        n0, n1 = (blocks[stage] for blocks in self.stages)
        if n0 > n1:
            raise ValueError(
                f"anchors {self.small} and {self.small + 1} have {n0} and {n1} blocks in stage {stage}: a sliding "
                f"window needs no fewer in the larger anchor; add {stage} to skip"
            )
        if n0 < n1:
            windows = [[(k * n0 // n1, k) for k in range(1, n1) if (k - 1) * n0 // n1 == w] for w in range(n0)]
        elif len(self.stages[0]) > 1:
            windows = [[(k - 1, k)] for k in range(1, n1)]
        else:
            pairs = [[(j, k) for j in (w, w + 1) for k in (w, w + 1)] for w in range(n0 - 1)]
            windows = [pairs[0]] + [window[1:] for window in pairs[1:]]  # the window before ends with the first
        start0, start1 = (sum(blocks[:stage]) for blocks in self.stages)
        for window in filter(None, windows):
            yield [LayerKey(self.small, start0 + j, self.small + 1, start1 + k) for j, k in window]

    def small_to_large(self) -> list[LayerKey]:
        """One layer at the end of each group."""
        return [LayerKey(self.small, small - 1, self.small + 1, large) for small, large in self.ends]

    def large_to_small(self) -> list[LayerKey]:
        """One layer at the end of each group but the last."""
        return [LayerKey(self.small + 1, large - 1, self.small, small) for small, large in self.ends[:-1]]

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
