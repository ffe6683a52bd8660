"""The registries of the scope ``mmsnnet``: children of mmengine's, so that mmseg and mmdet configs find them alike."""

try:
    from mmengine.registry import HOOKS as MMENGINE_HOOKS
    from mmengine.registry import LOOPS as MMENGINE_LOOPS
    from mmengine.registry import MODELS as MMENGINE_MODELS
    from mmengine.registry import Registry
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error.name} is missing, which all of mmsnnet but mmsnnet.stitching needs: pip install 'mmsnnet[mminstall]' "
        "installs mmengine, mmcv and mmsegmentation"
    ) from error

MODELS = Registry("model", scope="mmsnnet", parent=MMENGINE_MODELS, locations=["mmsnnet.models"])
HOOKS = Registry("hook", scope="mmsnnet", parent=MMENGINE_HOOKS, locations=["mmsnnet.engine"])
LOOPS = Registry("loop", scope="mmsnnet", parent=MMENGINE_LOOPS, locations=["mmsnnet.engine"])
