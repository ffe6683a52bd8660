from mmengine.hooks import RuntimeInfoHook

from mmsnnet.engine.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmsnnet.engine.hooks.consistency_hook import ConsistencyHook
from mmsnnet.engine.hooks.progress_hook import ProgressHook
from mmsnnet.engine.hooks.resume_hook import ResumeHook
from mmsnnet.engine.hooks.stitch_init_hook import StitchInitHook
from mmsnnet.engine.hooks.stitch_log_hook import StitchLogHook
from mmsnnet.engine.hooks.strict_load_hook import StrictLoadHook
from mmsnnet.registry import HOOKS

# The deferred log is gone. Configs that runs of 0.1.0 saved still name its hook.
HOOKS.register_module(name="DeferredRuntimeInfoHook", module=RuntimeInfoHook)

__all__ = [
    "AtomicCheckpointHook",
    "ConsistencyHook",
    "ProgressHook",
    "ResumeHook",
    "StitchInitHook",
    "StitchLogHook",
    "StrictLoadHook",
]
