"""Prefix reuse: stitches that start with the same blocks compute those blocks once per batch.

Seen from the stem, the routes of a stitch space are a tree: a node is a block together with all that ran before it.
Walked in the order of :func:`prefix_order`, each node runs once, and what leaves it is kept no longer than a later
stitch needs it. The results are those of the stitches run one by one, since each block sees the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mmsnnet.stitching.network import Leaving, StitchedNetwork
from mmsnnet.stitching.space import Stitch, StitchSpace

Block = tuple[int, int]


def prefix_order(
    space: StitchSpace, stitches: Sequence[Stitch], out_indices: Sequence[int] | None
) -> tuple[Stitch, ...]:
    """The order in which stitches share most: a walk through the tree of their routes, depth first.

    Where routes part, those that change over come before those that go on in the anchor, so that of all places where
    routes part no more are kept at a time than the current route crosses.

    Args:
        out_indices: taps, blocks of the largest anchor, beyond the last of which no route runs; None for routes that
            run to their end, into a classifier.
    """

    def key(stitch: Stitch) -> list[tuple[bool, int, int]]:
        route = _route(space, stitch, out_indices)
        return [(k > 0 and anchor == route[k - 1][0], anchor, block) for k, (anchor, block) in enumerate(route)]

    return tuple(sorted(stitches, key=key))


class SharedPath(NamedTuple):
    """The ``turn`` of a stitch in the order, the ``nodes`` that it runs, and those among them that it ``reads``."""

    turn: int
    nodes: tuple[int, ...]
    reads: frozenset[int]


class PrefixPlan:
    """What each of a sequence of stitches shares with those before it, and which of them is the last to need it.

    Args:
        space: of the stitches.
        stitches: in the order in which they are to run, best that of :func:`prefix_order`.
        out_indices: as of :func:`prefix_order`.

    Attributes:
        paths: by the id of each stitch.
        last_use: for each node, the turn of the last stitch that goes on from it, or taps it.
    """

    def __init__(self, space: StitchSpace, stitches: Sequence[Stitch], out_indices: Sequence[int] | None) -> None:
        self.paths: dict[int, SharedPath] = {}
        self.last_use: list[int] = []
        nodes: dict[tuple[int, Block], int] = {}
        for turn, stitch in enumerate(dict.fromkeys(stitches)):
            route = _route(space, stitch, out_indices)
            path: list[int] = []
            for block in route:
                parent = path[-1] if path else -1
                if (parent, block) not in nodes:
                    nodes[parent, block] = len(nodes)
                    self.last_use.append(turn)
                    if path:
                        self.last_use[parent] = turn
                path.append(nodes[parent, block])
            tapped = {route[-1]} if out_indices is None else _tapped(space, stitch, out_indices)
            reads = frozenset(node for node, block in zip(path, route, strict=True) if block in tapped)
            for node in reads:
                self.last_use[node] = turn
            self.paths[stitch.id] = SharedPath(turn, tuple(path), reads)

    def __len__(self) -> int:
        """How many blocks run, each node of the tree once."""
        return len(self.last_use)


@dataclass
class _Call:
    """The images of one call of the network, and what left the blocks that a later stitch needs, by node."""

    images: Tensor
    leavings: dict[int, Leaving] = field(default_factory=dict)


class SharedPrefixes:
    """Hands on, from stitch to stitch, what leaves the blocks that they share, for one batch.

    A model may call its backbone several times for a batch (slide inference, flips). The calls of a stitch are counted
    from :meth:`begin` on: the n-th call finds what the n-th calls of earlier stitches have left. Stitches that the
    plan lacks, or that run out of turn, are run from where they can be, with the same result.
    """

    def __init__(self, network: StitchedNetwork, plan: PrefixPlan) -> None:
        self.network = network
        self.plan = plan
        self._calls: list[_Call] = []
        self._number = 0

    def begin(self) -> None:
        """Says that another stitch starts with the batch."""
        self._number = 0

    def walk(self, images: Tensor, stitch: Stitch) -> Iterator[Leaving]:
        """What leaves the blocks of a route that are tapped, and of all others that had to run.

        Raises:
            RuntimeError: gradients are recorded, or the n-th call had other images for another stitch.
        """
        if torch.is_grad_enabled():
            raise RuntimeError("stitches share prefixes in inference only: run them under torch.no_grad()")
        call = self._next_call(images)
        if stitch.id not in self.plan.paths:
            yield from self.network.walk(images, stitch)
            return
        turn, path, reads = self.plan.paths[stitch.id]
        done = _reach(path, reads, call.leavings)
        start = None
        for node in path[:done]:
            if node in reads or node == path[done - 1]:
                start = call.leavings[node]
                if self.plan.last_use[node] <= turn:
                    del call.leavings[node]
                yield start
        for node, leaving in zip(path[done:], self.network.walk(images, stitch, start, done), strict=False):
            if self.plan.last_use[node] > turn:
                call.leavings[node] = leaving
            yield leaving

    def _next_call(self, images: Tensor) -> _Call:
        number, self._number = self._number, self._number + 1
        if number == len(self._calls):
            self._calls.append(_Call(images))
        call = self._calls[number]
        if call.images is not images and not _same(call.images, images):
            raise RuntimeError(
                f"call {number + 1} of the backbone had other images for another stitch of the same batch, so that "
                "they can share no prefix: test without prefix reuse, or take what is random out of testing"
            )
        return call


def _route(space: StitchSpace, stitch: Stitch, out_indices: Sequence[int] | None) -> list[Block]:
    """The blocks (anchor, block) that a stitch runs, up to its last tap."""
    route = [(segment.anchor, block) for segment in stitch.segments for block in range(segment.start, segment.stop)]
    if out_indices is None:
        return route
    tapped = _tapped(space, stitch, out_indices)
    return route[: 1 + max(k for k, block in enumerate(route) if block in tapped)]


def _tapped(space: StitchSpace, stitch: Stitch, out_indices: Sequence[int]) -> set[Block]:
    return {(tap.anchor, tap.block) for tap in space.taps(stitch, out_indices)}


def _reach(path: Sequence[int], reads: frozenset[int], leavings: dict[int, Leaving]) -> int:
    """How many blocks of a path need not run: there is what leaves the last of them, and all that is tapped before."""
    reach = 0
    for done, node in enumerate(path, start=1):
        if node in leavings:
            reach = done
        elif node in reads:
            break
    return reach


def _same(kept: Tensor, images: Tensor) -> bool:
    alike = kept.shape == images.shape and kept.dtype == images.dtype and kept.device == images.device
    return alike and torch.equal(kept, images)
