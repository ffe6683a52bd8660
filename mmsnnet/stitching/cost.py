"""FLOPs and parameters of a stitch: the sum over the parts that it runs, each counted once.

FLOPs are multiply-accumulates for one image, as fvcore counts them and as the papers print them. fvcore alone counts
fused attention as 0, so this file registers a counting function for it. The sum equals a direct count of the merged
network, without a trace for each stitch. Parts are counted on the meta device, where nothing is computed. Stitching
layers are counted with their low-rank update merged, because the merged network is deployed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mmsnnet.stitching.anchors.base import CLASSIFIER, NORM, SHARED, STEM, Anchor, Component
from mmsnnet.stitching.features import Features
from mmsnnet.stitching.network import StitchedNetwork
from mmsnnet.stitching.route_parts import AnchorPart, Part, classifier_parts, parts_run, tap_parts
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.stitching.stitch import Stitch
from mmsnnet.stitching.stitching_layer import StitchingLayer


@dataclass(frozen=True)
class Cost:
    """FLOPs (multiply-accumulates for one image) and the number of parameters used."""

    flops: int = 0
    params: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.params + other.params)


@dataclass(frozen=True)
class CostModel:
    """The cost of every component at one input size, and of each stitch as their sum.

    Attributes:
        space: the stitches.
        input_shape: height and width of the image.
        parts: the cost of each part of the network.
    """

    space: StitchSpace
    input_shape: tuple[int, int]
    parts: Mapping[Part, Cost]

    def stitch(self, stitch: Stitch, out_indices: Sequence[int]) -> Cost:
        """The cost of :meth:`StitchedNetwork.forward`: a route with taps at ``out_indices``."""
        return self._total(tap_parts(self.space, stitch, out_indices))

    def classifier(self, stitch: Stitch) -> Cost:
        """The cost of :meth:`StitchedNetwork.classify`: a route that ends in a classifier."""
        return self._total(classifier_parts(stitch))

    def stitches(self, out_indices: Sequence[int] | None) -> dict[int, Cost]:
        """The cost of each stitch, by its id.

        Routes have taps at ``out_indices``, or end in a classifier if ``out_indices`` is None.
        """
        return {stitch.id: self._total(parts_run(self.space, stitch, out_indices)) for stitch in self.space}

    def tree(self, stitches: Sequence[Stitch], out_indices: Sequence[int] | None) -> Cost:
        """The cost of stitches that share common blocks, as in a training step or in prefix reuse."""
        nodes: dict[tuple[tuple[Part, ...], Part], Part] = {}
        for stitch in stitches:
            route: tuple[Part, ...] = ()
            for part in parts_run(self.space, stitch, out_indices):
                nodes[route, part] = part
                if isinstance(part, AnchorPart):  # a layer follows from the blocks before and after it
                    route = (*route, part)
        flops = sum(self.parts[part].flops for part in nodes.values())
        return Cost(flops, self._total(tuple(nodes.values())).params)

    def _total(self, parts: Sequence[Part]) -> Cost:
        return sum((self.parts[part] for part in dict.fromkeys(parts)), Cost())


@torch.no_grad()
def cost_model(network: StitchedNetwork, input_shape: tuple[int, int]) -> CostModel:
    """Count each component of ``network`` once, for one image of ``input_shape`` (height, width).

    Components that an anchor has dropped (:meth:`Anchor.keep`) belong to no stitch and are not counted.
    """
    parts: dict[Part, Cost] = {}
    for index in range(len(network.anchors)):
        anchor = network.anchor(index)
        if anchor.components:
            costs = _anchor_costs(anchor, input_shape)
            parts |= {AnchorPart(index, component): cost for component, cost in costs.items()}
    layers: dict[object, Cost] = {}
    for key in network.space.layers:
        layer = network.layer(key)
        features = network.anchor(key.source).geometry(input_shape)[key.source_block + 1]
        size = (features.layout, features.data.shape, layer.out_features)
        if size not in layers:
            with torch.device("meta"):
                merged = StitchingLayer(layer.in_features, layer.out_features, rank=0).to(features.data.dtype)
            call = _Call(merged, partial(Features.project, layer=merged), features)
            layers[size] = Cost(count_flops(call, features.data), _numel(merged.parameters()))
        parts[key] = layers[size]
    return CostModel(network.space, input_shape, parts)


def _anchor_costs(anchor: Anchor, input_shape: tuple[int, int]) -> dict[Component, Cost]:
    """The cost of each component that an anchor has."""
    geometry, outline = anchor.geometry(input_shape), anchor.outline()
    flops: dict[Component, int] = {SHARED: 0, NORM: 0}
    by_kind: dict[Hashable, int] = {}
    for component in anchor.components:
        if component == SHARED:
            continue
        kind: Hashable = anchor.kind(component.block) if component.role == "block" else component
        if kind not in by_kind:
            by_kind[kind] = _component_flops(outline, component, geometry, input_shape)
        flops[component] = by_kind[kind]
    return {component: Cost(number, _numel(anchor.parameters_of(component))) for component, number in flops.items()}


def _component_flops(
    anchor: Anchor, component: Component, geometry: Sequence[Features], input_shape: tuple[int, int]
) -> int:
    device = next(anchor.parameters()).device
    if component == STEM:
        return count_flops(_Call(anchor, anchor.stem), torch.zeros(1, anchor.in_chans, *input_shape, device=device))
    if component == NORM:  # it has no method of its own
        with_norm = _Call(anchor, anchor.classify, geometry[-1])
        without = _component_flops(anchor, CLASSIFIER, geometry, input_shape)
        return count_flops(with_norm, torch.zeros_like(geometry[-1].data, device=device)) - without
    entering, function = geometry[-1], cast(Callable[[Any], Any], partial(anchor.classify, skip_norm=True))
    if component.role == "block":
        entering = geometry[component.block].to(anchor.layout(component.block))
        function = partial(anchor.call, component.block)
    data = torch.zeros_like(entering.data, device=device)
    return count_flops(_Call(anchor, function, entering), data)


def count_flops(module: nn.Module, *inputs: Any) -> int:
    """Count the FLOPs of ``module(*inputs)`` with fvcore, fused attention included.

    Convolutions are not computed: their outputs are zero.
    """
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(module, inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_flops)
    analysis.set_op_handle("mmsnnet::uncomputed_convolution", _convolution_flops)
    # Tracing fails on the casts of a surrounding autocast: they become constants that require a gradient.
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False), _UncomputedConvolutions():
        return int(analysis.total())


def _attention_flops(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-accumulates of softmax(Q K^T) V with Q (..., N, D), K (..., M, D), V (..., M, E)."""
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _convolution_flops(inputs: list[Any], outputs: list[Any]) -> int:
    from fvcore.nn.jit_handles import conv_flop_count, get_shape

    images, weight, *_, transposed, _, _ = inputs
    return conv_flop_count(get_shape(images), get_shape(weight), get_shape(outputs[0]), transposed.toIValue())


