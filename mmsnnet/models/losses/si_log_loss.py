from __future__ import annotations

import math

import torch
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmsnnet.registry import MODELS

# Weight of the squared mean: 1 - lambda, with lambda 0.85 as in BTS (arXiv 1907.10326) and AdaBins (arXiv 2011.14141).
MEAN_WEIGHT = 0.15


@MODELS.register_module()
class SILogLoss(nn.Module):
    """The scale-invariant log loss (Eigen et al., arXiv 1406.2283) in the form of BTS and AdaBins,

    ``loss_weight * sqrt(var(g) + 0.15 * mean(g) ** 2)`` with ``g = log(prediction) - log(target)``,

    over all measured pixels of the batch. ``var`` divides by their number. During warm-up the loss is
    ``loss_weight * sqrt(0.15) * abs(mean(g))``, so the model learns the scale before the shape.

    The gradient is finite everywhere, and zero where the loss is. A batch without a measured pixel gives a loss and a
    gradient of zero. The computation does not wait for the device.

    Args:
        warm_up_iters: iterations of warm-up. The runner counts them, so a resumed run continues its warm-up. Outside a
            training run there is none.
        loss_weight: a factor.
        loss_name: name in the log; mmseg trains the sum of the losses whose names start with ``loss_``.
    """

    def __init__(self, warm_up_iters: int = 0, loss_weight: float = 1.0, loss_name: str = "loss_silog") -> None:
        super().__init__()
        if warm_up_iters < 0:
            raise ValueError(f"SILogLoss: warm_up_iters must be at least 0, got {warm_up_iters}")
        self.warm_up_iters = warm_up_iters
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The loss, a scalar, of positive predictions and targets of the same shape; 0 marks unmeasured targets.

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"SILogLoss: prediction and target differ in shape: {tuple(prediction.shape)} and {tuple(target.shape)}"
            )
        measured = target > 0
        count = measured.sum().clamp(min=1)
        # Masked by values, not by indices, so that the number of measured pixels stays on the device.
        g = torch.where(measured, prediction.float(), 1.0).log() - torch.where(measured, target.float(), 1.0).log()
        mean = g.sum() / count
        terms = [math.sqrt(MEAN_WEIGHT) * mean]
        if not self._warming_up():
            deviation = torch.where(measured, g - mean, 0.0)
            terms.append(torch.linalg.vector_norm(deviation) / count.sqrt())
        # A norm has a gradient of zero at zero, a square root an infinite one.
        return self.loss_weight * torch.linalg.vector_norm(torch.stack(terms))

    def _warming_up(self) -> bool:
        """Whether a training run is in its first ``warm_up_iters`` iterations."""
        hub = MessageHub.get_current_instance()
        return hub.get_info("loop_stage") == "train" and hub.get_info("iter") < self.warm_up_iters
