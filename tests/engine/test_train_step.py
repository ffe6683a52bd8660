"""A step of several stitches: the gradients of separate passes, from blocks that run once."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmsnnet.engine.runner.train_step import several_stitches
from mmsnnet.models import StitchedClassifier, find_stitched_backbone
from mmsnnet.stitching.prefix import PrefixPlan

RESNET = dict(model="resnet18", layers=(1, 1, 2, 1))
STAGED = [dict(RESNET, channels=(8, 8, 16, 16)), dict(RESNET, layers=(2, 2, 4, 2), channels=(8, 16, 24, 32))]


def samples(number: int = 4) -> list[BaseDataElement]:
    return [BaseDataElement(gt_label=index % 4) for index in range(number)]


def gradients(model: nn.Module, losses: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss, _ = model.parse_losses(losses)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["plain", "with_cp", "mixing", "hierarchical"])
def classifier(
    request: pytest.FixtureRequest, backbone_config: Callable[..., dict[str, Any]], randomise: Callable[..., None]
) -> StitchedClassifier:
    config = backbone_config(with_cp=request.param == "with_cp")
    if request.param == "hierarchical":
        config = config | dict(anchors=STAGED)
    mixing = dict(cutmix_alpha=1.0) if request.param == "mixing" else None
    model = StitchedClassifier(config, num_classes=4, mixing=mixing)
    randomise(model.backbone.network.layers)
    for layer in model.backbone.network.layers.values():
        layer.initialized = True
    return model.double().train()


def separate(model: StitchedClassifier, images: Tensor, k: int) -> tuple[dict[str, Tensor], Tensor]:
    """The sum of the gradients of one pass for each stitch, and the mean of their losses."""
    total: dict[str, Tensor] = {}
    losses = []
    for _ in range(k):
        loss = model(images.clone(), samples(), mode="loss")
        losses.append(loss["loss"].detach())
        for name, gradient in gradients(model, loss).items():
            total[name] = total.get(name, 0) + gradient
    return total, torch.stack(losses).mean()


@pytest.mark.parametrize("k", [2, 4])
def test_the_gradients_are_those_of_separate_passes(
    k: int, classifier: StitchedClassifier, make_images: Callable[..., Tensor]
) -> None:
    images = make_images(4).double()
    classifier.backbone.stitches_per_step = k
    apart, together = classifier, copy.deepcopy(classifier)
    for first in (0, k):
        expected, mean = separate(apart, images, k)
        with several_stitches(together):
            losses = together(images.clone(), samples(), mode="loss")
            found = gradients(together, losses)
            _, logs = together.parse_losses(losses)
        assert together.backbone.draws == apart.backbone.draws == first + k
        assert found.keys() == expected.keys()
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(logs["loss"], mean)


def test_each_block_of_the_tree_runs_once(
    backbone_config: Callable[..., dict[str, Any]], make_images: Callable[..., Tensor]
) -> None:
    model = StitchedClassifier(backbone_config(), num_classes=4).train()
    backbone = model.backbone
    for layer in backbone.network.layers.values():
        layer.initialized = True
    backbone.stitches_per_step = 6
    stitches = [backbone.space[backbone.sampler().draw(number)] for number in range(6)]
    calls: list[int] = []
    for anchor in backbone.network.anchors:
        for block in anchor.blocks:
            anchor.block(block).register_forward_hook(lambda *_: calls.append(1))
    with several_stitches(model):
        model(make_images(2), samples(2), mode="loss")
    tree = {route[: k + 1] for route in map(_route, stitches) for k in range(len(route))}
    assert len(calls) == len(tree) == len(PrefixPlan(backbone.space, stitches, None))
    assert len(tree) < sum(len(_route(stitch)) for stitch in set(stitches))


def _route(stitch: Any) -> tuple[tuple[int, int], ...]:
    return tuple((s.anchor, block) for s in stitch.segments for block in range(s.start, s.stop))


def test_statistics_of_shared_blocks_count_one_batch(make_images: Callable[..., Tensor]) -> None:
    """A step of the same stitch twice updates them once."""
    model = StitchedClassifier(dict(type="mmsnnet.StitchedViT", anchors=STAGED[:1], img_size=32), num_classes=4).train()
    model.backbone.stitches_per_step = 2
    with several_stitches(model):
        model(make_images(2), samples(2), mode="loss")
    counts = {
        int(module.num_batches_tracked)
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    assert counts == {1}


def test_a_step_starts_with_the_costliest_stitch_after_a_resume_with_another_number(
    backbone_config: Callable[..., dict[str, Any]], make_images: Callable[..., Tensor]
) -> None:
    model = StitchedClassifier(backbone_config(), num_classes=4).train()
    backbone = find_stitched_backbone(model)
    for layer in backbone.network.layers.values():
        layer.initialized = True
    backbone.draws, backbone.stitches_per_step = 7, 3
    drawn = []
    backbone.register_forward_hook(lambda *_: drawn.append(backbone.drawn.name))
    with several_stitches(model):
        model(make_images(2), samples(2), mode="loss")
    assert drawn[:2] == ["L", "S"] and backbone.draws == 12


def test_images_that_change_between_passes_are_an_error(
    backbone_config: Callable[..., dict[str, Any]], make_images: Callable[..., Tensor]
) -> None:
    class Noisy(StitchedClassifier):
        def loss(self, inputs: Tensor, data_samples: Any) -> Mapping[str, Tensor]:
            return super().loss(inputs + torch.rand_like(inputs), data_samples)

    model = Noisy(backbone_config(), num_classes=4).train()
    for layer in model.backbone.network.layers.values():
        layer.initialized = True
    model.backbone.stitches_per_step = 2
    with several_stitches(model), pytest.raises(RuntimeError, match="stitches_per_step=1"):
        model(make_images(2), samples(2), mode="loss")
    assert model.forward.__func__ is StitchedClassifier.forward
