"""Anchors beyond one GPU's memory: blocks sharded over the processes, each gathered where a route runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.model.wrappers import MMFullyShardedDataParallel
from torch import nn
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from mmsnnet.models.backbones import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import MODEL_WRAPPERS
from mmsnnet.stitching import Anchor, Stitch
from mmsnnet.stitching.anchors.attention import AnchorAttention


@MODEL_WRAPPERS.register_module()
class StitchedFullyShardedDataParallel(MMFullyShardedDataParallel):
    """mmengine's ``MMFullyShardedDataParallel`` for a stitched model, made by ``mmsnnet.FSDPStrategy``.

    Each block of an anchor is a unit of its own: a process holds its share of the weights, gradients and optimizer
    states, and gathers the blocks that a route runs one after the other, no others. All else (stems, stitching layers,
    heads) is one unit that is gathered throughout a step. A relative position bias belongs to it too: it is read before
    its block runs.

    All processes gather a unit together, so each has to run as many batches as the others, in evaluation too. Within a
    batch of evaluation the backbone may be called more often in some (slide inference over images of several sizes):
    the others then run it along with them, for nothing.

    Args:
        module: the model, not sharded yet.
        auto_wrap_policy: as of mmengine's class, in place of those units.
        device_id: where the gathered weights are: the number of a GPU; without GPUs, the CPU whatever is given.
        kwargs: as of mmengine's class.

    Attributes:
        shapes: the shape of each parameter as a whole. A process holds a flat piece of it, which may be empty.
        state_shapes: the whole shape of each tensor in the state dict, by name.

    Raises:
        TypeError: the model has no stitched backbone.
        ValueError: ``use_orig_params`` is False, which would make one parameter of each unit; blocks with a relative
            position bias are to be compiled.
    """

    def __init__(self, module: nn.Module, auto_wrap_policy: Any = None, device_id: Any = None, **kwargs: Any) -> None:
        if not kwargs.get("use_orig_params", True):
            raise ValueError("a route uses some parameters of a unit and not others: leave out use_orig_params=False")
        backbone = find_stitched_backbone(module)
        backbone.sampler()  # counts what whole blocks cost, which sharded ones do not tell
        if auto_wrap_policy is None:
            units = set(sharded_units(backbone))
            auto_wrap_policy = partial(lambda_auto_wrap_policy, lambda_fn=units.__contains__)
        shapes = {parameter: parameter.shape for parameter in module.parameters()}
        state_shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        device = torch.device("cpu") if get_device() == "cpu" else device_id
        super().__init__(module, auto_wrap_policy=auto_wrap_policy, device_id=device, **kwargs)
        self.shapes = shapes
        self.state_shapes = state_shapes
        self._drawn: set[Stitch] = set()
        self._predicting = False
        backbone.register_forward_pre_hook(self._before_backbone)

    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone inside."""
        return find_stitched_backbone(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and all(parameter.grad is None for parameter in self.parameters()):
            self._drawn.clear()  # the gradients of earlier stitches are gone, of a step that AMP left out, say
        before = self.backbone.draws
        outputs = super().forward(*args, **kwargs)
        if torch.is_grad_enabled():
            sampler, space = self.backbone.sampler(), self.backbone.space
            self._drawn |= {space[sampler.draw(number)] for number in range(before, self.backbone.draws)}
        return outputs

    def val_step(self, data: dict | tuple | list) -> list:
        """The model's predictions; each process has its own."""
        return self._predict(data)

    def test_step(self, data: dict | tuple | list) -> list:
        """The model's predictions; each process has its own."""
        return self._predict(data)

    def _predict(self, data: dict | tuple | list) -> list:
        self._predicting = True
        try:
            predictions = super().val_step(data)
        finally:
            self._predicting = False
        backbone = self.backbone
        parameter = next(self.parameters())
        idle = parameter.new_zeros(1, backbone.network.anchor(0).in_chans, *backbone.img_size)
        while self._some_run(False):
            self.run(backbone, idle)
        return predictions

    def _before_backbone(self, *_: Any) -> None:
        """Tells the processes that are done with their batch that this one is not."""
        if self._predicting:
            self._some_run(True)

    def _some_run(self, this: bool) -> bool:
        """Whether the backbone is about to run in any process; each is asked as often as the others."""
        running = torch.tensor(int(this), device=next(self.parameters()).device)
        dist.all_reduce(running, op="max")
        return this or bool(running)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients that are to add up are reduced after each backward pass all the same. torch's ``no_sync`` leaves
        that to the last pass, which fails where its stitch does not use a unit that an earlier one used; and until then
        each process would hold whole gradients."""
        yield

    def drop_unused_gradients(self) -> None:
        """To be called right before a step. Takes the gradients off those parameters of the backbone that no stitch
        drawn since the last step used. They are zeros where the unit was used otherwise, by which momentum and weight
        decay would move the parameters."""
        backbone = self.backbone
        used = {parameter for stitch in self._drawn for parameter in backbone.trained_parameters(stitch)}
        for parameter in backbone.parameters():
            if parameter not in used:
                parameter.grad = None
        self._drawn.clear()

    @torch.no_grad()
    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, run in the place of the model's forward: what it runs of the backbone finds its weights
        gathered. All processes have to call it, and run the same blocks."""
        self.module.forward = function
        try:
            return self(*args)
        finally:
            del self.module.forward

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, parameters outside the blocks are whole, and what is written to them, alike in every process, is
        kept. No forward can run inside."""
        with self.summon_full_params(self, recurse=False):
            yield


def sharded_units(backbone: StitchedBackbone) -> Iterator[nn.Module]:
    """The modules of a backbone that are gathered one by one: the blocks of its anchors; of a block with a relative
    position bias, which is read from outside, its parts."""
    for anchor in backbone.network.anchors:
        assert isinstance(anchor, Anchor)
        for index in anchor.blocks:
            block = anchor.block(index)
            attention = getattr(block, "attn", None)
            if isinstance(attention, AnchorAttention) and attention.bias_grid is not None:
                if anchor.compiled:
                    raise ValueError(
                        "FSDP gathers a block with a relative position bias in parts, which cannot be compiled: set "
                        "compile=False in the backbone, or leave out rel_pos_bias"
                    )
                yield from (attention.qkv, attention.proj, block.mlp)
            else:
                yield block
