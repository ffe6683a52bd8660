from __future__ import annotations

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import load_checkpoint

from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import MODELS
from mmsnnet.stitching import StitchSpace


def build_space(config: Config) -> StitchSpace:
    """The stitch space of a config's backbone, without weights: quick, whatever the size of the anchors, unless a model
    computes while it is built.

    Raises:
        TypeError: the model has no stitched backbone.
    """
    try:
        with torch.device("meta"):
            model = MODELS.build(config.model)
    except RuntimeError:  # of what cannot be computed without values
        model = MODELS.build(config.model)
    return find_stitched_backbone(model).space


def build_model(config: Config, checkpoint: str | None = None, device: str | torch.device = "cpu") -> BaseModel:
    """The model of a config, in evaluation mode; choose its stitch with ``model.backbone.set_stitch``.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: weights to load; None leaves random ones, and the anchors' pretrained files unread.
        device: where to put it.
    """
    model = MODELS.build(config.model)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, map_location="cpu")
    return model.to(device).eval()
