from mmsnnet.engine.hooks.stitch_init_hook import StitchInitHook
from mmsnnet.engine.hooks.stitch_log_hook import StitchLogHook
from mmsnnet.engine.hooks.strict_load_hook import StrictLoadHook

__all__ = ["StitchInitHook", "StitchLogHook", "StrictLoadHook"]
