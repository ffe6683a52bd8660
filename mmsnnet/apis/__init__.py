"""The functions for a notebook: load a config, build, predict, count, time, publish, select."""

import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.apis.benchmark import BenchmarkSettings, benchmark_stitches
from mmsnnet.apis.config import load_config
from mmsnnet.apis.export import export_stitches
from mmsnnet.apis.extract import extract_stitch
from mmsnnet.apis.model import build_model, build_space, build_uninitialized, count_stitches
from mmsnnet.apis.prediction import FailedImage, Prediction
from mmsnnet.apis.predictor import Predictor
from mmsnnet.apis.publish import publish_model
from mmsnnet.deployment.exporter import ExportSettings
from mmsnnet.evaluation import OperatingPoints, read_points, select_stitch

__all__ = [
    "BenchmarkSettings",
    "ExportSettings",
    "FailedImage",
    "OperatingPoints",
    "Prediction",
    "Predictor",
    "benchmark_stitches",
    "build_model",
    "build_space",
    "build_uninitialized",
    "count_stitches",
    "export_stitches",
    "extract_stitch",
    "load_config",
    "publish_model",
    "read_points",
    "select_stitch",
]
