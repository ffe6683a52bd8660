"""Trains a model from a config."""

import os

# OpenMP reads it when torch is loaded: threads that wait sleep soon, and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import argparse
from contextlib import suppress

import torch
from mmengine.device import get_device
from torch.distributed.elastic.multiprocessing.errors import record

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import load_config
from mmsnnet.apis.model import check_channels, check_preprocessor
from mmsnnet.cli.arguments import DictAction, LaunchedParser
from mmsnnet.cli.console import import_toolbox, short_console
from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.cli.launching import check_data_parallel, check_sync_bn, launched
from mmsnnet.cli.runner import build_runner
from mmsnnet.datasets import check_folders
from mmsnnet.registry import MODELS


def parser() -> argparse.ArgumentParser:
    described = LaunchedParser(description=__doc__)
    described.add_argument("config", type=os.path.expanduser, help="config file")
    described.add_argument(
        "--work-dir",
        type=os.path.expanduser,
        metavar="D",
        help="folder for logs and checkpoints (default: the config's)",
    )
    described.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of the work folder")
    described.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    described.add_argument(
        "--quiet", action="store_true", help="show one line of progress and warnings; the log file has everything"
    )
    described.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    described.add_argument(
        "--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher"
    )
    # torch.distributed.launch, which mim calls, says here what it says in the environment, too.
    described.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return described


def train(args: argparse.Namespace) -> None:
    config = load_config(args.config, args.cfg_options)
    import_toolbox(config)
    if lacking := [
        name for name in ("model", "train_dataloader", "train_cfg", "optim_wrapper") if not config.get(name)
    ]:
        raise ValueError(f"{args.config} is no config to train with: it lacks {', '.join(lacking)}")
    check_sync_bn(config, args.launcher)
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    if "AmpOptimWrapper" in str(config.optim_wrapper.type) and get_device() in ("cpu", "mps"):
        raise ValueError(
            "mixed precision needs a GPU, and there is none: leave out --amp, or set optim_wrapper.type=OptimWrapper"
        )
    # Data that is not there and a model that cannot be built are found before anything is written. A model that
    # computes while it is built raises RuntimeError on the meta device; the runner builds it in earnest.
    check_folders(config, ("train_dataloader", "val_dataloader"))
    check_preprocessor(config)
    with torch.device("meta"), suppress(RuntimeError):
        model = MODELS.build(config.model)
        check_channels(config, model)
        check_data_parallel(config, args.launcher, model)
    config.resume, begins_with = args.resume or bool(config.get("resume")), None
    if config.resume and "load_from" not in (args.cfg_options or {}):
        # What a config begins with is no place to go on from, but where the work folder has nothing yet.
        begins_with, config.load_from = config.get("load_from"), None
    runner = build_runner(config, args.launcher, args.work_dir, args.quiet)
    if begins_with is not None and runner._load_from is None:
        runner._load_from, runner._resume = begins_with, False
    runner.train()


@record
def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command), launched(), short_console():
        train(args)


if __name__ == "__main__":
    main()
