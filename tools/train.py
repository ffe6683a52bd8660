"""Trains a model from a config."""

import argparse
import os

from mmsnnet.apis import DictAction, build_runner, load_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("--work-dir", metavar="D", help="folder for logs and checkpoints (default: the config's)")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint of the work folder")
    parser.add_argument("--amp", action="store_true", help="train with automatic mixed precision")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        args.config = load_config(args.config, args.cfg_options)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_args()
    config = args.config
    config.resume = args.resume
    if args.amp:
        config.optim_wrapper.type = "AmpOptimWrapper"
        config.optim_wrapper.setdefault("loss_scale", "dynamic")
    build_runner(config, args.launcher, args.work_dir).train()


if __name__ == "__main__":
    main()
