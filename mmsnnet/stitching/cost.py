"""FLOPs and parameters, counted once per component and composed per stitch.

FLOPs are multiply-accumulates as fvcore counts them (and as the papers print them) for one image. fvcore counts
scaled-dot-product attention as 0, so it is given a handle here. Blocks and stitching layers are counted on the meta
device: nothing is computed. Stitching layers count as deployed, with their low-rank update merged.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmsnnet.stitching.anchors.base import Anchor
from mmsnnet.stitching.network import StitchedNetwork, evaluation_mode
from mmsnnet.stitching.route_parts import Component, Part, classifier_parts, part_parameters, tap_parts
from mmsnnet.stitching.space import Stitch, StitchSpace
from mmsnnet.stitching.stitching_layer import StitchingLayer
from mmsnnet.stitching.windows import tokens_of


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply-accumulates for one image) and parameters (weights used)."""

    flops: int = 0
    params: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.params + other.params)


@dataclass(frozen=True)
class CostModel:
    """The cost of every component at one input size; the cost of a stitch is the sum over what it runs."""

    space: StitchSpace
    input_shape: tuple[int, int]
    parts: Mapping[Part, Cost]

    def stitch(self, stitch: Stitch, out_indices: Sequence[int]) -> Cost:
        """The cost of a route with taps at ``out_indices``: what :meth:`StitchedNetwork.forward` runs."""
        return self._total(tap_parts(self.space, stitch, out_indices))

    def classifier(self, stitch: Stitch) -> Cost:
        """The cost of a route that ends in a classifier: what :meth:`StitchedNetwork.classify` runs."""
        return self._total(classifier_parts(stitch))

    def _total(self, parts: Sequence[Part]) -> Cost:
        return sum((self.parts[part] for part in dict.fromkeys(parts)), Cost())


@torch.no_grad()
def cost_model(network: StitchedNetwork, input_shape: tuple[int, int]) -> CostModel:
    """Counts each component of ``network`` once, for one image of ``input_shape`` (height, width); what has been left
    out of an anchor (:meth:`Anchor.keep`) is in no stitch and not counted."""
    parts: dict[Part, Cost] = {}
    dtype = next(network.parameters()).dtype
    for index in range(len(network.anchors)):
        anchor = network.anchor(index)
        if anchor.has_stem:
            image = next(anchor.parameters()).new_zeros(1, anchor.in_chans, *input_shape)
            with evaluation_mode(anchor), torch.autocast(image.device.type, enabled=False):
                stem_flops = count_flops(_Call(anchor, anchor.stem), image)
            stem = Component("stem", index)
            parts[stem] = Cost(stem_flops, _numel(part_parameters(network, stem)))
        if not anchor.blocks:
            continue
        told = Component("positions", index)
        parts[told] = Cost(0, _numel(part_parameters(network, told)))
        positions = anchor.positions(anchor.grid(input_shape))
        # timm makes all blocks of a ViT by one rule: those with the same parameters and windows are alike.
        alike: dict[object, Cost] = {}
        for block in anchor.blocks:
            module = anchor.block(block)
            kind = (anchor.windows[block], *((name, p.shape) for name, p in module.named_parameters()))
            if kind not in alike:
                flops = count_flops(
                    _BlockCall(anchor, block, positions[block], input_shape),
                    _arranged(anchor, block, input_shape, dtype),
                )
                alike[kind] = Cost(flops, _numel(module.parameters()))
            parts[Component("block", index, block)] = alike[kind]
        if anchor.classifier:
            number = tokens_of(anchor.grid(input_shape), 0, anchor.num_prefix_tokens)
            tokens = next(anchor.parameters()).new_zeros(1, number, anchor.width)
            classifier = Component("classifier", index)
            parts[classifier] = Cost(
                count_flops(_Call(anchor, anchor.classify), tokens), _numel(part_parameters(network, classifier))
            )
    layers: dict[object, Cost] = {}
    for key in network.space.layers:
        layer = network.layer(key)
        tokens = _arranged(network.anchor(key.source), key.source_block, input_shape, dtype)
        size = (tokens.shape, layer.out_features)
        if size not in layers:
            with torch.device("meta"):
                merged = StitchingLayer(layer.in_features, layer.out_features, rank=0).to(tokens.dtype)
            layers[size] = Cost(count_flops(merged, tokens), _numel(merged.parameters()))
        parts[key] = layers[size]
    return CostModel(network.space, input_shape, parts)


def _arranged(anchor: Anchor, block: int, input_shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """Tokens of one image on the meta device, arranged as ``block`` takes and gives them."""
    number = tokens_of(anchor.grid(input_shape), anchor.windows[block], anchor.num_prefix_tokens)
    return torch.empty(1, number, anchor.width, device="meta", dtype=dtype)


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """FLOPs of ``module(*inputs)``, counted by fvcore with a handle for fused attention."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    # The casts of a surrounding autocast would be traced as constants that require a gradient, which fails.
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        return int(analysis.total())


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-accumulates of softmax(Q K^T) V with Q (..., N, D), K (..., M, D), V (..., M, E)."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


class _BlockCall(nn.Module):
    """A block of an anchor on images of one size, on the meta device, for fvcore to trace."""

    def __init__(
        self, anchor: Anchor, block: int, positions: torch.Tensor | None, input_shape: tuple[int, int]
    ) -> None:
        super().__init__()
        self.block = copy.deepcopy(anchor.block(block)).to("meta")
        self.positions = None if positions is None else positions.to("meta")
        self.grid = anchor.grid(input_shape)
        self.call_block = anchor.call_block

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.call_block(self.block, tokens, self.grid, self.positions)


class _Call(nn.Module):
    """A method of a module as a module, for fvcore to trace."""

    def __init__(self, owner: nn.Module, method: Any) -> None:
        super().__init__()
        self.owner = owner
        self.method = method

    def forward(self, *inputs: Any) -> Any:
        return self.method(*inputs)


def _numel(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
