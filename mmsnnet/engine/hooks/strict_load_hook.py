from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner, find_latest_checkpoint

from mmsnnet.models.checkpoint import check_weights
from mmsnnet.registry import HOOKS


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuses a checkpoint that lacks a tensor of the model, or has one more or of another shape. mmengine's runner
    loads what fits and logs the rest, which suits fine-tuning; evaluation would go on with random weights.
    ``tools/test.py`` adds the hook.

    Raises:
        ValueError: the checkpoint does not fit; the message lists what is wrong.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        # The runner does not say what it loads: without load_from, it goes on with the last checkpoint of its folder.
        source = runner.cfg.get("load_from") or find_latest_checkpoint(runner.work_dir) or runner.work_dir
        check_weights(runner.model, checkpoint, source)
