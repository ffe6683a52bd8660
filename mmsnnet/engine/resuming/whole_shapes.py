"""Names and whole shapes of a model's tensors, sharded or not."""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp._common_utils import clean_tensor_name

from mmsnnet.files.reading import tensor_shapes
from mmsnnet.models import StitchedFullyShardedDataParallel
from mmsnnet.models.model_weights import unwrapped_model


def state_shapes(model: nn.Module) -> dict[str, object]:
    """The whole shapes in a model's state dict, without communication between ranks."""
    if isinstance(model, StitchedFullyShardedDataParallel):
        return dict(model.state_shapes)
    return tensor_shapes(unwrapped_model(model).state_dict())


def parameter_shape(model: nn.Module, parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole shape of a parameter that may be sharded."""
    shapes = model.shapes if isinstance(model, StitchedFullyShardedDataParallel) else {}
    return tuple(shapes.get(parameter, parameter.shape))


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names in its state dict."""
    return {clean_tensor_name(name): module for name, module in unwrapped_model(model).named_modules()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model by their names in its state dict."""
    return {clean_tensor_name(name): parameter for name, parameter in unwrapped_model(model).named_parameters()}
