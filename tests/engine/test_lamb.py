"""LAMB from a config: one step against the paper's rule, written out."""

import math

import pytest
import torch
from mmengine.registry import OPTIMIZERS

from mmsnnet.engine.optimizers import Lamb


@pytest.mark.parametrize("weight_decay", [0.02, 0.0])
def test_a_step_against_the_rule_written_out(weight_decay: float) -> None:
    weight, gradient = [3.0, -4.0], [0.3, 0.0]
    parameter = torch.nn.Parameter(torch.tensor(weight))
    config = dict(type="mmsnnet.Lamb", params=[parameter], lr=1e-2, weight_decay=weight_decay)
    optimizer = OPTIMIZERS.build(config)
    assert isinstance(optimizer, Lamb)
    parameter.grad = torch.tensor(gradient)
    optimizer.step()
    # In the first step both means, corrected for their start, are the gradient's own: a step of its sign and the decay,
    # times the ratio of the norms of weight and step (only where there is decay).
    step = [g / (abs(g) + 1e-6) + weight_decay * w for g, w in zip(gradient, weight, strict=True)]
    ratio = 5.0 / math.hypot(*step) if weight_decay else 1.0
    expected = [w - 1e-2 * ratio * s for w, s in zip(weight, step, strict=True)]
    assert parameter.tolist() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_clipped_to_a_norm_of_one_over_all_parameters() -> None:
    """As in the published runs' LAMB: what is above is scaled down before the means are taken."""
    moments = []
    for scale in (1.0, 100.0):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
        optimizer = Lamb(parameters, lr=1e-2)
        for parameter in parameters:
            parameter.grad = torch.full((2,), 0.5 * scale)
        optimizer.step()
        moments.append([optimizer.state[parameter]["exp_avg"].tolist() for parameter in parameters])
    assert moments[0] == moments[1] == [pytest.approx([0.05, 0.05])] * 2
