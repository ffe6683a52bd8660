"""The scale-invariant log loss: numbers worked out by hand, an independent formula, gradients, the warm-up."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmsnnet.models import SILogLoss
from mmsnnet.registry import MODELS

SetIteration = Callable[[int], None]
E = math.e


@pytest.fixture
def set_iteration() -> Iterator[SetIteration]:
    """``set_iteration(n)``: the loss finds itself in iteration ``n`` of a training run, the first being 0."""
    hub = MessageHub.get_instance("test_si_log_loss")
    yield lambda n: hub.update_info_dict(dict(loop_stage="train", iter=n))
    MessageHub._instance_dict.pop("test_si_log_loss")


def depths(shape: tuple[int, ...] = (2, 1, 6, 8), share: float = 0.7) -> tuple[Tensor, Tensor]:
    """Random predictions, and targets of which about ``share`` are measured."""
    prediction, target = 0.1 + 9 * torch.rand(shape), 0.1 + 9 * torch.rand(shape)
    return prediction, target * (torch.rand(shape) < share)


def formula(prediction: Tensor, target: Tensor) -> float:
    """Eigen's way to write it: sqrt(mean(g^2) - 0.85 mean(g)^2), over lists of the measured pixels."""
    pixels = [(p, t) for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True) if t > 0]
    g = np.array([math.log(p / t) for p, t in pixels])
    return math.sqrt((g**2).mean() - 0.85 * g.mean() ** 2)


@pytest.mark.parametrize(
    ("prediction", "target", "expected", "warming_up"),
    [
        ([E, E**3], [1.0, 1.0], math.sqrt(1.6), math.sqrt(0.6)),  # g = 1, 3: variance 1, mean 2
        ([E, E**3, 7.0], [1.0, 1.0, 0.0], math.sqrt(1.6), math.sqrt(0.6)),  # the third was not measured
        ([E, 1 / E], [1.0, 1.0], 1.0, 0.0),  # g = 1, -1: mean 0
        ([6.0, 3.0, 1.5], [2.0, 1.0, 0.5], math.sqrt(0.15) * math.log(3), math.sqrt(0.15) * math.log(3)),  # scale only
        ([2.0], [1.0], math.sqrt(0.15) * math.log(2), math.sqrt(0.15) * math.log(2)),
        ([1.0, 4.0], [1.0, 4.0], 0.0, 0.0),
        ([1.0, 4.0], [0.0, 0.0], 0.0, 0.0),
    ],
)
def test_values_worked_out_by_hand(
    prediction: list[float], target: list[float], expected: float, warming_up: float, set_iteration: SetIteration
) -> None:
    loss = SILogLoss(warm_up_iters=3)
    for iteration, value in ((0, warming_up), (2, warming_up), (3, expected), (1000, expected)):
        set_iteration(iteration)
        assert loss(torch.tensor(prediction), torch.tensor(target)).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.05])
def test_it_is_the_formula(share: float) -> None:
    for _ in range(5):
        prediction, target = depths(share=share)
        target[0, 0, 0, 0] = 1.0
        assert SILogLoss()(prediction, target).item() == pytest.approx(formula(prediction, target), rel=1e-5)
        assert SILogLoss(loss_weight=10.0)(prediction, target).item() == pytest.approx(
            10 * formula(prediction, target), rel=1e-5
        )


