"""SN-Net's published routes, walked over timm's own modules (arXiv 2302.06586).

A route is an entry of the ``v1_*.json`` beside this file. Nothing here is of the package under test: stages, blocks and
shared layers come from the JSON files, modules from timm.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from timm.models.levit import LevitDistilled
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

FAMILIES = ("deit_ti_s_b", "swin_ti_s_b", "resnet18_resnet50", "resnet18_swin_ti", "levit_192_256")


def read(family: str) -> dict[str, Any]:
    """The published space of a family."""
    return json.loads((Path(__file__).parent / f"v1_{family}.json").read_text())


def layer_sizes(published: Mapping[str, Any]) -> dict[str, tuple[int, int, int]]:
    """The stage, and the front and the back anchor of each stitching layer, by its name in the published checkpoint."""
    sizes = {}
    for route in published["stitches"]:
        if route["kind"] == "stitch":
            front, back = route["segments"][0]["anchor"], route["segments"][-1]["anchor"]
            sizes[route["layer"]] = route["stage"], front, back
    return sizes


def walk(
    models: Sequence[Any],
    route: Mapping[str, Any],
    layers: Mapping[str, tuple[Tensor, Tensor]],
    images: Tensor,
    final_norm: bool = True,
) -> Tensor:
    """Run a published route: logits (B, classes).

    Args:
        models: the anchors as models of timm, in evaluation mode.
        route: an entry of ``stitches``.
        layers: weight (out, in) and bias (out,) of the stitching layers, by the name that ``route["layer"]`` has.
        images: (B, 3, H, W).
        final_norm: apply the final norm of a plain ViT on routes that cross, too. The published code leaves it out
            there.
    """
    current = route["segments"][0]["anchor"]
    x = embed(models[current], images)
    for segment in route["segments"]:
        if segment["anchor"] != current:
            x = cross(models[current], models[segment["anchor"]], *layers[route["layer"]], x)
            current = segment["anchor"]
        for block in range(*segment["blocks"]):
            x = run_block(models[current], segment["stage"], block, x)
    crossed = current != route["segments"][0]["anchor"]
    return classify(models[current], x, final_norm or not crossed)


def embed(model: Any, images: Tensor) -> Tensor:
    """What enters the first block."""
    if isinstance(model, VisionTransformer):
        return model.norm_pre(model._pos_embed(model.patch_embed(images)))
    if isinstance(model, SwinTransformer):
        return model.patch_embed(images)
    if isinstance(model, ResNet):
        return model.maxpool(model.act1(model.bn1(model.conv1(images))))
    assert isinstance(model, LevitDistilled)
    return model.stem(images).flatten(2).transpose(1, 2)


def run_block(model: Any, stage: int, block: int, x: Tensor) -> Tensor:
    """Run a block. timm's downsampling at the start of a stage runs with the stage's first block."""
    if isinstance(model, VisionTransformer):
        return model.blocks[block](x)
    if isinstance(model, ResNet):
        return (model.layer1, model.layer2, model.layer3, model.layer4)[stage][block](x)
    part = model.layers[stage] if isinstance(model, SwinTransformer) else model.stages[stage]
    return part.blocks[block](part.downsample(x) if block == 0 else x)


def cross(front: Any, back: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Apply a stitching layer: a 1 x 1 convolution after a ResNet, else a linear map of tokens."""
    if not isinstance(front, ResNet):
        return F.linear(x, weight, bias)
    x = F.conv2d(x, weight[:, :, None, None], bias)
    return x if isinstance(back, ResNet) else x.permute(0, 2, 3, 1)


def classify(model: Any, x: Tensor, final_norm: bool) -> Tensor:
    """What follows the last block."""
    if isinstance(model, VisionTransformer):
        return model.head((model.norm(x) if final_norm else x)[:, 0])
    if isinstance(model, SwinTransformer):
        return model.head.fc(model.norm(x).mean((1, 2)))
    if isinstance(model, ResNet):
        return model.fc(x.mean((2, 3)))
    pooled = x.mean(1)
    return (model.head(pooled) + model.head_dist(pooled)) / 2
