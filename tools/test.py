"""Evaluates a stitched model, stitch by stitch, and writes the file of operating points."""

import argparse
import os
from pathlib import Path

from mmengine.config import DictAction
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmsnnet.apis import load_config
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.stitching import UnknownStitchError
from mmsnnet.visualization import operating_points_table, print_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--stitches",
        default="all",
        metavar="WHICH",
        help="all, anchors, or ids and names separated by commas, such as 57,80 or S4-L10 (default: all)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="file of operating points (default: operating_points.json in the work folder)",
    )
    parser.add_argument("--metric", default="mIoU", help="metric of the Pareto front in the table (default: mIoU)")
    parser.add_argument("--work-dir", metavar="D", help="folder for logs (default: the config's)")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="job launcher")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if not Path(args.checkpoint).is_file():
        parser.error(f"there is no checkpoint {args.checkpoint!r}")
    try:
        config = load_config(args.config, args.cfg_options)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    config.launcher = args.launcher
    config.load_from = args.checkpoint
    if args.work_dir:
        config.work_dir = args.work_dir
    config.setdefault("work_dir", str(Path("work_dirs") / Path(config.filename).stem))
    args.out = args.out or str(Path(config.work_dir) / "operating_points.json")
    loop = dict(type="mmsnnet.StitchTestLoop", stitches=args.stitches, out=args.out)
    config.test_cfg = {**(config.get("test_cfg") or {}), **loop}
    args.config, args.parser = config, parser
    return args


def main() -> None:
    args = parse_args()
    runner = Runner.from_cfg(args.config)
    try:
        runner.test()
    except UnknownStitchError as error:
        args.parser.error(str(error))
    if is_main_process():
        print_table(operating_points_table(OperatingPoints.load(args.out), args.metric))
        print(f"operating points: {args.out}")


if __name__ == "__main__":
    main()
