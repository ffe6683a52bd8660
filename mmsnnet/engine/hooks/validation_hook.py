from __future__ import annotations

from mmengine import dist
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmsnnet.engine.mmengine_private import AnyRunner, validation_is_due
from mmsnnet.models.model_weights import unwrapped_model

# A record in the message hub, which checkpoints save: the epochs or iterations before the last validation. A name that
# starts with "val" would be logged.
VALIDATED = "last_validation"


class ValidationHook(Hook):
    """Make validations the same after an interruption, and on all ranks.

    Our training loops add the hook to their runner.

    - A validation comes after the checkpoint of its epoch or iteration. A run that resumes from this checkpoint starts
      with the validation, unless the checkpoint was written again after it, as for a new best metric.
    - Before a validation and a checkpoint, all ranks get the buffers of rank 0, which are those of the checkpoint: in
      training each rank has its own running statistics of plain batch norm.
    """

    priority = "LOWEST"  # after hooks that prepare themselves, and EMAHook, whose averages are validated

    def before_train(self, runner: AnyRunner) -> None:
        done = _done(runner)
        resumed = done and runner.val_loop is not None and runner.message_hub.get_info(VALIDATED, None) != done
        if resumed and validation_is_due(runner.train_loop, done):
            runner.logger.info("The checkpoint is older than the validation of this point: the run starts with it")
            runner.val_loop.run()

    def before_val_epoch(self, runner: AnyRunner) -> None:
        runner.message_hub.update_info(VALIDATED, _done(runner))
        self.before_checkpoint(runner)

    def before_checkpoint(self, runner: AnyRunner) -> None:
        """:class:`AtomicCheckpointHook` calls this on all ranks before it writes anything."""
        for buffer in unwrapped_model(runner.model).buffers() if dist.get_world_size() > 1 else ():
            dist.broadcast(buffer)


def _done(runner: AnyRunner) -> int:
    return runner.epoch if isinstance(runner.train_loop, EpochBasedTrainLoop) else runner.iter
