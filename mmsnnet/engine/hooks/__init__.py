from mmsnnet.engine.hooks.stitch_init_hook import StitchInitHook
from mmsnnet.engine.hooks.stitch_log_hook import StitchLogHook

__all__ = ["StitchInitHook", "StitchLogHook"]
