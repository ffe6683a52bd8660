import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.engine.hooks import (
    AtomicCheckpointHook,
    ConsistencyHook,
    DeferredRuntimeInfoHook,
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
from mmsnnet.engine.strategies import FSDPStrategy

__all__ = [
    "AtomicCheckpointHook",
    "ConsistencyHook",
    "DeferredRuntimeInfoHook",
    "FSDPStrategy",
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
