from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from mmsnnet.errors import SettingError
from mmsnnet.registry import METRICS


@METRICS.register_module()
class Accuracy(BaseMetric):
    """``top<k>``: the percentage of images whose label is among the ``k`` classes of the highest logits.

    Each image counts once, with any number of ranks.

    Args:
        topk: one ``k`` or several.
        collect_device, prefix: as of mmengine's ``BaseMetric``.

    Raises:
        SettingError: a ``k`` is below 1, or there is none.
    """

    default_prefix = ""

    def __init__(
        self, topk: int | Sequence[int] = (1, 5), collect_device: str = "cpu", prefix: str | None = None
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise SettingError(f"topk needs at least one k, each at least 1; got {topk}")

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Record for each sample whether its ``gt_label`` is among the ``k`` highest ``logits`` (K,), for each ``k``.

        Raises:
            SettingError: a ``k`` exceeds the number of classes.
        """
        logits = torch.stack([sample["logits"] for sample in data_samples])
        if max(self.topk) > logits.shape[1]:
            raise SettingError(
                f"top-{max(self.topk)} accuracy needs at least {max(self.topk)} classes, and the model has "
                f"{logits.shape[1]}: set topk of val_evaluator and test_evaluator"
            )
        labels = torch.tensor([int(sample["gt_label"]) for sample in data_samples])
        hits = logits.topk(max(self.topk), dim=1).indices.cpu() == labels[:, None]
        self.results += torch.stack([hits[:, :k].any(dim=1) for k in self.topk], dim=1).tolist()

    def compute_metrics(self, results: list[list[bool]]) -> dict[str, float]:
        correct = torch.tensor(results, dtype=torch.float64).mean(dim=0)
        return {f"top{k}": 100 * share for k, share in zip(self.topk, correct.tolist(), strict=True)}
