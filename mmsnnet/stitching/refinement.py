"""Train stitching layers to match an anchor's final features, without labels.

Least squares makes a layer predict the features at the crossing. Errors there may grow in the blocks behind it, most in
early crossings of large pretrained models. Here the layers alone are trained for a few hundred steps, so that what
leaves the last block of a route matches what leaves the last block of the anchor in which the route ends, for the same
images (arXiv 2603.12433).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import grad

from mmsnnet.errors import SettingError, check_keys, check_whole_number
from mmsnnet.stitching.features import Features
from mmsnnet.stitching.network import StitchedNetwork, evaluation_mode
from mmsnnet.stitching.prefix import PrefixPlan, SharedPrefixes
from mmsnnet.stitching.stitch import LayerKey, Stitch


class Refinement:
    """Train the base weights of stitching layers; everything else keeps its weights and stays in evaluation mode.

    Args:
        network: a network with initialised layers and all blocks.
        layers: the layers to train, on the routes that pass them; all by default.
        steps: the number of steps. The learning rate falls from ``lr`` to 0 along a cosine.
        lr: of Adam.
        stitches_per_step: routes that a step trains, taken in turn from a seeded order of all that cross. They share
            common blocks.
        seed: of the order.

    Raises:
        SettingError: as :func:`check_refinement`.
        ValueError: a layer is not initialised, or no route passes ``layers``.

    Usage::

        refinement = Refinement(network, steps=300)
        for images in batches:
            error = refinement.step(images)
        refinement.finish()
    """

    def __init__(
        self,
        network: StitchedNetwork,
        steps: int,
        lr: float = 1e-3,
        stitches_per_step: int = 4,
        seed: int = 0,
        layers: Sequence[LayerKey] | None = None,
    ) -> None:
        check_refinement("Refinement", dict(steps=steps, lr=lr, stitches_per_step=stitches_per_step, seed=seed))
        if not network.initialized:
            raise ValueError("refinement starts from initialised stitching layers: solve the normal equations first")
        self.network = network
        self.steps = steps
        self.lr = lr
        trained = set(network.space.layers if layers is None else layers)
        self.crossing = tuple(stitch for stitch in network.space if trained.intersection(stitch.layers))
        if not self.crossing:
            raise ValueError("refinement needs a route that crosses from one anchor to another")
        self.stitches_per_step = min(stitches_per_step, len(self.crossing))
        self._random = torch.Generator().manual_seed(seed)
        self._queue: list[Stitch] = []
        self._saved = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        network.requires_grad_(False)
        parameters = []
        for key in sorted(trained.intersection(key for stitch in self.crossing for key in stitch.layers)):
            layer = network.layer(key)
            parameters += [layer.weight.requires_grad_(), layer.bias.requires_grad_()]
        self._trained = parameters
        self.optimizer = torch.optim.Adam(parameters, lr=lr)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, images: Tensor) -> Tensor:
        """Train on images (B, C, H, W); returns the mean relative error of the routes' final features before it."""
        with evaluation_mode(self.network):
            errors = route_errors(self.network, images, self._next())
            loss = torch.stack([error for _, error in errors]).mean()
            # Hooks of wrappers for distributed training wait for gradients of a training step; grad() calls none.
            for parameter, gradient in zip(self._trained, grad(loss, self._trained, allow_unused=True), strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def finish(self) -> None:
        """Let parameters be trained as before, and drop the gradients."""
        for parameter, requires_grad in self._saved:
            parameter.requires_grad = requires_grad
            parameter.grad = None

    def _next(self) -> list[Stitch]:
        if len(self._queue) < self.stitches_per_step:
            order = torch.randperm(len(self.crossing), generator=self._random).tolist()
            # Routes that still wait have their turn first, and come last in the new order.
            self._queue += sorted((self.crossing[index] for index in order), key=self._queue.__contains__)
        chosen = list(dict.fromkeys(self._queue[: self.stitches_per_step]))
        self._queue = self._queue[len(chosen) :]
        return chosen


def check_refinement(setting: str, settings: Mapping[str, Any]) -> None:
    """Check the settings of :class:`Refinement`, before there is a network.

    Args:
        setting: their name in a config.
        settings: ``steps``, and any of ``lr``, ``stitches_per_step`` and ``seed``.

    Raises:
        SettingError: a key is unknown, ``steps`` is missing, or a value is no number or out of range.
    """
    check_keys(setting, settings, ("steps", "lr", "stitches_per_step", "seed"), ("steps",))
    for key, least in (("steps", 1), ("stitches_per_step", 1), ("seed", None)):
        if key in settings:
            check_whole_number(f"{setting}.{key}", settings[key], least)
    lr = settings.get("lr", 1.0)
    if isinstance(lr, bool) or not isinstance(lr, Real) or not 0 < float(lr) < math.inf:
        raise SettingError(f"{setting}.lr must be a finite number above 0, got {lr!r}")


class RouteError(NamedTuple):
    """The squared error of a route's final features over the squared features of its last anchor, over all images."""

    stitch: Stitch
    error: Tensor


def route_errors(network: StitchedNetwork, images: Tensor, stitches: Sequence[Stitch]) -> list[RouteError]:
    """The error of each stitch against the anchor in which it ends, in evaluation mode.

    Args:
        network: in evaluation mode.
        images: (B, C, H, W).
        stitches: of the network's space.
    """
    targets: dict[int, Features] = {}
    with torch.no_grad():
        for index in sorted({stitch.segments[-1].anchor for stitch in stitches}):
            anchor = network.anchor(index)
            for _, features in anchor.run(anchor.stem(images)):
                targets[index] = features
    shared = SharedPrefixes(network, PrefixPlan(network.space, stitches, None, keep=True))
    errors = []
    for stitch in stitches:
        shared.begin()
        for output in shared.walk(images, stitch):
            last = output
        target = targets[last.anchor].rows().float()
        difference = last.projected[()].rows().float() - target
        errors.append(RouteError(stitch, difference.square().mean() / target.square().mean()))
    return errors
