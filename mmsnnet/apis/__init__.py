import mmsnnet.registry  # noqa: F401  first: it says what to install where mmengine is missing
from mmsnnet.apis.benchmark import BenchmarkSettings, benchmark_stitches
from mmsnnet.apis.config import DictAction, load_config
from mmsnnet.apis.console import short_console
from mmsnnet.apis.extract import extract_stitch
from mmsnnet.apis.launch import LaunchedParser, check_data_parallel, check_sync_bn, launched, prepare_launch
from mmsnnet.apis.mistakes import in_one_line, is_mistake, mistakes_answered
from mmsnnet.apis.model import build_model, build_space, build_uninitialized, check_channels, check_preprocessor
from mmsnnet.apis.publish import publish_model
from mmsnnet.apis.runner import build_runner
from mmsnnet.apis.snnetv2 import convert_snnetv2
from mmsnnet.evaluation import select_stitch

__all__ = [
    "BenchmarkSettings",
    "DictAction",
    "LaunchedParser",
    "benchmark_stitches",
    "build_model",
    "build_runner",
    "build_space",
    "build_uninitialized",
    "check_channels",
    "check_data_parallel",
    "check_preprocessor",
    "check_sync_bn",
    "convert_snnetv2",
    "extract_stitch",
    "in_one_line",
    "is_mistake",
    "launched",
    "load_config",
    "mistakes_answered",
    "prepare_launch",
    "publish_model",
    "select_stitch",
    "short_console",
]
