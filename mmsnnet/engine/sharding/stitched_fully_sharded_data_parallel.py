"""Training of anchors that are larger than one GPU's memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from mmengine import dist
from mmengine.device import get_device
from mmengine.model.wrappers import MMFullyShardedDataParallel
from torch import nn
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from mmsnnet.files.reading import tensor_shapes
from mmsnnet.models.backbones import StitchedBackbone, find_stitched_backbone
from mmsnnet.registry import MODEL_WRAPPERS
from mmsnnet.stitching import Anchor, Stitch
from mmsnnet.stitching.anchors.attention import modules_without_bias

Batch = TypeVar("Batch")


@MODEL_WRAPPERS.register_module()
class StitchedFullyShardedDataParallel(MMFullyShardedDataParallel):
    """mmengine's ``MMFullyShardedDataParallel`` for a stitched model; ``mmsnnet.FSDPStrategy`` builds it.

    Each block of an anchor is a unit: a rank holds its part of the block's weights, gradients and optimizer states. A
    route gathers the blocks that it runs, one after the other. The rest of the model (stems, stitching layers, heads)
    is one unit, which is gathered for a whole step. A relative position bias belongs to the rest, because the anchor
    reads it before its block runs.

    All ranks gather a unit together. So each needs as many batches as the others, in evaluation too. Slide inference
    may call the backbone more often on some ranks. The others then run dummy forwards.

    Args:
        module: the model, not sharded yet.
        auto_wrap_policy: as of mmengine's class; it replaces the units above.
        device_id: the number of the GPU for gathered weights; ignored without GPUs.
        kwargs: as of mmengine's class.

    Attributes:
        parameter_shapes: the shape of each whole parameter. A rank holds a flat part of it, which may be empty.
        state_shapes: the shape of each whole tensor in the state dict, by name.

    Raises:
        TypeError: the model has no stitched backbone.
        ValueError: ``use_orig_params`` is False, which would join the parameters of a unit; or blocks with a relative
            position bias are to be compiled.
    """

    def __init__(self, module: nn.Module, auto_wrap_policy: Any = None, device_id: Any = None, **kwargs: Any) -> None:
        if not kwargs.get("use_orig_params", True):
            raise ValueError(
                "use_orig_params=False joins the parameters of a unit, but a route trains only some of them: leave it "
                "out of strategy.model_wrapper"
            )
        backbone = find_stitched_backbone(module)
        backbone.sampler()  # counts the FLOPs of each stitch, which needs whole weights
        if auto_wrap_policy is None:
            units = set(sharded_units(backbone))
            auto_wrap_policy = partial(lambda_auto_wrap_policy, lambda_fn=units.__contains__)
        parameter_shapes = {parameter: parameter.shape for parameter in module.parameters()}
        state_shapes = tensor_shapes(module.state_dict())
        device = torch.device("cpu") if get_device() == "cpu" else device_id
        super().__init__(module, auto_wrap_policy=auto_wrap_policy, device_id=device, **kwargs)
        self.parameter_shapes = parameter_shapes
        self.state_shapes = state_shapes
        self._drawn: set[Stitch] = set()
        self._predicting = False
        backbone.register_forward_pre_hook(self._before_backbone)

    # A submodule under a second name would be in the state dict twice; a cached property is none.
    @cached_property
    def backbone(self) -> StitchedBackbone:
        """The stitched backbone inside the model."""
        return find_stitched_backbone(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and all(parameter.grad is None for parameter in self.parameters()):
            self._drawn.clear()  # the step for earlier stitches was left out, as AMP does on overflow
        before = self.backbone.draws
        outputs = super().forward(*args, **kwargs)
        if torch.is_grad_enabled():
            sampler, space = self.backbone.sampler(), self.backbone.space
            self._drawn |= {space[sampler.draw(number)] for number in range(before, self.backbone.draws)}
        return outputs

    def val_step(self, data: dict | tuple | list) -> list:
        """Predict a batch of this rank."""
        self._predicting = True
        try:
            predictions = super().val_step(data)
        finally:
            self._predicting = False
        backbone = self.backbone
        parameter = next(self.parameters())
        image = parameter.new_zeros(1, backbone.network.anchor(0).in_chans, *backbone.img_size)
        while self._some_rank_runs(False):
            self._run(backbone, image)
        return predictions

    test_step = val_step

    def _before_backbone(self, *_: Any) -> None:
        if self._predicting:
            self._some_rank_runs(True)

    def _some_rank_runs(self, this_rank: bool) -> bool:
        """Whether any rank is about to run the model. All ranks call this together."""
        running = torch.tensor(int(this_rank), device=next(self.parameters()).device)
        dist.all_reduce(running, op="max")
        return this_rank or bool(running)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Reduce gradients after each backward pass, although they are being accumulated.

        torch's ``no_sync`` leaves the reduction to the last pass. That fails if the last stitch does not use a unit
        that an earlier one used, and until then each rank would hold whole gradients.
        """
        yield

    def drop_unused_gradients(self) -> None:
        """Set gradients of backbone parameters that no stitch used to None.

        Such a gradient is zero if a stitch since the last step has used another parameter of the same unit. Momentum
        and weight decay would then move the parameter. Call this right before a step.
        """
        backbone = self.backbone
        used = {parameter for stitch in self._drawn for parameter in backbone.trained_parameters(stitch)}
        for parameter in backbone.parameters():
            if parameter not in used:
                parameter.grad = None
        self._drawn.clear()

    def run_batches(
        self, function: Callable[[Batch], object], batches: Iterable[Batch], idle: Callable[[], object]
    ) -> None:
        """Call ``function`` with each batch, then ``idle`` while other ranks have more.

        The blocks that these run have their weights gathered. Both have to run the same blocks.
        """
        for batch in batches:
            self._some_rank_runs(True)
            self._run(function, batch)
        while self._some_rank_runs(False):
            self._run(idle)

    @torch.no_grad()
    def _run(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function as the model's forward, because FSDP gathers weights only around that."""
        self.module.forward = function
        try:
            self(*args)
        finally:
            del self.module.forward

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, parameters outside the anchors' blocks are whole.

        What all ranks write to them alike is kept. No forward can run inside.
        """
        with self.summon_full_params(self, recurse=False):
            yield


def sharded_units(backbone: StitchedBackbone) -> Iterator[nn.Module]:
    """The modules of a backbone that FSDP gathers one by one.

    These are the blocks of its anchors. A block with a relative position bias is gathered in parts, because the anchor
    reads the bias from outside.
    """
    for anchor in backbone.network.anchors:
        assert isinstance(anchor, Anchor)
        for index in anchor.blocks:
            units = modules_without_bias(anchor.block(index))
            if len(units) > 1 and anchor.compiled:
                raise ValueError(
                    "FSDP gathers a block with a relative position bias in parts, which cannot be compiled: set "
                    "compile=False in the backbone, or leave out rel_pos_bias"
                )
            yield from units