@torch.library.custom_op("mmsnnet::uncomputed_convolution", mutates_args=())
def _uncomputed_convolution(
    images: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Zeros of the shape of a convolution's output.

    A trace records this operator on every device. It would not record a convolution on the meta device.
    """
    settings = (stride, padding, dilation, transposed, output_padding, groups)
    return images.new_zeros(torch.convolution(images.to("meta"), weight.to("meta"), None, *settings).shape)


@_uncomputed_convolution.register_fake
def _(images: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    return torch.convolution(images, weight, None, *settings)


class _UncomputedConvolutions(TorchFunctionMode):
    """Replace 2D convolutions, most of the time of a count, by :func:`_uncomputed_convolution`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        replacements: dict[Any, Callable[..., Any]] = {
            functional.conv2d: _conv2d,
            functional.conv_transpose2d: _conv_transpose2d,
        }
        return replacements.get(func, func)(*args, **(kwargs or {}))


# Their arguments are those of torch.nn.functional.
def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if isinstance(padding, str):  # "same" may pad one side more than the other
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return _uncomputed_convolution(input, weight, *map(_pair, (stride, padding, dilation)), False, (0, 0), groups)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    settings = (*map(_pair, (stride, padding, dilation)), True, _pair(output_padding), groups)
    return _uncomputed_convolution(input, weight, *settings)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """The two numbers that a setting of a convolution stands for."""
    return (value, value) if isinstance(value, int) else tuple(value)


class _Call(nn.Module):
    """A function that runs a module, as a module of tensors, so that fvcore can trace it.

    The function takes images, or features like ``features``.
    """

    def __init__(self, module: nn.Module, function: Callable[[Any], Any], features: Features | None = None) -> None:
        super().__init__()
        self.module = module
        self.function = function
        self.features = features

    def forward(self, data: Tensor) -> Tensor:
        result = self.function(data if self.features is None else self.features.with_data(data))
        return result.data if isinstance(result, Features) else result


def _numel(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in parameters)
