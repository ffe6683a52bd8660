from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmsnnet.engine.sharding import gathered, run_batches
from mmsnnet.engine.training_images import sample_batches, sample_indices
from mmsnnet.models import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import HOOKS
from mmsnnet.stitching import NormalEquations
from mmsnnet.stitching.network import evaluation_mode


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
    """

    def __init__(self, num_images: int = 50, batch_size: int = 2, seed: int = 0) -> None:
        if num_images < 1 or batch_size < 1:
            raise ValueError(
                f"StitchInitHook: num_images and batch_size must be at least 1, got {num_images} and {batch_size}"
            )
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        backbone = find_stitched_backbone(runner.model)
        network = backbone.network
        missing = [key for key in network.space.layers if not network.layer(key).initialized]
        if not missing:
            return
        start = time.monotonic()
        equations = NormalEquations(network, missing)
        run_batches(runner.model, equations.add, self._images(runner), partial(_run_anchors, backbone))
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

    def _images(self, runner: Runner) -> Iterator[Tensor]:
        """This rank's batches (B, 3, H, W), preprocessed as in training."""
        dataset = runner.train_dataloader.dataset
        indices = sample_indices(len(dataset), self.num_images, self.seed)
        of_rank = indices[dist.get_rank() :: dist.get_world_size()]
        batches = [of_rank[first : first + self.batch_size] for first in range(0, len(of_rank), self.batch_size)]
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
