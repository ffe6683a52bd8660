from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import HOOKS


@HOOKS.register_module()
class StitchLogHook(Hook):
    """Logs ``flops_share`` in training: the FLOPs of the stitch that was drawn over those of the costliest one.

    A loss goes up and down with the stitch that was drawn; this number says which of the two moved it.
    """

    priority = "NORMAL"

    def before_train(self, runner: Runner) -> None:
        self._backbone = find_stitched_backbone(runner.model)
        costs = self._backbone.costs()
        most = max(cost.flops for cost in costs.values())
        self._shares = {id_: cost.flops / most for id_, cost in costs.items()}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if self._backbone.drawn is not None:
            runner.message_hub.update_scalar("train/flops_share", self._shares[self._backbone.drawn.id])