def test_pixels_of_the_whole_batch_count_alike() -> None:
    """Not image by image: the scale of one is held against that of the other."""
    prediction = torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    target = torch.tensor([[1.0, 1.0], [2.0, 0.0]])  # g = log 2, log 2, -log 2: mean 1/3 log 2, variance 8/9 log^2 2
    expected = math.log(2) * math.sqrt(8 / 9 + 0.15 / 9)
    assert SILogLoss()(prediction, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("warm_up_iters", [0, 100])
def test_the_gradient_is_that_of_the_formula(warm_up_iters: int, set_iteration: SetIteration) -> None:
    set_iteration(0)
    prediction, target = depths()
    SILogLoss(warm_up_iters)(prediction.requires_grad_(), target).backward()
    exact = prediction.detach().double().requires_grad_()
    g = (exact[target > 0] / target[target > 0]).log()
    (0.15 * g.mean() ** 2 + (0 if warm_up_iters else g.var(correction=0))).sqrt().backward()
    assert torch.allclose(prediction.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)
    assert not prediction.grad[target == 0].any() and prediction.grad[target > 0].all()


@pytest.mark.parametrize("warm_up_iters", [0, 100])
@pytest.mark.parametrize("target", [torch.zeros(2, 3), torch.full((2, 3), 4.0), torch.tensor([[4.0, 0, 0], [0, 0, 0]])])
def test_the_gradient_is_zero_where_the_loss_is(
    warm_up_iters: int, target: Tensor, set_iteration: SetIteration
) -> None:
    """Nothing measured, all right, one pixel and that right."""
    set_iteration(0)
    prediction = torch.full((2, 3), 4.0, requires_grad=True)
    loss = SILogLoss(warm_up_iters)(prediction, target)
    loss.backward()
    assert loss.item() == 0 and torch.equal(prediction.grad, torch.zeros(2, 3))


def test_the_gradient_stays_bounded_near_zero() -> None:
    prediction = (4.0 + 1e-6 * torch.randn(100)).requires_grad_()
    SILogLoss()(prediction, torch.full((100,), 4.0)).backward()
    assert prediction.grad.isfinite().all() and 0 < prediction.grad.norm() < 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_full(dtype: torch.dtype) -> None:
    prediction, target = (tensor.to(dtype) for tensor in depths((2, 1, 300, 400)))
    loss = SILogLoss()(prediction, target)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(formula(prediction, target), rel=1e-4)


def test_without_a_run_there_is_no_warm_up(set_iteration: SetIteration) -> None:
    prediction, target = depths()
    assert SILogLoss(warm_up_iters=100)(prediction, target).item() == pytest.approx(formula(prediction, target))


class Depth(BaseModel):
    """One weight that trains, and a record of the iterations that were warm-up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.silog = SILogLoss(warm_up_iters=5)
        self.warm_up: list[bool] = []

    def forward(self, inputs: Tensor, mode: str = "loss") -> dict[str, Tensor]:
        loss = self.silog(self.weight * inputs, torch.tensor([[1.0, 2.0]]))
        g = (self.weight * inputs / torch.tensor([[1.0, 2.0]])).log()
        self.warm_up.append(math.isclose(loss.item(), math.sqrt(0.15) * abs(g.mean().item()), rel_tol=1e-5))
        return dict(loss=loss)


@pytest.fixture
def no_traces() -> Iterator[None]:
    """Takes away the instances that a runner leaves behind as the current ones."""
    kept = {manager: list(manager._instance_dict) for manager in (DefaultScope, MessageHub, MMLogger, Visualizer)}
    yield
    for manager, names in kept.items():
        for name in set(manager._instance_dict) - set(names):
            manager._instance_dict.pop(name)


def test_the_warm_up_goes_on_in_a_resumed_run(tmp_path: Path, no_traces: None) -> None:
    """Of five iterations three are done before the break and two after it; afterwards there is none."""
    found = []
    for iterations, resume in ((3, False), (8, True)):
        model = Depth()
        Runner(
            model,
            str(tmp_path),
            train_dataloader=DataLoader([dict(inputs=torch.tensor([3.0, 4.0]))] * 8),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=1e-3)),
            default_hooks=dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=3)),
            resume=resume,
            experiment_name=f"silog_{iterations}",
            log_level="ERROR",
        ).train()
        found.append(model.warm_up)
        again = SILogLoss(warm_up_iters=5)(torch.tensor([E, E**3]), torch.tensor([1.0, 1.0]))
        assert again.item() == pytest.approx(math.sqrt(1.6))
    assert found == [[True] * 3, [True] * 2 + [False] * 3]


def test_it_is_named_in_the_log_and_registered() -> None:
    loss = MODELS.build(dict(type="mmsnnet.SILogLoss", loss_name="loss_depth"))
    assert type(loss) is SILogLoss and loss.loss_name == "loss_depth" and SILogLoss().loss_name == "loss_silog"


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"warm_up_iters must be at least 0, got -1"):
        SILogLoss(warm_up_iters=-1)
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\) and \(2, 4, 4\)"):
        SILogLoss()(torch.ones(2, 1, 4, 4), torch.ones(2, 4, 4))
