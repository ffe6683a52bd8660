"""Trains a model from a config."""

import os

# OpenMP reads this when torch is loaded: waiting threads go to sleep soon and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# Before the imports, which take seconds: a launcher that is killed meanwhile is noticed, too.
os.environ["MMSNNET_LAUNCHER"] = str(os.getppid())

import argparse
from contextlib import ExitStack, suppress
from functools import partial

import torch
from mmengine.device import get_device
from mmengine.runner import FlexibleRunner, Runner
from torch.distributed.elastic.multiprocessing.errors import record

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import load_config
from mmsnnet.apis.model import check_channels, check_preprocessor
from mmsnnet.cli.arguments import DistributedParser, add_config_arguments, add_launch_options
from mmsnnet.cli.console import import_toolbox, short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.cli.launching import check_data_parallel, check_sync_bn, process_group
from mmsnnet.cli.runner import build_runner
from mmsnnet.datasets import check_folders
from mmsnnet.engine.hooks.atomic_checkpoint_hook import resume_cure
from mmsnnet.engine.mmengine_private import load_from, set_load_from
from mmsnnet.errors import SettingError
from mmsnnet.files.writing import DISK_ERRORS, output_errors
from mmsnnet.registry import MODELS


def make_parser() -> argparse.ArgumentParser:
    parser = DistributedParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--work-dir",
        type=os.path.expanduser,
        metavar="D",
        help="folder for logs and checkpoints (default: the config's)",
    )
    parser.add_argument("--resume", action="store_true", help="resume from the latest checkpoint of the work folder")
    parser.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    parser.add_argument(
        "--quiet", action="store_true", help="show one line of progress and warnings; the log file has everything"
    )
    add_launch_options(parser)
    return parser


def build(args: argparse.Namespace, locks: ExitStack) -> Runner | FlexibleRunner:
    """The runner that trains. Checks data and settings, and locks the work folder, before anything is written."""
    config = load_config(args.config, args.cfg_options)
    import_toolbox(config)
    needed = ("model", "train_dataloader", "train_cfg", "optim_wrapper")
    if missing := [name for name in needed if not config.get(name)]:
        raise SettingError(f"{args.config} cannot be trained with: it has no {', '.join(missing)}")
    check_sync_bn(config, args.launcher)
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if "AmpOptimWrapper" in str(config.optim_wrapper.type) and get_device() in ("cpu", "mps"):
        raise SettingError(
            "mixed precision needs a GPU, and there is none: leave out --amp, or set optim_wrapper.type=OptimWrapper"
        )
    check_folders(config, ("train_dataloader", "val_dataloader"))
    check_preprocessor(config)
    # A model that computes while it is built raises RuntimeError on the meta device; only the runner can build it.
    with torch.device("meta"), suppress(RuntimeError):
        model = MODELS.build(config.model)
        check_channels(config, model)
        check_data_parallel(config, args.launcher, model)
    config.resume, start_from = args.resume or bool(config.get("resume")), None
    if config.resume and "load_from" not in (args.cfg_options or {}):
        # A resumed run continues from its work folder. The config's load_from is for a folder without checkpoints.
        start_from, config.load_from = config.get("load_from"), None
    runner = build_runner(config, args.launcher, args.work_dir, args.quiet, locks)
    if start_from is not None and load_from(runner) is None:
        set_load_from(runner, start_from, resume=False)
    return runner


@record
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with (
        ExitStack() as locks,
        exit_on_user_error(parser),
        user_errors() as loop_start,
        process_group(),
        short_console(),
    ):
        runner = build(args, locks)
        runner.register_hook(loop_start)
        with output_errors(None, partial(resume_cure, runner.work_dir), DISK_ERRORS):
            runner.train()


if __name__ == "__main__":
    main()
