"""Prefix reuse: stitches that start with the same blocks compute those blocks once per batch.

Routes that start in the same anchor form a tree: a node is a block together with all blocks before it. In the
order of :func:`prefix_order`, each node runs once, and its output is cached until the last stitch that needs it. The
results equal those of single runs bit for bit, because each block sees the same input. With anchors of 12 and 24
blocks, all 134 stitches together need 2.72 times fewer FLOPs.

The stitches of a training step form such a tree too. One backward pass through the sum of their losses runs each node
once, because autograd adds the gradients of a node's output before it continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from mmsnnet.stitching.network import BlockOutput, StitchedNetwork
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import Stitch

Block = tuple[int, int]


def prefix_order(
    space: StitchSpace, stitches: Sequence[Stitch], out_indices: Sequence[int] | None
) -> tuple[Stitch, ...]:
    """Sort stitches depth first along the tree of their routes, so that each block runs only once.

    At a fork, routes that cross come before routes that stay. The cache then never holds more outputs than the current
    route has crossings.

    Args:
        space: the space of the stitches.
        out_indices: taps, as blocks of the largest anchor: each route stops after its last tap. None stands for routes
            that run to their end, into a classifier.
    """

    def key(stitch: Stitch) -> list[tuple[bool, int, int]]:
        route = _route(space, stitch, out_indices)
        return [(k > 0 and anchor == route[k - 1][0], anchor, block) for k, (anchor, block) in enumerate(route)]

    return tuple(sorted(stitches, key=key))


class SharedPath(NamedTuple):
    """The path of a stitch through the tree.

    Attributes:
        turn: the index of the stitch in the order.
        nodes: the nodes on its route.
        reads: the nodes that it taps, or its last node if it ends in a classifier.
    """

    turn: int
    nodes: tuple[int, ...]
    reads: frozenset[int]


class PrefixPlan:
    """The tree of a sequence of stitches, and how long each node's output is needed.

    Args:
        space: the space of the stitches.
        stitches: the stitches in the order of their runs; :func:`prefix_order` gives the best order.
        out_indices: as for :func:`prefix_order`.
        keep: keep every output until the last turn, for training: the backward pass needs them anyway.

    Attributes:
        paths: the path of each stitch, by its id.
        last_use: for each node, the turn of the last stitch that continues from it or taps it.
    """

    def __init__(
        self,
        space: StitchSpace,
        stitches: Sequence[Stitch],
        out_indices: Sequence[int] | None,
        keep: bool = False,
    ) -> None:
        self.keep = keep
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
        if keep:
            self.last_use = [len(self.paths)] * len(self)

    def __len__(self) -> int:
        """The number of nodes of the tree: the number of blocks that run."""
        return len(self.last_use)


@dataclass
class _Call:
    """The images of one call of the network, and the cached block outputs, by node."""

    images: Tensor
    outputs: dict[int, BlockOutput] = field(default_factory=dict)


class SharedPrefixes:
    """Caches block outputs of one batch, so that stitches share the blocks of their common prefix.

    A model may call its backbone several times for a batch (slide inference, flips). Calls are counted from
    :meth:`begin`: the n-th call for a stitch continues from outputs that the n-th calls for earlier stitches cached.
    Stitches that the plan lacks, or that run out of order, compute what the cache lacks and give the same result.

    Args:
        network: runs the blocks.
        plan: the tree. Gradients need a plan that keeps every output.
        compare: compare the values of the images. On a GPU this waits for the device.
    """

    def __init__(self, network: StitchedNetwork, plan: PrefixPlan, compare: bool = True) -> None:
        self.network = network
        self.plan = plan
        self.compare = compare
        self._calls: list[_Call] = []
        self._number = 0

    def begin(self) -> None:
        """Start the next stitch of the batch: count its calls from the first."""
        self._number = 0

    def walk(self, images: Tensor, stitch: Stitch) -> Iterator[BlockOutput]:
        """Yield the outputs of the route's tapped blocks, and of all blocks that had to run.

        Raises:
            RuntimeError: gradients are recorded, and the plan does not keep outputs; or this call's images differ from
                those of another stitch's call with the same number. An error, because silent recomputation would hide
                randomness in the pipeline.
        """
        if torch.is_grad_enabled() and not self.plan.keep:
            raise RuntimeError("stitches share prefixes in inference only: run them under torch.no_grad()")
        call = self._next_call(images)
        if stitch.id not in self.plan.paths:
            yield from self.network.walk(images, stitch)
            return
        turn, path, reads = self.plan.paths[stitch.id]
        done = _reach(path, reads, call.outputs)
        start = None
        for node in path[:done]:
            if node in reads or node == path[done - 1]:
                start = call.outputs[node]
                if self.plan.last_use[node] <= turn:
                    del call.outputs[node]
                yield start
        for node, output in zip(path[done:], self.network.walk(images, stitch, start, done), strict=False):
            if self.plan.last_use[node] > turn:
                call.outputs[node] = output
            yield output

    def _next_call(self, images: Tensor) -> _Call:
        number, self._number = self._number, self._number + 1
        if number == len(self._calls):
            self._calls.append(_Call(images))
        call = self._calls[number]
        if call.images is not images and not _same(call.images, images, self.compare):
            cure = (
                "set train_cfg.stitches_per_step=1, or remove what changes images at random from the model"
                if self.plan.keep
                else "test without prefix reuse, or remove random transforms from the test pipeline"
            )
            raise RuntimeError(
                f"call {number + 1} of the backbone had other images for another stitch of the same batch: {cure}"
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


def _reach(path: Sequence[int], reads: frozenset[int], outputs: dict[int, BlockOutput]) -> int:
    """The number of leading blocks of a path that need not run.

    The outputs of the last of them and of all tapped blocks before it are cached.
    """
    reach = 0
    for done, node in enumerate(path, start=1):
        if node in outputs:
            reach = done
        elif node in reads:
            break
    return reach


def _same(one: Tensor, other: Tensor, values: bool) -> bool:
    comparable = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
    return comparable and (not values or torch.equal(one, other))
