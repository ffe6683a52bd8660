import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.models.backbones import StitchedBackbone, Taps, find_stitched_backbone
from mmsnnet.models.checkpoint_reading import read_model_checkpoint
from mmsnnet.models.classifiers.stitched_classifier import StitchedClassifier
from mmsnnet.models.losses.si_log_loss import SILogLoss
from mmsnnet.models.model_costs import model_costs
from mmsnnet.models.model_weights import check_weights, model_weights, read_weights
from mmsnnet.models.necks.simple_feature_pyramid import SimpleFeaturePyramid
from mmsnnet.models.wrappers.stitched_data_parallel import StitchedDataParallel

__all__ = [
    "SILogLoss",
    "SimpleFeaturePyramid",
    "StitchedBackbone",
    "StitchedClassifier",
    "StitchedDataParallel",
    "Taps",
    "check_weights",
    "find_stitched_backbone",
    "model_costs",
    "model_weights",
    "read_model_checkpoint",
    "read_weights",
]
