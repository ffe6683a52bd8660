"""The registries of the scope ``mmsnnet``: children of mmengine's, so that configs of mmseg and mmdet find them."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

try:
    from mmengine import registry as mmengine_registry
    from mmengine.registry import Registry
except ModuleNotFoundError as error:
    raise ImportError(
        f"{error.name} is missing, which mmsnnet needs outside mmsnnet.stitching: pip install 'mmsnnet[mminstall]' "
        "installs mmengine, mmcv and mmsegmentation"
    ) from error


class ToolboxRegistry(Registry):
    """A registry that imports modules which need a toolbox only when a config names them.

    So a user of one toolbox need not install the other, and other modules load no toolbox.

    Args:
        on_demand: the Python module that registers a name, for each such name.
        args, kwargs: as of mmengine's ``Registry``.
    """

    def __init__(self, *args: Any, on_demand: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_demand = dict(on_demand)

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
    "model",
    scope="mmsnnet",
    parent=mmengine_registry.MODELS,
    locations=["mmsnnet.models"],
    on_demand={
        "CascadeEncoderDecoder": "mmsnnet.models.segmentors.encoder_decoder",  # mmseg
        "DPTDepthHead": "mmsnnet.models.decode_heads.dpt_depth_head",  # mmseg
        "DepthEstimator": "mmsnnet.models.segmentors.encoder_decoder",  # mmseg
        "EncoderDecoder": "mmsnnet.models.segmentors.encoder_decoder",  # mmseg
        "LinearHead": "mmsnnet.models.decode_heads.linear_head",  # mmseg
        "SegDataPreProcessor": "mmsnnet.models.data_preprocessors.seg_data_preprocessor",  # mmseg
    },
)
MODEL_WRAPPERS = Registry(
    "model wrapper",
    scope="mmsnnet",
    parent=mmengine_registry.MODEL_WRAPPERS,
    locations=["mmsnnet.models", "mmsnnet.engine.sharding"],
)
HOOKS = Registry("hook", scope="mmsnnet", parent=mmengine_registry.HOOKS, locations=["mmsnnet.engine"])
LOOPS = Registry("loop", scope="mmsnnet", parent=mmengine_registry.LOOPS, locations=["mmsnnet.engine"])
STRATEGIES = Registry(
    "strategy", scope="mmsnnet", parent=mmengine_registry.STRATEGIES, locations=["mmsnnet.engine.sharding"]
)
OPTIMIZERS = Registry("optimizer", scope="mmsnnet", parent=mmengine_registry.OPTIMIZERS, locations=["mmsnnet.engine"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optimizer wrapper constructor",
    scope="mmsnnet",
    parent=mmengine_registry.OPTIM_WRAPPER_CONSTRUCTORS,
    locations=["mmsnnet.engine"],
)
DATASETS = ToolboxRegistry(
    "dataset",
    scope="mmsnnet",
    parent=mmengine_registry.DATASETS,
    locations=["mmsnnet.datasets"],
    on_demand={
        "CocoDataset": "mmsnnet.datasets.coco",  # mmdet
        "ImageNet": "mmsnnet.datasets.imagenet",  # make_shapes.py does without mmengine
    },
)
TRANSFORMS = ToolboxRegistry(
    "transform",
    scope="mmsnnet",
    parent=mmengine_registry.TRANSFORMS,
    locations=["mmsnnet.datasets"],
    on_demand={
        "LoadDepth": "mmsnnet.datasets.transforms.depth",  # mmseg
        "LoadImage": "mmsnnet.datasets.transforms.image",  # mmcv
        "LoadPillowImage": "mmsnnet.datasets.transforms.classification",
        "LoadSegLabels": "mmsnnet.datasets.transforms.segmentation",  # mmseg
        "NYUCrop": "mmsnnet.datasets.transforms.depth",  # mmcv
        "PackClsInputs": "mmsnnet.datasets.transforms.classification",
        "RandomColor": "mmsnnet.datasets.transforms.depth",  # mmcv
        "TimmTransform": "mmsnnet.datasets.transforms.classification",
    },
)
METRICS = ToolboxRegistry(
    "metric",
    scope="mmsnnet",
    parent=mmengine_registry.METRICS,
    locations=["mmsnnet.evaluation"],
    on_demand={
        "Accuracy": "mmsnnet.evaluation.metrics.accuracy",  # operating points do without mmengine
        "CocoMetric": "mmsnnet.evaluation.metrics.coco_metric",  # mmdet
    },
)
