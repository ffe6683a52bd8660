"""What a recipe of benchmarks/front.py costs to train, in FLOPs for each image of a batch.

A backward pass counts as two forward passes, or as one where only stitching layers have gradients.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

import torch
from front_recipes import Regime
from mmengine.config import Config

from mmsnnet.apis import build_uninitialized, load_config
from mmsnnet.models import StitchedBackbone, find_stitched_backbone, model_costs


class Spending(NamedTuple):
    """FLOPs before and beside the steps, and of each step."""

    beside: float
    steps: Iterator[float]


def spending(settings: Config, regime: Regime) -> Spending:
    """The training cost of a config, without an end.

    With a :class:`NarrowDrawsHook`, the steps cost what they would if all stitches stayed; :func:`spent` corrects it.
    """
    model = build_uninitialized(settings)
    backbone = find_stitched_backbone(model)
    backbone.stitches_per_step = k = settings.train_cfg.get("stitches_per_step", 1)
    head = _head(model, backbone)
    heads = head * (2 if settings.model.get("auxiliary_head") else 1)  # the auxiliary head is like the decode head
    distill = settings.train_cfg.get("distill") or {}
    teacher = 0
    if distill.get("teacher"):
        frozen = build_uninitialized(load_config(distill["teacher"]["config"]))
        teacher = model_costs(frozen)[find_stitched_backbone(frozen).stitch.id].flops
    beside = 0.0
    for hook in settings.custom_hooks:
        if hook.get("refine"):
            share = hook["batch_size"] / settings.train_dataloader.batch_size
            beside += hook["refine"]["steps"] * _refinement_step(backbone) * share
        if hook["type"] == "mmsnnet.NarrowDrawsHook":
            beside += 2 * all_stitches(settings, regime.narrowing_images * regime.windows)
    sampler, counted = backbone.sampler(), backbone.cost_model()

    def steps() -> Iterator[float]:
        for step in count():
            stitches = [backbone.space[sampler.draw(number)] for number in range(step * k, (step + 1) * k)]
            yield 3 * (counted.tree(stitches, backbone.out_indices).flops + k * heads) + teacher

    return Spending(beside, steps())


def all_stitches(settings: Config, images: int) -> float:
    """A forward pass of all stitches over ``images``."""
    model = build_uninitialized(settings)
    backbone = find_stitched_backbone(model)
    tree = backbone.cost_model().tree(backbone.space.stitches, backbone.test_out_indices).flops
    total = tree + len(backbone.space) * _head(model, backbone)
    return images / settings.train_dataloader.batch_size * total


def spent(settings: Config, regime: Regime, folder: Path, iterations: int) -> float:
    """The cost of a run whose draws were narrowed after each validation, as its logs say."""
    narrowed = narrowed_draws(folder)[-((iterations - 1) // settings.train_cfg.val_interval) :]  # without killed tries
    return spending(settings, regime).beside + narrowed_steps(settings, narrowed, iterations)


def narrowed_draws(folder: Path) -> list[list[str]]:
    """The names of the stitches that were left after each validation, in the order of the logs."""
    texts = [path.read_text() for path in sorted(folder.glob("*/*.log"))]
    found = (re.findall(r"or are anchors; training draws (.+)$", text, re.M) for text in texts)
    return [names.split(", ") for of_text in found for names in of_text]


def narrowed_steps(settings: Config, narrowed: Sequence[Sequence[str]], iterations: int) -> float:
    """The cost of the steps of a run that draws only ``narrowed[k]`` after validation k, one stitch a step."""
    model = build_uninitialized(settings)
    backbone = find_stitched_backbone(model)
    costs, heads = backbone.training_costs(), 2 * _head(model, backbone)
    interval, total = settings.train_cfg.val_interval, 0.0
    for step in range(iterations):
        after, rest = divmod(step, interval)
        if rest == 0 < after <= len(narrowed):
            backbone.draw_only(narrowed[after - 1])
        total += 3 * (costs[backbone.sampler().draw(step)].flops + heads)
    return total


def _head(model: torch.nn.Module, backbone: StitchedBackbone) -> int:
    some = backbone.space.stitches[0].id
    return model_costs(model)[some].flops - backbone.costs()[some].flops


def _refinement_step(backbone: StitchedBackbone) -> float:
    """The targets of all anchors, and four routes as a tree, forward and backward."""
    crossing = [stitch for stitch in backbone.space if stitch.layers]
    order = torch.randperm(len(crossing), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [[crossing[index] for index in order[first : first + 4]] for first in range(0, len(order), 4)]
    trees = [backbone.cost_model().tree(group, backbone.out_indices).flops for group in groups]
    anchors = sum(backbone.costs()[anchor.id].flops for anchor in backbone.space.anchors)
    return anchors + 2 * sum(trees) / len(trees)
