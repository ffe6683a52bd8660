from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmsnnet.engine.latest_checkpoint import loaded_checkpoint
from mmsnnet.models.model_weights import check_weights
from mmsnnet.registry import HOOKS


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuse a checkpoint that does not have exactly the model's tensors.

    mmengine's runner loads what fits and logs the rest. That suits fine-tuning, but an evaluation would go on with
    random weights. ``tools/test.py`` adds the hook.

    Raises:
        DataError: a tensor is missing, unknown to the model or of another shape; the message lists them.
    """

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        check_weights(runner.model, checkpoint, loaded_checkpoint(runner))
