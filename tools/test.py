"""Evaluates a stitched model, stitch by stitch, and writes the file of operating points."""

import argparse
import os
from pathlib import Path

from mmsnnet.apis import DictAction, build_runner, build_space, load_config
from mmsnnet.evaluation import OperatingPoints, default_metric
from mmsnnet.visualization import operating_points_table, print_table


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--stitches",
        metavar="WHICH",
        help="all, anchors, or ids and names, such as 57,80 or S4-L10 (default: the config's, or all)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.json",
        help="file of operating points (default: operating_points.json in the work folder)",
    )
    parser.add_argument("--metric", help="metric of the Pareto front in the table (default: the task's own)")
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
        loop = config.get("test_cfg") or {}
        config.test_cfg = {**loop, "type": "mmsnnet.StitchTestLoop"}
        if args.stitches:
            config.test_cfg.stitches = args.stitches
        build_space(config).select(config.test_cfg.get("stitches", "all"))
    except (FileNotFoundError, ImportError, TypeError, ValueError) as error:
        parser.error(str(error))
    config.load_from = args.checkpoint
    args.config = config
    return args


def main() -> None:
    args = parse_args()
    runner = build_runner(args.config, args.launcher, args.work_dir)
    out = args.out or runner.test_loop.out or str(Path(runner.work_dir) / "operating_points.json")
    runner.test_loop.out = out
    runner.test()
    if runner.rank == 0:
        points = OperatingPoints.load(out)
        try:
            print_table(operating_points_table(points, args.metric or default_metric(points)))
        except ValueError as error:
            print_table(operating_points_table(points))
            print(f"no Pareto front is marked: {error}")
        print(f"operating points: {out}")


if __name__ == "__main__":
    main()
