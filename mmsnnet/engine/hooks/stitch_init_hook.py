from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from mmengine import dist
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmsnnet.engine.randomness import kept_generators, seed_generators
from mmsnnet.models import StitchedFullyShardedDataParallel, find_stitched_backbone
from mmsnnet.models.model_weights import unwrapped_model
from mmsnnet.registry import HOOKS
from mmsnnet.stitching import NormalEquations, StitchedNetwork
from mmsnnet.stitching.network import evaluation_mode


@HOOKS.register_module()
class StitchInitHook(Hook):
    """Initialises the stitching layers by least squares on training images, before the first iteration.

    The images are a sample of the training set that depends on ``seed`` alone; the ranks share them out and add up
    their sums, so that every rank ends with the same weights. Layers that a checkpoint has brought along are left
    alone, so that a resumed run starts at once. Random states are left as they were.

    Args:
        num_images: in total, over all ranks (SN-Netv2 takes about 50 for dense tasks, SN-Net 100).
        batch_size: images that go through the anchors together.
        seed: of the sample and of its augmentation.
    """

    def __init__(self, num_images: int = 50, batch_size: int = 2, seed: int = 0) -> None:
        if num_images < 1 or batch_size < 1:
            raise ValueError(f"num_images and batch_size are at least 1, got {num_images} and {batch_size}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed

    def before_train(self, runner: Runner) -> None:
        backbone = find_stitched_backbone(runner.model)
        network = backbone.network
        lacking = [key for key in network.space.layers if not network.layer(key).initialized]
        if not lacking:
            return
        start = time.monotonic()
        equations = NormalEquations(network, lacking)
        sharded = runner.model if isinstance(runner.model, StitchedFullyShardedDataParallel) else None
        rounds = 0
        for images in self._images(runner):
            rounds += 1
            equations.add(images) if sharded is None else sharded.run(equations.add, images)
        if sharded is not None:  # a rank with fewer images helps the others to gather what they run
            device = next(network.parameters()).device
            images = torch.zeros(1, network.anchor(0).in_chans, *backbone.img_size, device=device)
            for _ in range(rounds, self._most_rounds(runner)):
                sharded.run(_run_anchors, network, images)
        for total in equations.sums():
            dist.all_reduce(total)
        with nullcontext() if sharded is None else sharded.gathered():
            equations.solve()
            for key in lacking:
                for parameter in network.layer(key).parameters():
                    dist.broadcast(parameter.data)
        runner.logger.info(
            f"StitchInitHook: initialised {len(lacking)} stitching layers from "
            f"{min(self.num_images, len(runner.train_dataloader.dataset))} images in {time.monotonic() - start:.1f} s"
        )

    def _most_rounds(self, runner: Runner) -> int:
        """The batches of the first rank, which has as many as any."""
        images = min(self.num_images, len(runner.train_dataloader.dataset))
        return math.ceil(math.ceil(images / dist.get_world_size()) / self.batch_size)

    def _images(self, runner: Runner) -> Iterator[Tensor]:
        """This rank's batches (B, 3, H, W), preprocessed as in training."""
        dataset = runner.train_dataloader.dataset
        chosen = np.random.default_rng(self.seed).permutation(len(dataset))[: self.num_images]
        own = chosen[dist.get_rank() :: dist.get_world_size()]
        model = unwrapped_model(runner.model)
        with kept_generators():
            for first in range(0, len(own), self.batch_size):
                samples = []
                for index in own[first : first + self.batch_size]:
                    seed_generators(self.seed + int(index))
                    samples.append(dataset[int(index)])
                yield model.data_preprocessor(pseudo_collate(samples), training=True)["inputs"]


def _run_anchors(network: StitchedNetwork, images: Tensor) -> None:
    """Runs the blocks that ``NormalEquations.add`` runs, in the same order, for nothing."""
    with evaluation_mode(network):
        for index in range(len(network.anchors)):
            anchor = network.anchor(index)
            for _ in anchor.run(anchor.stem(images), anchor.grid((images.shape[-2], images.shape[-1]))):
                pass
