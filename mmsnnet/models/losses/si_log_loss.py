from __future__ import annotations

import math

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmsnnet.registry import MODELS

# Of the squared mean: 1 - lambda, with lambda 0.85 as in BTS (arXiv 1907.10326) and AdaBins (arXiv 2011.14141).
MEAN_WEIGHT = 0.15


@MODELS.register_module()
class SILogLoss(nn.Module):
    """The scale-invariant log loss (Eigen et al., arXiv 1406.2283) in the form of BTS and AdaBins,

    ``loss_weight * sqrt(var(g) + 0.15 * mean(g) ** 2)`` with ``g = log(prediction) - log(target)``,

    over all measured pixels of the batch. ``var`` divides by their number. During warm-up only ``mean(g)`` counts,
    that is ``loss_weight * sqrt(0.15) * abs(mean(g))``: the scale is found first, the shape after it.

    The gradient is finite everywhere, and zero where the loss is. A batch without a measured pixel gives a loss and a
    gradient of zero. Nothing is read back from the device.

    Args:
        warm_up_iters: iterations of warm-up, counted by the runner, so that a resumed run goes on where it was. Outside
            of a training run, where nobody counts, there is no warm-up.
        loss_weight: a factor.
        loss_name: in the log; what begins with ``loss_`` is part of the sum that is trained.
    """

    def __init__(self, warm_up_iters: int = 0, loss_weight: float = 1.0, loss_name: str = "loss_silog") -> None:
        super().__init__()
        if warm_up_iters < 0:
            raise ValueError(f"SILogLoss: warm_up_iters is 0 or more, got {warm_up_iters}")
        self.warm_up_iters = warm_up_iters
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Depths of one shape to the loss, a scalar; predictions are positive, targets 0 where nothing was measured.

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"SILogLoss: prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        measured = target > 0
        count = measured.sum().clamp(min=1)
        # Masked by values rather than by indices: the number of measured pixels stays on the device.
        g = torch.where(measured, prediction.float(), 1.0).log() - torch.where(measured, target.float(), 1.0).log()
        mean = g.sum() / count
        terms = [math.sqrt(MEAN_WEIGHT) * mean]
        if not self._warming_up():
            deviation = torch.where(measured, g - mean, 0.0)
            terms.append(torch.linalg.vector_norm(deviation) / count.sqrt())
        # A norm, whose gradient at zero is zero, where that of a square root is infinite.
        return self.loss_weight * torch.linalg.vector_norm(torch.stack(terms))

    def _warming_up(self) -> bool:
        """Whether the training run that is on, if any, has not done ``warm_up_iters`` iterations yet."""
        hub = MessageHub.get_current_instance()
        return hub.get_info("loop_stage") == "train" and hub.get_info("iter") < self.warm_up_iters
