"""Evaluates a stitched model, stitch by stitch, and writes the file of operating points."""

import os

# OpenMP reads this when torch is loaded: waiting threads go to sleep soon and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

# Before the imports, which take seconds: a launcher that is killed meanwhile is noticed, too.
os.environ["MMSNNET_LAUNCHER"] = str(os.getppid())

import argparse
import re
from dataclasses import replace
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner
from torch.distributed.elastic.multiprocessing.errors import record

import mmsnnet.safe_loading  # noqa: F401  mmengine then runs no code in checkpoints
from mmsnnet.apis import build_space, load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.cli.arguments import DistributedParser, add_backend_option, add_config_arguments, add_launch_options
from mmsnnet.cli.console import import_toolbox, short_console
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.cli.launching import process_group
from mmsnnet.cli.runner import build_runner
from mmsnnet.datasets import check_folders
from mmsnnet.deployment.manifest import Manifest
from mmsnnet.engine.recalibration import check_recalibration
from mmsnnet.errors import MissingFileError, SettingError, needs_extra
from mmsnnet.evaluation import OperatingPoints, default_metric
from mmsnnet.files.writing import DISK_ERRORS, output_errors
from mmsnnet.models.model_weights import read_weights, weights_digest
from mmsnnet.visualization import operating_points_table, print_table


def make_parser() -> argparse.ArgumentParser:
    parser = DistributedParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "checkpoint", type=os.path.expanduser, help="checkpoint file, published folder, URL or hf-hub:owner/name"
    )
    parser.add_argument(
        "--stitches",
        metavar="STITCHES",
        help="all, anchors, or ids and names, such as 57,80 or S4-L10 (default: the config's, or all)",
    )
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="file of operating points (default: operating_points.json in the work folder)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="evaluate only the stitches that the file of operating points lacks"
    )
    parser.add_argument(
        "--no-prefix-reuse", action="store_true", help="run every stitch from the start: slower, the same figures"
    )
    parser.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="give each stitch running statistics of batch norms of its own, over N training images",
    )
    add_backend_option(parser)
    parser.add_argument("--metric", help="metric of the Pareto front in the table (default: the task's own)")
    parser.add_argument(
        "--work-dir", type=os.path.expanduser, metavar="D", help="folder for logs (default: the config's)"
    )
    parser.add_argument(
        "--quiet", action="store_true", help="show progress, the table and warnings; the log file has everything"
    )
    add_launch_options(parser)
    return parser


def build(args: argparse.Namespace) -> Runner:
    """The runner that tests. Checks stitches and data before anything is written."""
    if not re.match(r"\w+://|hf-hub:", args.checkpoint) and not Path(args.checkpoint).exists():
        raise MissingFileError(f"there is no checkpoint {args.checkpoint!r}")
    config = load_config(args.config, args.cfg_options)
    import_toolbox(config)
    config.load_from = args.checkpoint
    # A checkpoint of a FlexibleRunner has whole weights, which mmengine's ordinary runner loads.
    config.pop("runner_type", None)
    config.test_cfg = {**(config.get("test_cfg") or {}), "type": "mmsnnet.StitchTestLoop"}
    if args.stitches:
        config.test_cfg.stitches = args.stitches
    config.test_cfg.update(resume=args.resume, prefix_reuse=not args.no_prefix_reuse)
    if args.recalibrate is not None:
        config.test_cfg.recalibrate = args.recalibrate
    if args.export is not None:
        read_export(args, config)
    build_space(config).select(config.test_cfg.get("stitches", "all"))
    check_folders(config, ("test_dataloader",))
    if (number := config.test_cfg.get("recalibrate")) is not None:
        check_recalibration(config, build_without_weights(config), number)
        check_folders(config, ("train_dataloader",))
    # Without it mmengine would evaluate random weights for those that the checkpoint lacks.
    config.custom_hooks = [*(config.get("custom_hooks") or []), dict(type="mmsnnet.StrictLoadHook")]
    runner = build_runner(config, args.launcher, args.work_dir, args.quiet)
    if args.export is not None:
        with needs_extra("onnx"):
            from mmsnnet.deployment.exported_model import use_export
        runner.model.cpu()
        use_export(runner.model, args.export)
    runner.test_loop.out = args.out or runner.test_loop.out or str(Path(runner.work_dir) / "operating_points.json")
    return runner


def read_export(args: argparse.Namespace, config: Config) -> None:
    """Set the stitches of an export, and let the file of operating points tell that they are of an export."""
    if args.launcher != "none":
        raise SettingError("--backend onnx runs in one process: leave out --launcher")
    if config.test_cfg.get("recalibrate") is not None:
        raise SettingError("--backend onnx has the batch norms of the export: leave out --recalibrate (test_cfg)")
    manifest = Manifest.load(args.export)
    model = build_without_weights(config)
    if weights_digest({**model.state_dict(), **read_weights(model, args.checkpoint)}) != manifest.checkpoint:
        raise SettingError(f"{args.export} was exported from another checkpoint than {args.checkpoint}: export again")
    if not args.stitches:
        config.test_cfg.stitches = [stitch.name for stitch in manifest.stitches]
    for stitch in build_space(config).select(config.test_cfg.stitches):
        manifest[stitch.name]  # an error if the export lacks it
    config.test_cfg.prefix_reuse = False
    config.export = manifest.to_json()


def print_points(out: str, metric: str | None) -> None:
    """Print a table of the stitches that were evaluated."""
    points = OperatingPoints.load(out)
    # The file may have latencies of other stitches.
    evaluated = tuple(point for point in points if point.metrics)
    points = replace(points, points=evaluated or points.points)
    try:
        print_table(operating_points_table(points, metric or default_metric(points)))
    except ValueError as error:
        print_table(operating_points_table(points))
        print(f"no Pareto front is marked: {error if evaluated else 'no metrics were measured'}")
    print(f"operating points: {out}")


@record
def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors() as loop_start, process_group(), short_console():
        runner = build(args)
        runner.register_hook(loop_start)
        cure = "make room, or set another --work-dir; --resume evaluates the stitches that are missing"
        with output_errors(f"a file in {runner.work_dir}", cure, DISK_ERRORS):
            runner.test()
        if runner.rank == 0:
            print_points(runner.test_loop.out, args.metric)


if __name__ == "__main__":
    main()
