"""Selects the best stitch under a budget from a file of operating points.

Example:
    python tools/analysis_tools/select_stitch.py work_dirs/quickstart/operating_points.json --max-gflops 0.3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmsnnet.errors import UserError
from mmsnnet.evaluation import OperatingPoints, compact_front, default_metric, pareto_front, select_stitch
from mmsnnet.files.writing import check_output
from mmsnnet.visualization import operating_points_table, print_table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "file", type=lambda path: Path(path).expanduser(), metavar="FILE.json", help="a file that tools/test.py wrote"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--max-gflops", type=float, metavar="X", help="at most X 1e9 multiply-accumulates")
    budget.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="X",
        help="at most X ms, as measured by tools/analysis_tools/benchmark.py",
    )
    parser.add_argument("--metric", help="the metric to choose by (default: the task's own)")
    parser.add_argument("--better", choices=("higher", "lower"), help="needed for a metric with an unknown name")
    parser.add_argument(
        "--out",
        type=lambda path: Path(path).expanduser(),
        metavar="FRONT.json",
        help="write the Pareto front, for the budget of a model (StitchedBackbone.set_budget)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        points = OperatingPoints.load(args.file)
        if args.out:
            check_output(args.out, "--out")
        if args.out and args.out.exists() and args.out.samefile(args.file):
            raise ValueError(
                f"--out {args.out} is the input file, and the front would replace all points: set another --out"
            )
        metric = args.metric or default_metric(points)
        higher = args.better and args.better == "higher"
        best = select_stitch(
            points, max_gflops=args.max_gflops, max_latency_ms=args.max_latency_ms, metric=metric, higher=higher
        )
        cost = "flops" if args.max_gflops is not None else "latency_ms"
        front = pareto_front(points, cost, metric, higher=higher)
        place = front.index(best)
        neighbours = replace(points, points=front[max(place - 1, 0) : place + 2])
        table = operating_points_table(neighbours, metric, cost, higher=higher)
        compact = compact_front(points, metric, higher=higher) if args.out else points
        budget = f"{args.max_gflops:g} GFLOPs" if cost == "flops" else f"{args.max_latency_ms:g} ms"
        print(f"The best of {len(points)} stitches within {budget} is {best}; its neighbours on the front:")
        print_table(table)
        if cost == "latency_ms":
            print(
                f"latencies of {points.benchmark.get('backend', 'torch')}, {points.benchmark.get('device', 'unknown')}"
            )
        print(f"stitch='{best.name}'  # in model.backbone of the config")
        if args.out:
            compact.save(args.out)
            print(f"{args.out}: {len(compact)} stitches")
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
