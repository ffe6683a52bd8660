from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmsnnet.engine.ranks import fail_together
from mmsnnet.engine.sharding import gathered, is_sharded, run_batches
from mmsnnet.engine.training_images import sample_batches, sample_indices
from mmsnnet.errors import SettingError, check_whole_number
from mmsnnet.models import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import HOOKS
from mmsnnet.stitching import LayerKey, NormalEquations, Refinement, StitchedNetwork
from mmsnnet.stitching.network import evaluation_mode
from mmsnnet.stitching.refinement import check_refinement


@HOOKS.register_module()
class StitchInitHook(Hook):
    """Initialise the stitching layers by least squares on training images, before the first iteration.

    The images are a sample of the training set that depends only on ``seed``. Each rank runs a part of them, and the
    ranks add up their sums, so every rank ends with the same weights. The hook leaves alone layers that a checkpoint
    has loaded, so a resumed run starts at once. It restores random states.

    Args:
        num_images: in total, over all ranks (SN-Netv2 takes about 50 for dense tasks, SN-Net 100).
        batch_size: images that go through the anchors together.
        seed: for the sample and its augmentation.
        refine: the arguments of :class:`mmsnnet.stitching.Refinement`, such as ``dict(steps=300)``, for the second
            stage, which trains the layers alone on ``steps`` batches, without labels. All ranks run the same images.

    Raises:
        SettingError: a number is no whole number or too small, or ``refine`` is no dict, has an unknown key, no
            ``steps`` or a wrong value. Before training: the error of the refined layers is not finite.
    """

    def __init__(
        self, num_images: int = 50, batch_size: int = 2, seed: int = 0, refine: Mapping[str, Any] | None = None
    ) -> None:
        check_whole_number("StitchInitHook: num_images", num_images, 1)
        check_whole_number("StitchInitHook: batch_size", batch_size, 1)
        check_whole_number("StitchInitHook: seed", seed, 0)
        if refine is not None:
            if not isinstance(refine, Mapping):
                raise SettingError(f"StitchInitHook: refine must be a dict such as dict(steps=300), got {refine!r}")
            check_refinement("StitchInitHook: refine", refine)
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.refine = refine

    def before_train(self, runner: Runner) -> None:
        backbone = find_stitched_backbone(runner.model)
        network = backbone.network
        missing = [key for key in network.space.layers if not network.layer(key).initialized]
        if not missing:
            return
        if self.refine is not None and is_sharded(runner.model):
            raise SettingError(
                "StitchInitHook: refine cannot train layers of a sharded model: initialise with another wrapper, or "
                "leave refine out"
            )
        start = time.monotonic()
        equations = NormalEquations(network, missing)
        indices = sample_indices(len(runner.train_dataloader.dataset), self.num_images, self.seed)
        images = self._images(runner, indices[dist.get_rank() :: dist.get_world_size()])
        run_batches(runner.model, equations.add, images, partial(_run_anchors, backbone))
        for total in equations.sums():
            dist.all_reduce(total)
        with gathered(runner.model):
            equations.solve()
            for key in missing:
                for parameter in network.layer(key).parameters():
                    dist.broadcast(parameter.data)
        runner.logger.info(
            f"StitchInitHook: initialised {len(missing)} stitching layers from "
            f"{min(self.num_images, len(runner.train_dataloader.dataset))} images in {time.monotonic() - start:.1f} s"
        )
        # Layers that only taps use have nothing to refine.
        if self.refine is not None and any(set(missing).intersection(stitch.layers) for stitch in network.space):
            self._refine(runner, network, missing, self.refine)

    def _refine(
        self, runner: Runner, network: StitchedNetwork, layers: Sequence[LayerKey], settings: Mapping[str, Any]
    ) -> None:
        start = time.monotonic()
        refinement = Refinement(network, **{"seed": self.seed, **settings}, layers=layers)
        length, number = len(runner.train_dataloader.dataset), refinement.steps * self.batch_size
        rounds = [sample_indices(length, length, self.seed + round_) for round_ in range(-(-number // length))]
        images = self._images(runner, list(chain.from_iterable(rounds))[:number])
        errors = [refinement.step(batch) for batch in images]
        refinement.finish()
        tenth = max(1, len(errors) // 10)
        first, last = (float(torch.stack(part).mean()) for part in (errors[:tenth], errors[-tenth:]))
        parameters = [parameter for key in layers for parameter in network.layer(key).parameters()]
        with fail_together():
            # The last errors are of the weights before the last step.
            if not math.isfinite(last) or not all(parameter.isfinite().all() for parameter in parameters):
                raise SettingError(
                    "StitchInitHook: the relative error of refinement rose until it was no finite number "
                    f"(from {first:.3g} to {last:.3g}): lower refine.lr, now {refinement.lr:g}"
                )
        for parameter in parameters:
            dist.broadcast(parameter.data)
        runner.logger.info(
            f"StitchInitHook: {len(errors)} steps of refinement changed the relative error of final features from "
            f"{first:.3f} to {last:.3f} in {time.monotonic() - start:.1f} s"
        )

    def _images(self, runner: Runner, indices: Sequence[int]) -> Iterator[Tensor]:
        """Batches (B, 3, H, W) of these samples, preprocessed as in training."""
        dataset = runner.train_dataloader.dataset
        batches = [indices[first : first + self.batch_size] for first in range(0, len(indices), self.batch_size)]
        for data in sample_batches(dataset, runner.model, batches, self.seed):
            yield data["inputs"]


def _run_anchors(backbone: StitchedBackbone) -> None:
    """Run the blocks that ``NormalEquations.add`` runs, in the same order, on an empty image."""
    network = backbone.network
    device = next(network.parameters()).device
    images = torch.zeros(1, network.anchor(0).in_chans, *backbone.img_size, device=device)
    with evaluation_mode(network):
        for index in range(len(network.anchors)):
            anchor = network.anchor(index)
            for _ in anchor.run(anchor.stem(images)):
                pass
