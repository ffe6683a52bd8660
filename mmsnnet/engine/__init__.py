import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.engine.hooks import StitchInitHook, StitchLogHook, StrictLoadHook
from mmsnnet.engine.optimizers import StitchOptimWrapperConstructor
from mmsnnet.engine.runner import StitchTestLoop, StitchValLoop

__all__ = [
    "StitchInitHook",
    "StitchLogHook",
    "StitchOptimWrapperConstructor",
    "StitchTestLoop",
    "StitchValLoop",
    "StrictLoadHook",
]
