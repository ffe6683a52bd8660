"""The cost of a whole model at a stitch is the count of its forward."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmsnnet.models import model_costs
from mmsnnet.stitching import Cost, count_flops

MakeSegmentor = Callable[..., Any]

# The backbone's maps at taps that the decode head does or does not read.
TAPS = [dict(train=(1, 3), test=(3,)), (1, 3)]


class Deployed(nn.Module):
    """What is deployed of a model at one stitch, from images to what its decode head puts out."""

    def __init__(self, model: Any, stitch: str) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).eval()
        self.model.backbone.network = self.model.backbone.network.merged()
        self.model.backbone.set_stitch(stitch)

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward(images, mode="tensor")


def parameters_with_gradient(model: nn.Module, images: Tensor) -> int:
    model.requires_grad_(True)
    model(images).square().mean().backward()
    return sum(p.numel() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [None, (32, 64), (40, 50)])
def test_costs_are_those_of_the_deployed_model(
    shape: tuple[int, int] | None, make_segmentor: MakeSegmentor, make_images: Callable[..., Tensor]
) -> None:
    model = make_segmentor()
    costs = model_costs(model, shape)
    assert list(costs) == [stitch.id for stitch in model.backbone.space]
    images = make_images(1, *(shape or (32, 32)))
    for stitch in model.backbone.space:
        deployed = Deployed(model, stitch.name)
        expected = Cost(count_flops(deployed, images), parameters_with_gradient(deployed, images))
        assert costs[stitch.id] == expected, str(stitch)
    assert len({cost.flops for cost in costs.values()}) == len(costs)


@pytest.mark.parametrize("out_indices", TAPS)
def test_heads_that_only_training_runs_cost_nothing(out_indices: Any, make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor(out_indices=out_indices)
    with_head = model_costs(model)
    del model.auxiliary_head
    assert model_costs(model) == with_head


def test_taps_that_evaluation_mode_leaves_out_cost_nothing(make_segmentor: MakeSegmentor) -> None:
    fewer, all_taps = (model_costs(make_segmentor(out_indices=taps)) for taps in TAPS)
    small, large = 0, 1
    assert fewer[large] == all_taps[large]
    layer = 32 * 48 + 48
    assert all_taps[small].params - fewer[small].params == layer
    assert all_taps[small].flops - fewer[small].flops == 32 * 48 * 5  # four patches and the class token


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training: bool, make_segmentor: MakeSegmentor) -> None:
    model = make_segmentor(frozen_anchors=(0,)).train(training)
    model.backbone.set_stitch("L1-S1")
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    model_costs(model)
    assert model.backbone.stitch.name == "L1-S1"
    assert {name: module.training for name, module in model.named_modules()} == modes
    after = model.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
    assert not any(module._forward_hooks for module in model.modules())
