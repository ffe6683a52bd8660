"""Least-squares initialisation of the stitching layers (SN-Net, arXiv 2302.06586), streamed.

A layer that leaves one anchor after block ``i`` and enters another at block ``j`` is fitted to map the output of block
``i`` to the output of block ``j - 1``, which block ``j`` normally receives; at ``j = 0``, to the output of the stem. A
layer that several crossings share is fitted to the tokens of all of them at once. Only the sums of the normal equations
are kept: memory grows with the square of the widths, not with the number of images, and the sums of several processes
can be added.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from mmsnnet.errors import SettingError
from mmsnnet.stitching.network import StitchedNetwork, evaluation_mode
from mmsnnet.stitching.stitch import LayerKey


class Site(NamedTuple):
    """The output of ``block`` of ``anchor``; block -1 is the stem."""

    anchor: int
    block: int


class NormalEquations:
    """The normal equations of stitching layers, summed over tokens in float64.

    For tokens ``x``, with a 1 appended for the bias, they are the sum of ``x x^T`` for each source site, and the sum of
    ``x y^T`` for each pair of sites that a layer joins. Layers in both directions between two anchors join the same
    sites and share the sum of ``x y^T``. With float32 sums, the residual on correlated tokens was 3-7 % above the
    optimum.

    Args:
        network: the network to initialise.
        layers: the layers to solve for; all by default.

    Raises:
        SettingError: the anchors lack blocks, because the network was built for one stitch.

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
            raise SettingError(
                "a network of one stitch lacks blocks that least squares needs to solve its stitching layers: load its "
                "checkpoint (load_from)"
            )
        self.sites = {
            key: [
                (Site(crossing.source, crossing.source_block), Site(crossing.target, crossing.target_block - 1))
                for crossing in network.space.crossings(key)
            ]
            for key in (network.space.layers if layers is None else layers)
        }
        self.grams: dict[Site, Tensor] = {}
        self.crosses: dict[tuple[Site, Site], Tensor] = {}
        device = next(network.parameters()).device
        for source, target in chain.from_iterable(self.sites.values()):
            size, other = (network.anchor(site.anchor).widths[site.block] + 1 for site in (source, target))
            if source not in self.grams:
                self.grams[source] = torch.zeros(size, size, dtype=torch.float64, device=device)
            if (target, source) not in self.crosses and (source, target) not in self.crosses:
                self.crosses[source, target] = torch.zeros(size, other, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Run the anchors on images (B, 3, H, W) and add their tokens to the sums.

        The tokens of a site are freed as soon as no pair needs them.

        Raises:
            ValueError: the images are no tensor of floating-point numbers with four dimensions.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                "least squares needs batches of normalised images as tensors (B, C, H, W) of floating-point numbers; "
                f"got {got}"
            )
        images = images.to(next(self.network.parameters()).device)
        with evaluation_mode(self.network):
            rows: dict[Site, Tensor] = {}
            pending = set(self.crosses)
            for index in range(len(self.network.anchors)):
                anchor = self.network.anchor(index)
                stem = anchor.stem(images)
                for block, features in chain([(-1, stem)], anchor.run(stem)):
                    site = Site(index, block)
                    pairs = [pair for pair in pending if site in pair]
                    if not pairs:
                        continue
                    rows[site] = with_one(features.rows())
                    if site in self.grams:
                        self.grams[site].addmm_(rows[site].T, rows[site])
                    for source, target in pairs:
                        if source in rows and target in rows:
                            self.crosses[source, target].addmm_(rows[source].T, rows[target])
                            pending.remove((source, target))
                    rows = {site: tokens for site, tokens in rows.items() if any(site in pair for pair in pending)}

    def sums(self) -> Iterable[Tensor]:
        """Yield all sums, in the same order in every process, for an all-reduce in place."""
        yield from self.grams.values()
        yield from self.crosses.values()

    def solve(self) -> None:
        """Solve for the weight and bias of each layer in float64, and set them.

        Low-rank updates stay unchanged.

        Raises:
            SettingError: the tokens are not finite.
            ValueError: no images were added.
        """
        for key, pairs in self.sites.items():
            # Float64 sums, in the order of the crossings: the same in every process.
            grams, crosses = zip(*((self.grams[pair[0]], self._cross(*pair)) for pair in pairs), strict=True)
            weight, bias = solve_normal_equations(sum(grams[1:], grams[0]), sum(crosses[1:], crosses[0]))
            self.network.layer(key).set_base(weight, bias)

    def _cross(self, source: Site, target: Site) -> Tensor:
        cross = self.crosses.get((source, target))
        if cross is None:
            cross = self.crosses[target, source].T
        return cross[:, :-1]


def solve_normal_equations(gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """Solve for the weight (out, in) and bias (out,) of least squared error.

    If there are several solutions, it returns the one of smallest norm after scaling each channel of ``x`` to unit
    power.

    Args:
        gram: sum of ``x x^T`` with 1 appended to ``x``, shape (in + 1, in + 1).
        cross: sum of ``x y^T``, shape (in + 1, out).

    Raises:
        SettingError: the sums are not finite.
        ValueError: no tokens were added.
    """
    gram, cross = gram.cpu(), cross.cpu()
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        raise SettingError("the tokens of an anchor are not finite: check its pretrained weights")
    if gram[-1, -1] == 0:
        raise ValueError("least squares has no tokens to solve from: add at least one image")
    # ViTs have a few channels of huge values. Scaling all channels alike improves the condition of the system.
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
    """Convert tokens (M, C) to float64 and append 1: (M, C + 1)."""
    rows = rows.double()
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
