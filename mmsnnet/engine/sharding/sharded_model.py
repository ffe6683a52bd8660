"""Functions that take any model, whether its weights are sharded or whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from mmsnnet.engine.sharding.fsdp_strategy import FSDPStrategy, clean_tensor_name
from mmsnnet.engine.sharding.stitched_fully_sharded_data_parallel import StitchedFullyShardedDataParallel
from mmsnnet.files.reading import tensor_shapes
from mmsnnet.models.model_weights import unwrapped_model

Batch = TypeVar("Batch")


def is_sharded(model: nn.Module) -> bool:
    """Whether a rank holds only a part of some weights."""
    return any(isinstance(module, FullyShardedDataParallel) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def parameter_shapes(model: nn.Module) -> Mapping[nn.Parameter, torch.Size]:
    """Shape of each whole parameter.

    Raises:
        TypeError: another wrapper than ours shards the model, and hides the shapes.
    """
    if isinstance(model, StitchedFullyShardedDataParallel):
        return model.parameter_shapes
    if isinstance(model, FullyShardedDataParallel):
        raise TypeError(
            f"{type(model).__name__} hides which parameters are vectors, which are not decayed, and its optimizer "
            "moves weights that a stitch does not use: set strategy=dict(type='mmsnnet.FSDPStrategy')"
        )
    return {parameter: parameter.shape for parameter in model.parameters()}


def state_shapes(model: nn.Module) -> Mapping[str, object]:
    """Shape of each whole tensor in a model's state dict, without communication."""
    if isinstance(model, StitchedFullyShardedDataParallel):
        return model.state_shapes
    return tensor_shapes(unwrapped_model(model).state_dict())


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names in its state dict."""
    return {clean_tensor_name(name): module for name, module in unwrapped_model(model).named_modules()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by their names in its state dict."""
    return {clean_tensor_name(name): parameter for name, parameter in unwrapped_model(model).named_parameters()}


def run_batches(
    model: nn.Module, function: Callable[[Batch], object], batches: Iterable[Batch], idle: Callable[[], object]
) -> None:
    """Call ``function``, which runs parts of the model, with each batch of this rank.

    On a rank with fewer batches than others, a sharded model calls ``idle`` in the place of the missing ones, because
    all ranks gather weights together. So ``idle`` has to run the same blocks as ``function``, in the same order.
    """
    if isinstance(model, StitchedFullyShardedDataParallel):
        model.run_batches(function, batches, idle)
    else:
        for batch in batches:
            function(batch)


def gathered(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, all parameters outside the anchors' blocks are whole.

    What all ranks write to them alike is kept.
    """
    return model.gathered() if isinstance(model, StitchedFullyShardedDataParallel) else nullcontext()


def refuse_stock_sharding(runner: Runner) -> None:
    """Refuse mmengine's sharding of a stitched model.

    Call this before the model is built, because mmengine may fail to wrap it.

    Raises:
        TypeError: the runner's strategy is mmengine's.
    """
    strategy = getattr(runner, "strategy", None)  # only a FlexibleRunner has one
    if isinstance(strategy, MMEngineFSDPStrategy) and not isinstance(strategy, FSDPStrategy):
        raise TypeError(
            "mmengine's FSDPStrategy moves weights that a stitch does not use, and cannot resume: set "
            "strategy=dict(type='mmsnnet.FSDPStrategy')"
        )
