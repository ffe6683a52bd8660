"""What a stitch does not use costs a step nothing: no gradient is allocated for it, and no optimizer moves it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import Tensor

from mmsnnet.models import StitchedViT

Make = Callable[..., Any]

OPTIMIZERS = {
    "SGD": dict(type="SGD", lr=0.1, momentum=0.9, weight_decay=0.1),
    "AdamW": dict(type="AdamW", lr=1e-2, weight_decay=0.1),
    "fused AdamW": dict(type="AdamW", lr=1e-2, weight_decay=0.1, fused=True),
    "mmsnnet.Lamb": dict(type="mmsnnet.Lamb", lr=1e-2, weight_decay=0.1),
}


def build(backbone: StitchedViT, optimizer: dict[str, Any], **wrapper: Any) -> OptimWrapper:
    from mmengine.optim import build_optim_wrapper

    constructor = "mmsnnet.StitchOptimWrapperConstructor"
    config = dict(type="OptimWrapper", constructor=constructor, optimizer=dict(optimizer), **wrapper)
    return build_optim_wrapper(backbone, config)


def loss_of(backbone: StitchedViT, images: Tensor) -> Tensor:
    (found,) = backbone.train()(images)
    return found.square().mean()


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_leave_what_has_no_gradient(name: str, make_backbone: Make, make_images: Make) -> None:
    """Neither decay nor the momentum of former steps moves it, and no state is made before its first gradient."""
    backbone = make_backbone()
    wrapper = build(backbone, OPTIMIZERS[name], clip_grad=dict(max_norm=1.0))
    seen: set[int] = set()
    for _ in range(12):
        before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
        wrapper.update_params(loss_of(backbone, make_images()))
        used = {id(p) for p in backbone.trained_parameters(backbone.drawn)}
        seen |= used
        for key, parameter in backbone.named_parameters():
            if id(parameter) not in used:
                assert torch.equal(parameter, before[key]), key
        moved = {key for key, p in backbone.named_parameters() if not torch.equal(p, before[key])}
        assert moved
        assert all(p.grad is None for p in backbone.parameters())
        assert {id(p) for p, state in wrapper.optimizer.state.items() if state} == seen


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
    """Why no config asks for it: it takes it that all parameters get their first gradients in one step."""
    backbone = make_backbone(small=dict(depth=3), large=dict(depth=6))
    trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    wrapper = OptimWrapper(torch.optim.SGD(trained, lr=0.1, momentum=0.9, fused=True))
    with pytest.raises(TypeError, match="NoneType"):
        for _ in range(12):
            wrapper.update_params(loss_of(backbone, make_images()))
