"""A training step of several stitches, optionally with distillation."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.engine.attributes import replaced_attributes
from mmsnnet.engine.distillation import Distillation, Losses
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.model_weights import unwrapped_model


@contextmanager
def several_stitches(model: nn.Module, distillation: Distillation | None = None, iteration: int = 0) -> Iterator[None]:
    """Inside, one training step runs the backbone's ``stitches_per_step`` stitches, which share common blocks.

    The model's forward in mode ``'loss'`` runs once for each stitch, on copies of the same preprocessed batch, because
    models and heads change their input in place. The step minimises the sum of the losses in one backward pass, and
    logs the mean of each loss over the stitches that have it. Wrappers and mixed precision see one forward.

    Args:
        model: an mmengine model with a stitched backbone, maybe wrapped for distributed training.
        distillation: adds its losses to those of each pass.
        iteration: the number of the step, for the warm-up of distillation.

    Raises:
        TypeError: on exit: the step did not call the model's forward in mode ``'loss'``.
    """
    inner = unwrapped_model(model)
    assert isinstance(inner, BaseModel)
    backbone = find_stitched_backbone(inner)
    forward, parse_losses = inner.forward, inner.parse_losses  # as they are outside
    runs = 0

    def run(*args: Any, **kwargs: Any) -> list[Losses]:
        nonlocal runs
        runs += 1
        passes = []
        with backbone.share_step(), distillation.step(iteration) if distillation else nullcontext():
            for number in range(backbone.stitches_per_step, 0, -1):
                inputs = (args, kwargs) if number == 1 else copy.deepcopy((args, kwargs))
                losses = forward(*inputs[0], **inputs[1])
                passes.append(distillation.add(losses) if distillation else losses)
        return passes

    def parse(passes: Sequence[Losses]) -> tuple[Tensor, dict[str, Tensor]]:
        losses, logs = zip(*map(parse_losses, passes), strict=True)
        return torch.stack(losses).sum(), _means(logs)

    with replaced_attributes([(inner, "forward", run), (inner, "parse_losses", parse)]):
        yield
    if runs != 1:
        raise TypeError(
            "stitches_per_step and distill need a model whose train_step calls its forward once; that of "
            f"{type(inner).__name__} called it {runs} times: set train_cfg.stitches_per_step=1 and distill=None"
        )


def _means(passes: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each loss over the passes that have it."""
    names = dict.fromkeys(name for losses in passes for name in losses)
    return {name: torch.stack([losses[name].detach() for losses in passes if name in losses]).mean(0) for name in names}
