"""Draws quality over cost of every stitch, with the Pareto front, from files of operating points.

Example:
    python tools/analysis_tools/plot_pareto.py work_dirs/quickstart/operating_points.json --out pareto.png --table

With --out pareto.html: a page that shows what is known of a stitch, and its route, where the mouse is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmsnnet.evaluation import OperatingPoints, default_metric
from mmsnnet.visualization import operating_points_table, plot_pareto, print_table
from mmsnnet.visualization.references import REFERENCES, SOURCE


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "files",
        nargs="+",
        type=lambda path: Path(path).expanduser(),
        metavar="FILE.json",
        help="what tools/test.py --out wrote",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=lambda path: Path(path).expanduser(),
        metavar="FILE.png",
        help="the picture: .png, .svg or .html",
    )
    parser.add_argument("--metric", help="the metric to draw (default: the one that the task is known by)")
    parser.add_argument("--cost", choices=("flops", "latency_ms"), default="flops", help="default: %(default)s")
    parser.add_argument("--better", choices=("higher", "lower"), help="for a metric that is not known by its name")
    parser.add_argument(
        "--reference", choices=tuple(REFERENCES), help=f"draw the results of {SOURCE} for this data set, too"
    )
    parser.add_argument("--table", action="store_true", help="print the stitches of the first file as a table, too")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs = [OperatingPoints.load(path) for path in args.files]
        metric = args.metric or default_metric(point for run in runs for point in run)
        higher = args.better and args.better == "higher"
        table = operating_points_table(runs[0], metric, args.cost, higher=higher) if args.table else None
        print(plot_pareto(runs, metric, args.out, args.cost, higher=higher, reference=args.reference))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if table is not None:
        print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
