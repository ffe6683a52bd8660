"""The budgets of the slider."""

from dataclasses import replace

import pytest

from mmsnnet.demo.budget import BudgetScale, scales
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, pareto_front


def points(*costs: float, latency: bool = False) -> OperatingPoints:
    """Points of these GFLOPs; quality rises with the cost."""
    made = [
        OperatingPoint(i, f"s{i}", "S", round(cost * 1e9), 1, {"mIoU": 10.0 + i}, 2 * cost if latency else None)
        for i, cost in enumerate(costs)
    ]
    return OperatingPoints(None, None, None, (64, 64), None, tuple(made))


@pytest.mark.parametrize("costs", [(0.00856, 0.0361, 0.1438), (12.3, 61.6, 310.77), (4.0, 4.004), (7.7,)])
def test_the_ends_of_the_slider_choose_the_ends_of_the_front(costs: tuple[float, ...]) -> None:
    run = points(*costs)
    (scale,) = scales(run, "mIoU").values()
    front = pareto_front(run, "flops", "mIoU")
    assert (scale.best(scale.minimum), scale.best(scale.maximum)) == (front[0], front[-1])
    assert scale.unit == ("GFLOPs" if costs[-1] >= 1 else "MFLOPs")
    assert scale.minimum < scale.maximum and len(f"{scale.minimum:g}") < 8
    steps = (scale.maximum - scale.minimum) / scale.step
    assert steps == pytest.approx(round(steps)) and 1 <= round(steps) <= 700


def test_every_stitch_of_the_front_has_a_budget() -> None:
    scale = BudgetScale.of(points(*(1 + i / 7 for i in range(30))), "mIoU", "flops")
    steps = round((scale.maximum - scale.minimum) / scale.step)
    assert {scale.best(scale.minimum + i * scale.step).id for i in range(steps + 1)} == set(range(30))


def test_measured_times_are_a_second_scale() -> None:
    timed = points(1, 2, 4, latency=True)
    assert list(scales(timed, "mIoU")) == ["GFLOPs", "ms"]
    assert scales(timed, "mIoU")["ms"].best(4.1).id == 1
    first, *rest = timed
    assert list(scales(replace(timed, points=(replace(first, latency_ms=None), *rest)), "mIoU")) == ["GFLOPs"]


def test_a_budget_below_the_cheapest_stitch_is_an_error() -> None:
    scale = BudgetScale.of(points(1, 2), "mIoU", "flops")
    with pytest.raises(ValueError, match="below the cheapest stitch"):
        scale.best(0.5)
    with pytest.raises(TypeError, match="expected a number"):
        scale.best("a lot")  # type: ignore[arg-type]
