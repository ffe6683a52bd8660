"""What a stitch does not use costs a step nothing: no gradient is allocated for it, and no optimizer moves it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmsnnet.models import StitchedBackbone

Make = Callable[..., Any]

OPTIMIZERS = {
    "SGD": dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.1),
    "fused SGD": dict(type="SGD", lr=0.1, weight_decay=0.1, fused=True),
    "AdamW": dict(type="AdamW", lr=1e-2, weight_decay=0.1),
    "fused AdamW": dict(type="AdamW", lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW, one by one": dict(type="AdamW", lr=1e-2, weight_decay=0.1, foreach=False),
    "mmsnnet.Lamb": dict(type="mmsnnet.Lamb", lr=1e-2, weight_decay=0.1),
}


def build(backbone: StitchedBackbone, optimizer: dict[str, Any], **wrapper: Any) -> OptimWrapper:
    from mmengine.optim import build_optim_wrapper

    constructor = "mmsnnet.StitchOptimWrapperConstructor"
    config = dict(type="OptimWrapper", constructor=constructor, optimizer=dict(optimizer), **wrapper)
    return build_optim_wrapper(backbone, config)


def loss_of(backbone: StitchedBackbone, images: Tensor) -> Tensor:
    (found,) = backbone.train()(images)
    return found.square().mean()


@pytest.mark.slow
@pytest.mark.parametrize("with_cp", [False, True], ids=["", "with_cp"])
def test_gradients_are_of_what_the_stitch_uses_alone(with_cp: bool, make_backbone: Make, make_images: Make) -> None:
    backbone = make_backbone(with_cp=with_cp)
    size = sum(p.nbytes for p in backbone.parameters() if p.requires_grad)
    held = {}
    for _ in range(12):
        backbone.zero_grad()
        loss_of(backbone, make_images()).backward()
        used = backbone.trained_parameters(backbone.drawn)
        assert {id(p) for p in backbone.parameters() if p.grad is not None} == set(map(id, used))
        held[backbone.drawn.kind] = sum(p.grad.nbytes for p in backbone.parameters() if p.grad is not None)
    assert held["S"] < held["SL"] < size and held["S"] < 0.3 * size


@pytest.mark.slow
@pytest.mark.parametrize("stitches", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_leave_what_has_no_gradient(
    name: str, stitches: int, make_backbone: Make, make_images: Make
) -> None:
    """Neither decay nor the momentum of former steps moves it, its state stays, and none is made before its first
    gradient; with one stitch in a step, or two that add up."""
    backbone = make_backbone()
    wrapper = build(backbone, OPTIMIZERS[name], clip_grad=dict(max_norm=1.0), accumulative_counts=stitches)
    states = wrapper.optimizer.state
    images = make_images()
    ever: set[nn.Parameter] = set()
    rested = 0
    for _ in range(8):
        before = copy.deepcopy([(p.detach(), states.get(p)) for p in backbone.parameters()])
        used: set[nn.Parameter] = set()
        for _ in range(stitches):
            wrapper.update_params(loss_of(backbone, images))
            used.update(backbone.trained_parameters(backbone.drawn))
        for parameter, (weight, state) in zip(backbone.parameters(), before, strict=True):
            assert parameter.grad is None
            assert torch.equal(parameter, weight) == (parameter not in used)
            if parameter not in used:
                torch.testing.assert_close(states.get(parameter), state, rtol=0, atol=0)
        rested += len(ever - used)
        ever |= used
        assert {parameter for parameter, state in states.items() if state} <= ever
    assert rested > 0


def test_fused_adamw_is_adamw(make_backbone: Make, make_images: Make) -> None:
    """To rounding, with gradients that are clipped and some that are missing; its state goes into the plain one."""
    one = make_backbone().double()  # a gradient near zero would make a step of any sign
    other = copy.deepcopy(one)
    plain, fused = (build(b, OPTIMIZERS[name]) for b, name in ((one, "AdamW"), (other, "fused AdamW")))
    images = make_images().double()
    for _ in range(8):
        plain.update_params(loss_of(one, images))
        fused.update_params(loss_of(other, images))
    for expected, found in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected)
    for source, target in ((plain, fused), (fused, plain)):
        # mmengine keeps the settings of groups, fused among them, with the state.
        target.load_state_dict(copy.deepcopy(source.state_dict()))
        target.update_params(loss_of(other if target is fused else one, images))


def test_fused_sgd_with_momentum_fails_in_torch(make_backbone: Make, make_images: Make) -> None:
    """Why StitchOptimWrapperConstructor refuses it: all parameters have to get their first gradients in one step."""
    backbone = make_backbone(small=dict(depth=3), large=dict(depth=6))
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(trained, lr=0.1, momentum=0.9, fused=True))
    with pytest.raises(TypeError, match="NoneType"):
        for _ in range(12):
            wrapper.update_params(loss_of(backbone, make_images()))
