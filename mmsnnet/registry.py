"""The registries of the scope ``mmsnnet``, children of mmengine's.

So configs of mmseg and mmdet find their modules as ``mmsnnet.NAME``.
"""

from importlib import import_module

try:
    from mmengine import registry as mmengine_registry
    from mmengine.registry import Registry
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error.name} is missing, which mmsnnet needs outside mmsnnet.stitching: pip install 'mmsnnet[mminstall]' "
        "installs mmengine, mmcv and mmsegmentation"
    ) from error


class ToolboxRegistry(Registry):
    """A registry that imports modules of a toolbox only when needed.

    So a user of one toolbox need not install the other, and other modules load no toolbox.

    Args:
        parent: mmengine's registry for the same kind of objects.
        locations: the Python modules that register all other names.
        on_demand: the Python module that registers a name, for each such name.
    """

    def __init__(self, parent: Registry, *locations: str, **on_demand: str) -> None:
        super().__init__(parent.name, scope="mmsnnet", parent=parent, locations=list(locations))
        self._on_demand = on_demand

    def get(self, key: str) -> type | None:
        name = key.removeprefix(f"{self.scope}.")
        if name in self._on_demand and name not in self.module_dict:
            try:
                import_module(self._on_demand[name])
            except ModuleNotFoundError as error:
                if (error.name or "").startswith("mmsnnet"):
                    raise
                raise ImportError(
                    f"mmsnnet.{name} needs {error.name}, which is missing: pip install 'mmsnnet[mminstall,det]' "
                    "installs all toolboxes"
                ) from error
        return super().get(key)


MODELS = ToolboxRegistry(
    mmengine_registry.MODELS,
    "mmsnnet.models",
    CascadeEncoderDecoder="mmsnnet.models.segmentors.encoder_decoder",  # mmseg
    DPTDepthHead="mmsnnet.models.decode_heads.dpt_depth_head",  # mmseg
    DepthEstimator="mmsnnet.models.segmentors.encoder_decoder",  # mmseg
    EncoderDecoder="mmsnnet.models.segmentors.encoder_decoder",  # mmseg
    LinearHead="mmsnnet.models.decode_heads.linear_head",  # mmseg
    SegDataPreProcessor="mmsnnet.models.data_preprocessors.seg_data_preprocessor",  # mmseg
)
MODEL_WRAPPERS = ToolboxRegistry(mmengine_registry.MODEL_WRAPPERS, "mmsnnet.models", "mmsnnet.engine.sharding")
HOOKS = ToolboxRegistry(mmengine_registry.HOOKS, "mmsnnet.engine")
LOOPS = ToolboxRegistry(mmengine_registry.LOOPS, "mmsnnet.engine")
STRATEGIES = ToolboxRegistry(mmengine_registry.STRATEGIES, "mmsnnet.engine.sharding")
OPTIMIZERS = ToolboxRegistry(mmengine_registry.OPTIMIZERS, "mmsnnet.engine")
OPTIM_WRAPPER_CONSTRUCTORS = ToolboxRegistry(mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS, "mmsnnet.engine")
DATASETS = ToolboxRegistry(
    mmengine_registry.DATASETS,
    "mmsnnet.datasets",
    CocoDataset="mmsnnet.datasets.coco",  # mmdet
    ImageNet="mmsnnet.datasets.imagenet",  # make_shapes.py does without mmengine
)
DATA_SAMPLERS = ToolboxRegistry(
    mmengine_registry.DATA_SAMPLERS,
    "mmsnnet.datasets",
    RepeatAugSampler="mmsnnet.datasets.samplers",
)
TRANSFORMS = ToolboxRegistry(
    mmengine_registry.TRANSFORMS,
    "mmsnnet.datasets",
    LoadDepth="mmsnnet.datasets.transforms.depth",  # mmseg
    LoadImage="mmsnnet.datasets.transforms.image",  # mmcv
    LoadPillowImage="mmsnnet.datasets.transforms.classification",
    LoadSegLabels="mmsnnet.datasets.transforms.segmentation",  # mmseg
    NYUCrop="mmsnnet.datasets.transforms.depth",  # mmcv
    PackClsInputs="mmsnnet.datasets.transforms.classification",
    RandomColor="mmsnnet.datasets.transforms.depth",  # mmcv
    TimmTransform="mmsnnet.datasets.transforms.classification",
)
METRICS = ToolboxRegistry(
    mmengine_registry.METRICS,
    "mmsnnet.evaluation",
    Accuracy="mmsnnet.evaluation.metrics.accuracy",  # operating points do without mmengine
    CocoMetric="mmsnnet.evaluation.metrics.coco_metric",  # mmdet
)
