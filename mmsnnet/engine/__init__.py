import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmsnnet.engine.hooks.consistency_hook import ConsistencyHook
from mmsnnet.engine.hooks.narrow_draws_hook import NarrowDrawsHook
from mmsnnet.engine.hooks.progress_hook import ProgressHook
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.hooks.stitch_init_hook import StitchInitHook
from mmsnnet.engine.hooks.stitch_log_hook import StitchLogHook
from mmsnnet.engine.hooks.strict_load_hook import StrictLoadHook
from mmsnnet.engine.optimizers import StitchOptimWrapperConstructor
from mmsnnet.engine.runner.stitch_loops import StitchTestLoop, StitchValLoop
from mmsnnet.engine.runner.train_loops import StitchEpochBasedTrainLoop, StitchIterBasedTrainLoop

__all__ = [
    "AtomicCheckpointHook",
    "ConsistencyHook",
    "NarrowDrawsHook",
    "ProgressHook",
    "ResumeHook",
    "StitchEpochBasedTrainLoop",
    "StitchInitHook",
    "StitchIterBasedTrainLoop",
    "StitchLogHook",
    "StitchOptimWrapperConstructor",
    "StitchTestLoop",
    "StitchValLoop",
    "StrictLoadHook",
]
