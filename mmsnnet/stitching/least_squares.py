"""Least-squares initialisation of the stitching layers (SN-Net, arXiv 2302.06586), streamed.

A layer that leaves block ``i`` of one anchor for block ``j`` of another is to map the tokens leaving block ``i`` to
those entering block ``j``, that is, leaving block ``j - 1``. Over images, only the sums of the normal equations are
kept: memory grows with the square of the widths, not with the number of images, and sums of several processes add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmsnnet.stitching.network import StitchedNetwork, evaluation_mode
from mmsnnet.stitching.space import LayerKey


class Site(NamedTuple):
    """Tokens leaving ``block`` of ``anchor``."""

    anchor: int
    block: int


class NormalEquations:
    """Sums over tokens ``x`` (with a 1 appended, for the bias) of ``x x^T`` for each site that a stitching layer
    leaves, and of ``x y^T`` for each pair of sites that a layer joins, in float64.

    The layers of a pair of anchors, there and back, join the same sites: they share the sums of ``x y^T``.

    ``layers`` are those to solve for, all of the network's by default.

    Raises:
        ValueError: the network's anchors lack blocks.

    Usage::

        equations = NormalEquations(network)
        for images in batches:
            equations.add(images)
        equations.solve()
    """

    def __init__(self, network: StitchedNetwork, layers: Sequence[LayerKey] | None = None) -> None:
        self.network = network
        whole = all(len(network.anchor(index).blocks) == depth for index, depth in enumerate(network.space.depths))
        if not whole:
            raise ValueError(
                "a network of one stitch lacks what its stitching layers would be solved from: load its checkpoint "
                "(load_from)"
            )
        self.sites = {
            key: (Site(key.source, key.source_block), Site(key.target, key.target_block - 1))
            for key in (network.space.layers if layers is None else layers)
        }
        self.grams: dict[Site, Tensor] = {}
        self.crosses: dict[tuple[Site, Site], Tensor] = {}
        device = next(network.parameters()).device
        for source, target in self.sites.values():
            size, other = (network.anchor(site.anchor).widths[site.block] + 1 for site in (source, target))
            if source not in self.grams:
                self.grams[source] = torch.zeros(size, size, dtype=torch.float64, device=device)
            if (target, source) not in self.crosses and (source, target) not in self.crosses:
                self.crosses[source, target] = torch.zeros(size, other, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Runs the anchors over images (B, 3, H, W) and adds what leaves their blocks to the sums. Frees each pair's
        tokens as soon as both are there."""
        with evaluation_mode(self.network):
            kept: dict[Site, Tensor] = {}
            pending = set(self.crosses)
            for index in range(len(self.network.anchors)):
                anchor = self.network.anchor(index)
                for block, features in anchor.run(anchor.stem(images)):
                    site = Site(index, block)
                    pairs = [pair for pair in pending if site in pair]
                    if not pairs:
                        continue
                    kept[site] = with_one(features.rows())
                    if site in self.grams:
                        self.grams[site].addmm_(kept[site].T, kept[site])
                    for source, target in pairs:
                        if source in kept and target in kept:
                            self.crosses[source, target].addmm_(kept[source].T, kept[target])
                            pending.remove((source, target))
                    kept = {s: rows for s, rows in kept.items() if any(s in pair for pair in pending)}

    def sums(self) -> Iterable[Tensor]:
        """The sums, in an order that is the same in every process: to be added up over processes, in place."""
        yield from self.grams.values()
        yield from self.crosses.values()

    def solve(self) -> None:
        """Solves for each layer's weight and bias in float64 and sets them; a low-rank update is left as it is.

        Raises:
            ValueError: no images were added, or their tokens are not finite.
        """
        for key, (source, target) in self.sites.items():
            weight, bias = solve_normal_equations(self.grams[source], self._cross(source, target))
            self.network.layer(key).set_base(weight, bias)

    def _cross(self, source: Site, target: Site) -> Tensor:
        cross = self.crosses.get((source, target))
        if cross is None:
            cross = self.crosses[target, source].T
        return cross[:, :-1]


def solve_normal_equations(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The weight (out, in) and bias (out,) of least squared error; where there are several, the one of smallest norm
    with the channels of ``x`` scaled to unit power.

    Args:
        gram: sum of ``x x^T`` with 1 appended to ``x``, shape (in + 1, in + 1).
        cross: sum of ``x y^T``, shape (in + 1, out).

    Raises:
        ValueError: the sums are not finite, or there are none.
    """
    gram, cross = gram.cpu(), cross.cpu()
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise ValueError("the tokens of an anchor are not finite: are its pretrained weights right?")
    if gram[-1, -1] == 0:
        raise ValueError("no tokens to solve from: give the initialisation at least one image")
    # Channels of very different size (ViTs have a few huge ones) are brought to the same scale before solving.
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    scaled = gram / scale[:, None] / scale
    factor, failed = torch.linalg.cholesky_ex(scaled)
    well_conditioned = not failed and factor.diagonal().min() > 1e-6
    if well_conditioned:
        solution = torch.cholesky_solve(cross / scale[:, None], factor)
    else:
        solution = torch.linalg.lstsq(scaled, cross / scale[:, None], rcond=1e-12, driver="gelsd").solution
    solution = solution / scale[:, None]
    return solution[:-1].T, solution[-1]


def with_one(rows: Tensor) -> Tensor:
    """Tokens (M, C) as rows (M, C + 1) in float64, 1 appended."""
    rows = rows.double()
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
