"""Find the stitched backbone inside a model."""

from __future__ import annotations

from torch import nn

from mmsnnet.models.backbones.stitched_backbone import StitchedBackbone


def find_stitched_backbone(model: nn.Module) -> StitchedBackbone:
    """The ``StitchedBackbone`` inside a model, wrapped or not.

    Raises:
        TypeError: the model has no such backbone, or more than one.
    """
    backbones = [module for module in model.modules() if isinstance(module, StitchedBackbone)]
    if len(backbones) != 1:
        raise TypeError(
            f"{type(model).__name__} has {len(backbones)} backbones of type mmsnnet.StitchedViT, where one is needed: "
            "set model.backbone.type in the config"
        )
    return backbones[0]
