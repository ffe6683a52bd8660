from mmsnnet.engine.hooks import StitchInitHook, StitchLogHook
from mmsnnet.engine.runner import StitchTestLoop, StitchValLoop

__all__ = ["StitchInitHook", "StitchLogHook", "StitchTestLoop", "StitchValLoop"]
