"""Optimizer state is compared with the optimizer that is to take it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm.optim
import torch
from mmengine.optim import LinearMomentum, OptimWrapper
from torch import nn, optim

from mmsnnet.engine.resuming.difference import Verdict
from mmsnnet.engine.resuming.optimizers import LIKE_PARAMETER, compare_optimizers, lay_out_states

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.1),
    "AdamW fused": lambda parameters: optim.AdamW(parameters, lr=0.1, fused=True),
    "Adam amsgrad": lambda parameters: optim.Adam(parameters, lr=0.1, amsgrad=True),
    "NAdam": lambda parameters: optim.NAdam(parameters, lr=0.1),
    "RAdam": lambda parameters: optim.RAdam(parameters, lr=0.1),
    "Adamax": lambda parameters: optim.Adamax(parameters, lr=0.1),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.1),
    "Adadelta": lambda parameters: optim.Adadelta(parameters, lr=0.1),
    "RMSprop": lambda parameters: optim.RMSprop(parameters, lr=0.1, centered=True, momentum=0.9),
    "Rprop": lambda parameters: optim.Rprop(parameters, lr=0.1),
    "ASGD": lambda parameters: optim.ASGD(parameters, lr=0.1),
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adafactor": lambda parameters: optim.Adafactor(parameters, lr=0.1),
    "timm's Adafactor": lambda parameters: timm.optim.Adafactor(parameters, lr=0.1),
    "timm's Lamb": lambda parameters: timm.optim.Lamb(parameters, lr=0.1),
    "timm's Lion": lambda parameters: timm.optim.Lion(parameters, lr=0.1),
}
KEEP_OTHER_SHAPES = ("Adafactor", "timm's Adafactor")


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 200), nn.LayerNorm(200), nn.Linear(200, 3))


def trained(model: nn.Module, make: Callable[[Any], optim.Optimizer]) -> dict[str, Any]:
    """The state of an optimizer after two steps; the last layer has not been used."""
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    for _ in range(2):
        model[:2](torch.randn(2, 40)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict()


def compare(model: nn.Module, optimizer: optim.Optimizer, state: dict[str, Any], **types: str) -> list[Any]:
    return list(compare_optimizers(model, OptimWrapper(optimizer), state, types))


@pytest.mark.parametrize("expanded", [True, False])
def test_a_state_that_lies_otherwise_in_memory_is_laid_out_as_its_parameter(expanded: bool) -> None:
    """A fused kernel walks both in the order of memory: of one element for all it would read beyond the end."""
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.LazyLinear(2))
    make, images = OPTIMIZERS["AdamW fused"], torch.randn(2, 3, 4, 4)
    model(images)
    state, weight = trained_on(model, make, images), model[0].weight
    other = copy.deepcopy(state)
    moment = other["state"][0]["exp_avg"]
    if expanded:
        other["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] = torch.ones(1).expand(moment.shape)
        state["state"][0]["exp_avg"] = torch.ones(moment.shape)
    else:
        other["state"][0]["exp_avg"] = moment.contiguous(memory_format=torch.channels_last)
    assert other["state"][0]["exp_avg"].stride() != weight.stride()
    assert compare(model, make(model.parameters()), other) == []
    results = []
    for loaded in (state, other):
        copied = copy.deepcopy(model)
        optimizer = make(copied.parameters())
        lay_out_states(optimizer, loaded)
        optimizer.load_state_dict(loaded)
        copied(images).square().sum().backward()
        optimizer.step()
        results.append(copied[0].weight)
    assert torch.equal(*results)


def trained_on(model: nn.Module, make: Callable[[Any], optim.Optimizer], images: torch.Tensor) -> dict[str, Any]:
    model = copy.deepcopy(model)
    optimizer = make(model.parameters())
    model(images).square().sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def damage(state: dict[str, Any], what: str) -> None:
    entries, groups = state["state"], state["param_groups"]
    if what == "no state":
        entries.clear()
    elif what == "a moment is missing":
        del entries[0]["exp_avg"]
    elif what == "a moment is None":
        entries[0]["exp_avg"] = None
    elif what == "a moment is sparse":
        entries[0]["exp_avg"] = entries[0]["exp_avg"].to_sparse()
    elif what == "an entry is a list":
        entries[0] = [1, 2]
    elif what == "no lr":
        del groups[0]["lr"]
    elif what == "a parameter twice":
        groups[0]["params"][1] = groups[0]["params"][0]


@pytest.mark.parametrize(
    "what",
    [
        *("no state", "a moment is missing", "a moment is None", "a moment is sparse", "an entry is a list"),
        *("no lr", "a parameter twice"),
    ],
)
def test_a_damaged_state_is_refused(what: str, model: nn.Module) -> None:
    make = OPTIMIZERS["AdamW fused"]
    state = trained(model, make)
    damage(state, what)
    wrapper = OptimWrapper(make(model.parameters()))
    differences = list(compare_optimizers(model, wrapper, state, {}, iterations=2))
    assert [difference.verdict for difference in differences] == [Verdict.REFUSED]
    assert list(compare_optimizers(model, wrapper, trained(model, make), {}, iterations=2)) == []


@pytest.mark.parametrize("how", ["sparse", "one element", "transposed"])
def test_a_moment_that_a_fused_kernel_would_misread_is_refused(how: str, model: nn.Module) -> None:
    make = OPTIMIZERS["AdamW fused"]
    state = trained(model, make)
    moments = state["state"][0]
    moment = moments["exp_avg"]
    moments["exp_avg"] = {"sparse": moment.to_sparse(), "one element": torch.zeros(1), "transposed": moment.T}[how]
    (found,) = compare(model, make(model.parameters()), state)
    assert found.verdict is Verdict.REFUSED and "exp_avg (" in found.text and "0.weight (200, 40)" in found.text


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_of_an_optimizer_fits_itself(name: str, model: nn.Module) -> None:
    make = OPTIMIZERS[name]
    state = trained(model, make)
    assert compare(model, make(model.parameters()), state, optim_wrapper=type(make(model.parameters())).__name__) == []
    assert compare(model, make(model.parameters()), state) == []
    shapes = {tuple(value.shape) for value in state["state"][0].values() if isinstance(value, torch.Tensor)}
    assert (shapes - {(), (1,), (200, 40)} != set()) == (name in KEEP_OTHER_SHAPES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_state_of_another_shape_fits(name: str, model: nn.Module) -> None:
    make = OPTIMIZERS[name]
    for key in (0, 2):  # a matrix and a vector
        for moment, value in trained(model, make)["state"][key].items():
            if not isinstance(value, torch.Tensor) or value.numel() == 1 or moment not in LIKE_PARAMETER:
                continue  # no fused kernel reads factored moments
            state = trained(model, make)
            state["state"][key][moment] = torch.zeros(*value.shape[:-1], value.shape[-1] - 1)
            (found,) = compare(model, make(model.parameters()), state)
            assert found.verdict is Verdict.REFUSED and f"{moment} " in found.text


def test_another_optimizer_is_known_by_its_hyperparameters(model: nn.Module) -> None:
    """Of checkpoints that record no type."""
    for name, other in (("SGD", "AdamW"), ("AdamW", "SGD"), ("timm's Lamb", "AdamW"), ("AdamW", "RMSprop")):
        (found,) = compare(model, OPTIMIZERS[other](model.parameters()), trained(model, OPTIMIZERS[name]))
        assert found.verdict is Verdict.REFUSED and "another one than the config's" in found.text


def test_hyperparameters_that_a_later_version_adds_make_no_other_optimizer(model: nn.Module) -> None:
    state = trained(model, OPTIMIZERS["AdamW"])
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    assert compare(model, OPTIMIZERS["AdamW"](model.parameters()), state) == []


def grouped(model: nn.Module, *rates: float, part: str = "layer") -> optim.Optimizer:
    groups = [
        dict(params=list(layer.parameters()), lr=rate, part=f"{part} {index}")
        for index, (layer, rate) in enumerate(zip(model, rates, strict=True))
    ]
    return optim.AdamW(groups)


def test_a_hyperparameter_that_differs_in_several_groups_is_one_line(model: nn.Module) -> None:
    state = grouped(model, 0.1, 0.2, 0.3).state_dict()
    (found,) = compare(model, grouped(model, 0.1, 0.02, 0.03, part="other"), state)
    assert found.verdict is Verdict.KEPT
    assert found.text == (
        "optim_wrapper.optimizer.lr in 2 of 3 groups of parameters, the first of them group 1 (other 1): the "
        "checkpoint's 0.2 is kept, the config's 0.02 is not"
    )


def test_groups_of_other_sizes_are_refused(model: nn.Module) -> None:
    state = grouped(model, 0.1, 0.1, 0.1).state_dict()
    other = nn.Sequential(model[0], model[1], nn.Linear(200, 3, bias=False))
    (found,) = compare(other, grouped(other, 0.1, 0.1, 0.1), state)
    assert found.verdict is Verdict.REFUSED
    assert "group 2 (layer 2) has 2 parameters in the checkpoint and 1 by the config" in found.text


def test_what_a_schedule_has_changed_is_no_difference(model: nn.Module) -> None:
    """mmengine's momentum schedulers change Adam's ``betas`` in place."""
    wrapper = OptimWrapper(OPTIMIZERS["AdamW"](model.parameters()))
    schedule = LinearMomentum(wrapper, start_factor=0.5, end=5)
    wrapper.optimizer.step()
    schedule.step()
    state = wrapper.state_dict()
    assert state["param_groups"][0]["betas"][0] < 0.9
    own = OptimWrapper(OPTIMIZERS["AdamW"](model.parameters()))
    LinearMomentum(own, start_factor=0.5, end=5)
    assert list(compare_optimizers(model, own, state, {})) == []
    own = OptimWrapper(optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.999)))
    LinearMomentum(own, start_factor=0.5, end=5)
    (found,) = compare_optimizers(model, own, state, {})
    assert "momentum: the checkpoint's 0.9 is kept, the config's 0.8 is not" in found.text


def test_mixed_precision_is_said(model: nn.Module) -> None:
    state = trained(model, OPTIMIZERS["AdamW"]) | dict(loss_scaler=dict(scale=1024.0))
    (found,) = compare(model, OPTIMIZERS["AdamW"](model.parameters()), state)
    assert found.verdict is Verdict.REPLACED and "config's full precision, the checkpoint's was mixed" in found.text
