"""What a whole model costs at each stitch: the backbone's cost composed, everything behind it counted once."""

from __future__ import annotations

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmsnnet.models.backbones import find_stitched_backbone
from mmsnnet.stitching import Cost, count_flops
from mmsnnet.stitching.network import evaluation_mode


@torch.no_grad()
def model_costs(model: BaseModel, input_shape: tuple[int, int] | None = None) -> dict[int, Cost]:
    """FLOPs and parameters of the deployed model by stitch id, for one input of ``input_shape`` (height, width; the
    backbone's ``img_size`` by default).

    What follows the backbone sees maps of one shape whichever stitch ran, so that it is counted once, with the cheapest
    stitch. Heads that only training runs are not counted.
    """
    backbone = find_stitched_backbone(model)
    shape = backbone.img_size if input_shape is None else input_shape
    costs = backbone.costs(shape)
    active = backbone.stitch
    backbone.set_stitch(min(costs, key=lambda id_: costs[id_].flops))
    image = next(model.parameters()).new_zeros(1, backbone.network.anchor(0).in_chans, *shape)
    try:
        with evaluation_mode(model):
            rest = _cost_behind(model, backbone, image)
    finally:
        backbone.set_stitch(active)
    return {id_: cost + rest for id_, cost in costs.items()}


def _cost_behind(model: BaseModel, backbone: nn.Module, image: Tensor) -> Cost:
    """The cost of all that runs on the backbone's maps."""
    inside = set(backbone.modules())
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_hook(lambda module, inputs, outputs: called.add(module))
        for module in model.modules()
        if module not in inside
    ]
    try:
        name = next(name for name, module in model.named_modules() if module is backbone)
        flops = count_flops(_TensorMode(model), image, outside=f"model.{name}")
    finally:
        for hook in hooks:
            hook.remove()
    params = {parameter for module in called for parameter in module.parameters(recurse=False)}
    return Cost(flops, sum(parameter.numel() for parameter in params))


class _TensorMode(nn.Module):
    """A model's forward from images to what its heads put out."""

    def __init__(self, model: BaseModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> object:
        shape = tuple(images.shape[-2:])
        meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
        return self.model(images, [BaseDataElement(metainfo=meta) for _ in images], mode="tensor")
