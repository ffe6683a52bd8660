"""Evaluates a stitched model, stitch by stitch, and writes the file of operating points."""

import os

# OpenMP reads it when torch is loaded: threads that wait sleep soon, and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import argparse
import re
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import build_space, load_config
from mmsnnet.cli.arguments import DictAction, LaunchedParser
from mmsnnet.cli.console import import_toolbox, short_console
from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.cli.launching import launched
from mmsnnet.cli.runner import build_runner
from mmsnnet.datasets import check_folders
from mmsnnet.evaluation import OperatingPoints, default_metric
from mmsnnet.visualization import operating_points_table, print_table


def parser() -> argparse.ArgumentParser:
    described = LaunchedParser(description=__doc__)
    described.add_argument("config", type=os.path.expanduser, help="config file")
    described.add_argument(
        "checkpoint", type=os.path.expanduser, help="checkpoint file, published folder, URL or hf-hub:owner/name"
    )
    described.add_argument(
        "--stitches",
        metavar="WHICH",
        help="all, anchors, or ids and names, such as 57,80 or S4-L10 (default: the config's, or all)",
    )
    described.add_argument(
        "--out",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="file of operating points (default: operating_points.json in the work folder)",
    )
    described.add_argument(
        "--resume", action="store_true", help="go on with what the file of operating points lacks (default: anew)"
    )
    described.add_argument(
        "--no-prefix-reuse", action="store_true", help="run every stitch from the start: slower, the same figures"
    )
    described.add_argument("--metric", help="metric of the Pareto front in the table (default: the task's own)")
    described.add_argument(
        "--work-dir", type=os.path.expanduser, metavar="D", help="folder for logs (default: the config's)"
    )
    described.add_argument(
        "--quiet", action="store_true", help="show progress, the table and warnings; the log file has everything"
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


def test(args: argparse.Namespace) -> None:
    if not re.match(r"\w+://|hf-hub:", args.checkpoint) and not Path(args.checkpoint).expanduser().exists():
        raise FileNotFoundError(f"there is no checkpoint {args.checkpoint!r}")
    config = load_config(args.config, args.cfg_options)
    import_toolbox(config)
    config.load_from = args.checkpoint
    # What was trained in shards is whole in its checkpoint: it is tested by mmengine's ordinary runner.
    config.pop("runner_type", None)
    config.test_cfg = {**(config.get("test_cfg") or {}), "type": "mmsnnet.StitchTestLoop"}
    if args.stitches:
        config.test_cfg.stitches = args.stitches
    config.test_cfg.update(resume=args.resume, prefix_reuse=not args.no_prefix_reuse)
    # Stitches and data that do not exist are found before anything is written.
    build_space(config).select(config.test_cfg.get("stitches", "all"))
    check_folders(config, ("test_dataloader",))
    # A model part of whose weights are random is not worth evaluating.
    config.custom_hooks = [*(config.get("custom_hooks") or []), dict(type="mmsnnet.StrictLoadHook")]
    runner = build_runner(config, args.launcher, args.work_dir, args.quiet)
    out = args.out or runner.test_loop.out or str(Path(runner.work_dir) / "operating_points.json")
    runner.test_loop.out = out
    runner.test()
    if runner.rank == 0:
        points = OperatingPoints.load(out)
        # The file may have latencies of stitches that were not evaluated.
        evaluated = tuple(point for point in points if point.metrics)
        points = replace(points, points=evaluated or points.points)
        try:
            print_table(operating_points_table(points, args.metric or default_metric(points)))
        except ValueError as error:
            print_table(operating_points_table(points))
            print(f"no Pareto front is marked: {error if evaluated else 'no metrics were measured'}")
        print(f"operating points: {out}")


@record
def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command), launched(), short_console():
        test(args)


if __name__ == "__main__":
    main()
