import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.engine.hooks import (
    AtomicCheckpointHook,
    ConsistencyHook,
    ProgressHook,
    ResumeHook,
    StitchInitHook,
    StitchLogHook,
    StrictLoadHook,
)
from mmsnnet.engine.optimizers import StitchOptimWrapperConstructor
from mmsnnet.engine.runner import (
    StitchEpochBasedTrainLoop,
    StitchIterBasedTrainLoop,
    StitchTestLoop,
    StitchValLoop,
)

__all__ = [
    "AtomicCheckpointHook",
    "ConsistencyHook",
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
