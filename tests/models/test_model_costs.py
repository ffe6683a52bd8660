"""The cost of a whole model at a stitch is the count of its forward."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmsnnet.apis import build_model
from mmsnnet.models import model_costs
from mmsnnet.stitching import Cost, count_flops

MakeSegmentor = Callable[..., Any]
MakeDetector = Callable[..., Any]
MODELS = Path(__file__).parents[2] / "configs/_base_/models"

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


@pytest.mark.slow
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


@pytest.fixture
def make_detector(backbone_config: Callable[..., Any], randomise: Callable[[nn.Module], None]) -> MakeDetector:
    """``make_detector(name, proposals)``: the detector of a base config around a tiny backbone for images of 64 x 64,
    16 channels wide."""

    def make(name: str, proposals: int = 30) -> Any:
        anchors = dict(small=dict(window_size=2), large=dict(window_size=2))
        model: dict[str, Any] = dict(
            backbone=dict(backbone_config(**anchors, img_size=64), _delete_=True),
            neck=dict(in_channels=48, out_channels=16),
        )
        if name == "rtmdet":
            model |= dict(bbox_head=dict(in_channels=16, feat_channels=16))
        else:
            box = dict(in_channels=16, conv_out_channels=16, fc_out_channels=32)
            heads = dict(bbox_roi_extractor=dict(out_channels=16), bbox_head=box)
            if name == "mask-rcnn":
                mask = dict(in_channels=16, conv_out_channels=16)
                heads |= dict(mask_roi_extractor=dict(out_channels=16), mask_head=mask)
            model |= dict(rpn_head=dict(in_channels=16, feat_channels=16), roi_head=heads)
            model |= dict(test_cfg=dict(rpn=dict(max_per_img=proposals)))
        config = Config.fromfile(MODELS / f"stitched-deit3-s-l_{name}.py")
        config.merge_from_dict(dict(default_scope="mmdet", model=model))
        with DefaultScope.overwrite_default_scope("mmdet"):
            built = build_model(config)
        randomise(built)
        return built

    return make


def convolution(positions: int, inputs: int, outputs: int, kernel: int = 1) -> int:
    return positions * inputs * outputs * kernel**2


def normalised(positions: int, channels: int, kernel: int) -> int:
    """A convolution that keeps the channels, and the layer norm after it, which fvcore counts 5 for each element."""
    return convolution(positions, channels, channels, kernel) + 5 * positions * channels


def pyramid_flops(c: int = 48, f: int = 16) -> int:
    """From a map of 4 x 4 positions to sides of 16, 8, 4, 2 and 1."""
    finest = convolution(16, c, c // 2, 2) + 5 * 64 * c // 2 + convolution(64, c // 2, c // 4, 2)
    total = finest + convolution(16, c, c // 2, 2)
    for side, channels in ((16, c // 4), (8, c // 2), (4, c), (2, c)):
        total += convolution(side**2, channels, f) + 5 * side**2 * f + normalised(side**2, f, 3)
    return total


def rpn_flops(f: int = 16) -> int:
    """Two convolutions, then scores and boxes of three anchors, on all five levels."""
    positions = 16**2 + 8**2 + 4**2 + 2**2 + 1
    return 2 * convolution(positions, f, f, 3) + convolution(positions, f, 3) + convolution(positions, f, 3 * 4)


def box_head_flops(regions: int, f: int = 16, hidden: int = 32) -> int:
    linear = f * 7**2 * hidden + hidden * (80 + 1) + hidden * 80 * 4
    return 4 * normalised(regions * 7**2, f, 3) + regions * linear


def mask_head_flops(regions: int, f: int = 16) -> int:
    upsampled = convolution(regions * 14**2, f, f, 2)
    return 4 * normalised(regions * 14**2, f, 3) + upsampled + convolution(regions * 28**2, f, 80)


@pytest.mark.parametrize(("name", "proposals", "masks"), [("faster-rcnn", 30, 0), ("mask-rcnn", 120, 100)])
def test_a_two_stage_detector_is_counted_with_every_proposal(
    name: str, proposals: int, masks: int, make_detector: MakeDetector
) -> None:
    model = make_detector(name, proposals)
    behind = pyramid_flops() + rpn_flops() + box_head_flops(proposals) + mask_head_flops(masks)
    params = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.backbone.parameters())
    expected = {id_: cost + Cost(behind, params) for id_, cost in model.backbone.costs().items()}
    assert model_costs(model) == expected


def test_the_cost_of_a_detector_is_no_matter_of_weights(make_detector: MakeDetector) -> None:
    model = make_detector("mask-rcnn")
    before = model_costs(model, (48, 80))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    assert model_costs(model, (48, 80)) == before
    # Nothing of what stood in for the model's own methods is left.
    modules = (model.backbone, model.rpn_head, model.roi_head.bbox_roi_extractor, model.roi_head.mask_roi_extractor)
    assert not any({"forward", "predict_by_feat"} & vars(module).keys() for module in modules)


def test_the_cost_of_a_one_stage_detector_is_that_of_its_forward(
    make_detector: MakeDetector, make_images: Callable[..., Tensor]
) -> None:
    model = make_detector("rtmdet")
    costs = model_costs(model)
    for stitch in model.backbone.space.anchors:
        assert costs[stitch.id].flops == count_flops(Deployed(model, stitch.name), make_images(1, 64, 64))


class Attending(BaseModel):
    """A model whose head calls no module for the last projection of its attention; ``spare`` it never calls."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.attention = nn.MultiheadAttention(48, num_heads=4, batch_first=True)
        self.spare = nn.Linear(48, 3)

    def forward(self, images: Tensor, data_samples: Any = None, mode: str = "tensor") -> Tensor:
        tokens = self.backbone(images)[-1].flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0]


def test_a_module_used_without_a_call_is_counted(make_backbone: Callable[..., Any]) -> None:
    model = Attending(make_backbone())
    tokens, width = 4, 48
    # Queries, keys, values and the last projection; products of queries with keys and of weights with values.
    behind = Cost(tokens * 4 * width**2 + 2 * tokens**2 * width, 4 * width**2 + 4 * width)
    assert model_costs(model) == {id_: cost + behind for id_, cost in model.backbone.costs().items()}


def test_nothing_follows_a_classifying_backbone(make_backbone: Callable[..., Any]) -> None:
    class Classifier(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = make_backbone(num_classes=5)

        def forward(self, images: Tensor, data_samples: Any = None, mode: str = "tensor") -> Tensor:
            return self.backbone(images)

    model = Classifier()
    assert model_costs(model) == model.backbone.costs()
