"""Schedules are compared by the constants of their state."""

import copy
from typing import Any

import pytest
import torch
from mmengine.optim import scheduler as schedulers
from torch import nn, optim

from mmsnnet.engine.resuming.difference import Verdict
from mmsnnet.engine.resuming.schedules import compare_schedules

SCHEDULES: dict[str, dict[str, Any]] = {
    "LinearLR": dict(start_factor=0.1, end=5),
    "ConstantLR": dict(factor=0.5, end=5),
    "PolyLR": dict(eta_min=0.01, power=0.9, end=10),
    "CosineAnnealingLR": dict(T_max=8, eta_min=0.01),
    "MultiStepLR": dict(milestones=[2, 4], gamma=0.5),
    "StepLR": dict(step_size=2, gamma=0.5),
    "ExponentialLR": dict(gamma=0.9),
    "OneCycleLR": dict(eta_max=0.3, total_steps=10),
    "CosineRestartLR": dict(periods=[4, 6], restart_weights=[1.0, 0.5], eta_min=0.01),
    "ReduceOnPlateauLR": dict(monitor="loss", patience=0, factor=0.5),
    "LinearMomentum": dict(start_factor=0.1, end=5),
}
# A change to each, and the constants that are said to be kept.
CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "LinearLR": (dict(end=8), ["end: the checkpoint's 5 is kept, the config's 8 is not"]),
    "ConstantLR": (dict(factor=0.25), ["factor: the checkpoint's 0.5 is kept, the config's 0.25 is not"]),
    "PolyLR": (
        dict(end=20, power=2.0),
        [
            "power: the checkpoint's 0.9 is kept, the config's 2.0 is not",
            "end: the checkpoint's 10 is kept, the config's 20 is not",
        ],
    ),
    "CosineAnnealingLR": (dict(T_max=16), ["T_max: the checkpoint's 8 is kept, the config's 16 is not"]),
    "MultiStepLR": (
        dict(milestones=[2, 6]),
        ["milestones: the checkpoint's [2, 4] is kept, the config's [2, 6] is not"],
    ),
    "StepLR": (dict(step_size=3), ["step_size: the checkpoint's 2 is kept, the config's 3 is not"]),
    "ExponentialLR": (dict(begin=1), ["begin: the checkpoint's 0 is kept, the config's 1 is not"]),
    "OneCycleLR": (dict(eta_max=0.6), ["eta_max: the checkpoint's 0.3 is kept, the config's 0.6 is not"]),
    "CosineRestartLR": (
        dict(periods=[4, 7]),
        ["periods: the checkpoint's [4, 6] is kept, the config's [4, 7] is not"],
    ),
    "ReduceOnPlateauLR": (dict(patience=3), ["patience: the checkpoint's 0 is kept, the config's 3 is not"]),
    "LinearMomentum": (
        dict(start_factor=0.2),
        ["start_factor: the checkpoint's 0.1 is kept, the config's 0.2 is not"],
    ),
}


def make(kind: str, **changes: Any) -> Any:
    optimizer = optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    return getattr(schedulers, kind)(optimizer, **SCHEDULES[kind] | changes)


def stepped(kind: str) -> dict[str, Any]:
    """The state of a schedule after three steps."""
    schedule = make(kind)
    for loss in (1.0, 2.0, 3.0):
        schedule.optimizer.step()
        schedule.step(*([dict(loss=loss)] if kind.startswith("Reduce") else []))
    return copy.deepcopy(schedule.state_dict())


@pytest.mark.parametrize("kind", SCHEDULES)
def test_how_far_a_schedule_is_makes_no_difference(kind: str) -> None:
    assert list(compare_schedules([make(kind)], [stepped(kind)], {"param_scheduler": [kind]})) == []
    assert list(compare_schedules([make(kind)], [stepped(kind)], {})) == []


@pytest.mark.parametrize("kind", SCHEDULES)
def test_what_differs_is_one_line_a_constant(kind: str) -> None:
    changes, said = CHANGES[kind]
    found = list(compare_schedules([make(kind, **changes)], [stepped(kind)], {}))
    assert [difference.text for difference in found] == [f"param_scheduler[0].{text}" for text in said]
    assert {difference.verdict for difference in found} == {Verdict.KEPT}


def test_schedules_of_several_optimizers_are_paired_by_name() -> None:
    own = dict(body=[make("PolyLR")], head=[make("StepLR")])
    states = dict(head=[stepped("StepLR")], body=[stepped("PolyLR")])
    assert list(compare_schedules(own, states, {})) == []
    own["head"] = [make("StepLR", gamma=0.1)]
    (found,) = compare_schedules(own, states, {})
    assert found.text == "param_scheduler.head[0].gamma: the checkpoint's 0.5 is kept, the config's 0.1 is not"
    (found,) = compare_schedules(dict(body=own["body"]), states, {})
    assert found.verdict is Verdict.REFUSED and found.text.startswith(
        "param_scheduler.head: the checkpoint has 1 schedule"
    )


def test_a_schedule_of_another_parameter_is_another_one() -> None:
    (found,) = compare_schedules([make("LinearMomentum")], [stepped("LinearLR")], {})
    assert found.verdict is Verdict.REFUSED


def test_no_schedule_on_either_side() -> None:
    for own in (None, []):
        for states in (None, []):
            assert list(compare_schedules(own, states, {})) == []


def test_epochs_and_iterations_are_different_units() -> None:
    (found,) = compare_schedules([make("StepLR", by_epoch=False)], [stepped("StepLR")], {})
    assert found.text == "param_scheduler[0].by_epoch: the checkpoint's True is kept, the config's False is not"


def test_a_tensor_of_the_state_is_no_difference() -> None:
    """A metric may be one."""
    state = stepped("ReduceOnPlateauLR") | dict(best=torch.tensor(3.0))
    assert list(compare_schedules([make("ReduceOnPlateauLR")], [state], {})) == []


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        (
            "CosineRestartLR",
            dict(periods=[3, 4], restart_weights=[1, 1], eta_min=0.0),
            dict(periods=[3, 4, 5], restart_weights=[1] * 3, eta_min=0.0),
        ),
        ("CosineAnnealingLR", dict(T_max=5, eta_min_ratio=0.1), dict(T_max=5, eta_min=0.01)),
        ("CosineAnnealingLR", dict(T_max=5, eta_min=0.01), dict(T_max=5, eta_min_ratio=0.1)),
    ],
)
def test_constants_of_another_form_are_kept(kind: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    def build(settings: dict[str, Any]) -> Any:
        return getattr(schedulers, kind)(optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), **settings)

    found = list(compare_schedules([build(after)], [build(before).state_dict()], {}))
    assert found and {difference.verdict for difference in found} == {Verdict.KEPT}
