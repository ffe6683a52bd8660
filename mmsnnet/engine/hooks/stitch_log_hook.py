from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsnnet.models import find_stitched_backbone
from mmsnnet.registry import HOOKS


@HOOKS.register_module()
class StitchLogHook(Hook):
    """Log ``flops_share`` in training: FLOPs of the drawn stitch over those of the costliest.

    Of several stitches in a step, it is the mean, as in the loss. Both count the taps of training. The loss depends on
    the stitch that was drawn, so the log should average the two over the same iterations: name ``flops_share`` in the
    log processor's ``mean_pattern``, as ``configs/_base_/default_runtime.py`` does.
    """

    def before_train(self, runner: Runner) -> None:
        self._backbone = find_stitched_backbone(runner.model)
        flops = {id_: cost.flops for id_, cost in self._backbone.training_costs().items()}
        self._shares = {id_: count / max(flops.values()) for id_, count in flops.items()}

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        backbone = self._backbone
        if backbone.drawn is not None:
            numbers = range(backbone.draws - backbone.stitches_per_step, backbone.draws)
            shares = [self._shares[backbone.sampler().draw(number)] for number in numbers]
            runner.message_hub.update_scalar("train/flops_share", sum(shares) / len(shares))
