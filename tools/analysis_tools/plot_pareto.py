"""Draws quality over cost of every stitch, and the Pareto front, from files of operating points.

Example:
    python tools/analysis_tools/plot_pareto.py work_dirs/quickstart/operating_points.json --out pareto.png --table

--out pareto.html writes a page that shows the figures and the route of the stitch under the mouse.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmsnnet.errors import UserError
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
        help="a file that tools/test.py wrote",
    )
    parser.add_argument(
        "--out",
        required=True,
        type=lambda path: Path(path).expanduser(),
        metavar="FILE.png",
        help="the picture: .png, .svg or .html",
    )
    parser.add_argument("--metric", help="the metric to draw (default: the task's own)")
    parser.add_argument("--cost", choices=("flops", "latency_ms"), default="flops", help="default: %(default)s")
    parser.add_argument("--better", choices=("higher", "lower"), help="needed for a metric with an unknown name")
    parser.add_argument(
        "--reference", choices=tuple(REFERENCES), help=f"also draw the results of {SOURCE} for this data set"
    )
    parser.add_argument("--table", action="store_true", help="also print the stitches of the first file as a table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs = [OperatingPoints.load(path) for path in args.files]
        metric = args.metric or default_metric(point for run in runs for point in run)
        higher = args.better and args.better == "higher"
        table = operating_points_table(runs[0], metric, args.cost, higher=higher) if args.table else None
        print(plot_pareto(runs, metric, args.out, args.cost, higher=higher, reference=args.reference))
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if table is not None:
        print_table(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
