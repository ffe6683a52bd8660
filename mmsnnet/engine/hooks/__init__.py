from mmengine.hooks import RuntimeInfoHook

from mmsnnet.registry import HOOKS

# The deferred log is gone. Configs that runs of 0.1.0 saved still name its hook.
HOOKS.register_module(name="DeferredRuntimeInfoHook", module=RuntimeInfoHook)
