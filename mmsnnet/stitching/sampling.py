"""Resource-constrained sampling (SN-Netv2, arXiv 2307.00154): which stitches a training step runs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import Stitch


@dataclass(frozen=True)
class StitchSampler:
    """Draws a bin of FLOPs, uniformly or by weights, then a stitch of that bin uniformly.

    A draw is a pure function of the seed and of the number of earlier draws. Every rank of a distributed run therefore
    draws the same stitch without communication, and a resumed run continues the sequence.

    Args:
        bins: ids of stitches, from the cheapest to the costliest, as :func:`flops_bins` returns them.
        seed: seed of the draws.
        stitches_per_step: the number of stitches that a training step runs. With two or more, the first draw of a step
            is the costliest stitch, which can teach the others, the second the cheapest, and the others are random.
        weights: a whole number of 1 or more for each bin, to which its probability is proportional; none by default.

    Raises:
        ValueError: a bin is empty or there is none, ``stitches_per_step`` is below 1, or ``weights`` do not fit.
    """

    bins: tuple[tuple[int, ...], ...]
    seed: int = 0
    stitches_per_step: int = 1
    weights: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.bins or not all(self.bins):
            raise ValueError("a sampler needs at least one bin, and a stitch in each")
        if self.stitches_per_step < 1:
            raise ValueError(f"a training step runs one stitch or more, got stitches_per_step={self.stitches_per_step}")
        if self.weights and (len(self.weights) != len(self.bins) or min(self.weights) < 1):
            raise ValueError(f"expected a weight of 1 or more for each of {len(self.bins)} bins, got {self.weights}")

    def draw(self, n: int) -> int:
        """The stitch id of draw ``n``, counted from 0."""
        place = n % self.stitches_per_step
        if self.stitches_per_step > 1 and place < 2:
            return self.bins[-1][-1] if place == 0 else self.bins[0][0]
        digest = hashlib.blake2b(f"{self.seed}:{n}".encode(), digest_size=16).digest()
        stitches = self._bin(digest[:8])
        return stitches[_below(len(stitches), digest[8:])]

    def _bin(self, random_bytes: bytes) -> tuple[int, ...]:
        if not self.weights:
            return self.bins[_below(len(self.bins), random_bytes)]
        place = _below(sum(self.weights), random_bytes)
        return next(bin_ for bin_, end in zip(self.bins, accumulate(self.weights), strict=True) if place < end)


def spread(space: StitchSpace, bins: Sequence[Sequence[int]], number: int = 4) -> tuple[Stitch, ...]:
    """All anchors, and the middle stitch of each of ``number`` evenly spaced bins.

    These few stitches show how the whole space trains. If there are fewer bins than ``number``, each gives one.
    """
    bins = [[id_ for id_ in bin_ if space[id_] not in space.anchors] for bin_ in bins]
    middles = [bin_[len(bin_) // 2] for bin_ in bins if bin_]
    number = min(number, len(middles))
    chosen = [middles[(2 * k + 1) * len(middles) // (2 * number)] for k in range(number)]
    return space.select([*(anchor.id for anchor in space.anchors), *chosen])


def flops_bins(flops: Mapping[int, int], step: float, alone: Collection[int] = ()) -> tuple[tuple[int, ...], ...]:
    """Group stitches of about the same cost.

    In ascending order of FLOPs, a stitch opens a new bin when it costs more than ``step`` above the first of the bin.

    Args:
        flops: multiply-accumulates by stitch id.
        step: width of a bin in multiply-accumulates.
        alone: ids of stitches that get bins of their own. Each ends the bin before it.

    Raises:
        ValueError: ``step`` is not above 0.
    """
    if step <= 0:
        raise ValueError(f"the step between FLOPs bins must be above 0, got {step}")
    bins: list[list[int]] = []
    first = 0
    for id_ in sorted(flops, key=lambda i: (flops[i], i)):
        if not bins or id_ in alone or bins[-1][-1] in alone or flops[id_] > first + step:
            bins.append([])
            first = flops[id_]
        bins[-1].append(id_)
    return tuple(map(tuple, bins))


def equal_flops(bins: Sequence[Sequence[int]], flops: Mapping[int, int], kept: int = -1) -> tuple[int, ...]:
    """Weights with which each bin but one gets the same FLOPs in training, except for rounding.

    One bin keeps the part of all FLOPs that it has when all bins are drawn as often: with an equal part, the largest
    anchor would be trained too rarely to keep its quality.

    Args:
        bins: ids of stitches.
        flops: multiply-accumulates by stitch id.
        kept: the index of the bin that keeps its part.

    Returns:
        A weight for each bin: for all but the kept one, 1000 times the kept bin's mean FLOPs over its own.
    """
    means = [sum(flops[id_] for id_ in bin_) / len(bin_) for bin_ in bins]
    others = sum(means) - means[kept]
    weights = [means[kept] / mean for mean in means]  # weight times FLOPs is the same for all
    if others:  # the kept bin's FLOPs to those of the others are as its mean to theirs
        weights[kept] = (len(means) - 1) * means[kept] / others
    return tuple(round(1000 * weight) for weight in weights)


def _below(n: int, random_bytes: bytes) -> int:
    """A uniform number from 0 to n - 1, off by at most n / 2^64."""
    return int.from_bytes(random_bytes, "big") * n >> (8 * len(random_bytes))
