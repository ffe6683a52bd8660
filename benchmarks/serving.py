"""What a stitch that follows the load gains over fixed stitches: deadlines met, and mean quality.

``simulate`` replays traces of arrivals through the server's scheduler in simulated time, with each policy and each
stitch of the front. Latencies and qualities are those of a file of operating points, which
``tools/analysis_tools/benchmark.py --batch-sizes 1,2,4,8`` measures.

``real`` starts ``tools/serve.py`` for each policy, on this machine, and replays one trace with a client that has its
own clock. Images may be larger than those of the operating points; qualities stay those of the file.

    python benchmarks/serving.py simulate [--points FILE.json] [--deadline-ms 100] [--replicas 1,4,16,64]
        [--traces steady,ramp,burst,day] [--out FILE.json] [--picture FILE.png]
    python benchmarks/serving.py real FOLDER --images IMAGES --peak R [--trace burst] [--seconds 30] [--deadline-ms 100]
        [--policies look-ahead,S,L] [--replicas 1] [--threads 1] [--out FILE.json]
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

from serving_figures import as_json, draw, report  # noqa: E402
from serving_simulation import TRACES, arrivals, simulate  # noqa: E402

from mmsnnet.apis.images import list_images  # noqa: E402
from mmsnnet.apis.publish import FRONT  # noqa: E402
from mmsnnet.errors import SettingError  # noqa: E402
from mmsnnet.evaluation import OperatingPoints, default_metric  # noqa: E402
from mmsnnet.evaluation.latencies import batch_latencies  # noqa: E402
from mmsnnet.evaluation.metric_names import higher_is_better  # noqa: E402
from mmsnnet.files.writing import check_output, new_file, write_atomically  # noqa: E402
from mmsnnet.serving.calibration import servable  # noqa: E402
from mmsnnet.serving.policy import POLICIES, FixedStitch, LatencyTable, Policy  # noqa: E402

POINTS = Path(__file__).parent / "serving_points.json"


@dataclass(frozen=True)
class Front:
    """The stitches that a server chooses from, worst first.

    Attributes:
        table: their latencies.
        qualities: their metrics.
        metric: the name of these.
    """

    table: LatencyTable
    qualities: tuple[float, ...]
    metric: str


def read_front(path: Path, metric: str | None, deadline_ms: float) -> Front:
    """The front of a file of operating points with latencies.

    Batches that take even the cheapest stitch longer than the deadline are left out, as by the server.

    Raises:
        OSError, ValueError: the file is missing or damaged, or lacks latencies or metrics.
        SettingError: no batch meets the deadline.
    """
    points = OperatingPoints.load(path)
    metric = metric or default_metric(points)
    by_id = batch_latencies(points)
    front = servable(points, metric)
    if not front:
        raise SettingError(f"{path}: no stitch has a finite {metric}")
    cheapest = by_id[front[0].id]
    sizes = [size for size, ms in cheapest.items() if ms <= deadline_ms]
    if not sizes:
        raise SettingError(
            f"the cheapest stitch takes {min(cheapest.values()):.3g} ms: set --deadline-ms above it, "
            f"not to {deadline_ms:g}"
        )
    table = LatencyTable(
        {point.name: {size: ms for size, ms in by_id[point.id].items() if size in sizes} for point in front}
    )
    return Front(table, tuple(point.metric(metric) for point in front), metric)


def run_trace(
    front: Front, trace: str, replicas: int, *, deadline_ms: float, seconds: float, seed: int, noise: float
) -> list[dict[str, Any]]:
    """The outcomes of all policies and fixed stitches on the same arrivals, as the results have them."""
    table = front.table
    fastest, best = table.throughput(0), table.throughput(len(table) - 1)
    times = list(arrivals(TRACES[trace], best / fastest, replicas * fastest, 1000 * seconds, seed))
    if not times:
        raise SettingError(f"trace {trace} has no requests in {seconds:g} s: set more --seconds")
    policies: dict[str, Policy] = {name: policy(table) for name, policy in POLICIES.items()}
    policies |= {name: FixedStitch(table, number) for number, name in enumerate(table.names)}
    runs = []
    for name, policy in policies.items():
        outcome = simulate(times, [policy] * replicas, front.qualities, deadline_ms, noise=noise, seed=seed)
        runs.append(as_json(outcome, trace=trace, replicas=replicas, policy=name, adaptive=name in POLICIES))
    return runs


def simulate_all(args: argparse.Namespace) -> None:
    """Run all traces; print tables, and write results and picture."""
    for path, option in ((args.out, "--out"), (args.picture, "--picture")):
        if path is not None:
            check_output(path, option)
    front = read_front(args.points, args.metric, args.deadline_ms)
    settings = dict(deadline_ms=args.deadline_ms, seconds=args.seconds, seed=args.seed, noise=args.noise)
    results: dict[str, Any] = dict(
        command=shlex.join(["python", *sys.argv]),
        date=str(date.today()),
        metric=front.metric,
        higher_is_better=higher_is_better(front.metric),
        **settings,
        latencies_ms={
            name: [round(ms, 3) for ms in row[1:]] for name, row in zip(front.table.names, front.table.ms, strict=True)
        },
        runs=[],
    )
    for trace in args.traces:
        for replicas in args.replicas:
            runs = run_trace(front, trace, replicas, **settings)
            results["runs"] += runs
            print(report(results | dict(runs=runs)), flush=True)
    if args.out is not None:
        store(args.out, results)
    if args.picture is not None:
        with new_file(args.picture, "--picture") as path:
            draw(results, path)


def measure_all(args: argparse.Namespace) -> None:
    """Run one trace against a real server with each policy; print a table, and write results."""
    from serving_client import measure  # needs the extra `serve`

    if args.out is not None:
        check_output(args.out, "--out")
    front = read_front(args.folder / FRONT, args.metric, math.inf)
    table, qualities = front.table, dict(zip(front.table.names, front.qualities, strict=True))
    top = table.throughput(len(table) - 1) / table.throughput(0)
    times = list(arrivals(TRACES[args.trace], top, args.peak / 1000, 1000 * args.seconds, args.seed))
    images = [Path(path).read_bytes() for path in list_images(args.images)[0]]
    options = ["--replicas", str(args.replicas), "--threads", str(args.threads)]
    results: dict[str, Any] = dict(
        command=shlex.join(["python", *sys.argv]),
        date=str(date.today()),
        machine=f"{platform.machine()}, {os.cpu_count()} cores, client and server on the same",
        metric=front.metric,
        higher_is_better=higher_is_better(front.metric),
        deadline_ms=args.deadline_ms,
        seconds=args.seconds,
        peak_per_s=args.peak,
        runs=[],
    )
    for policy in args.policies or [*POLICIES, *table.names]:
        outcome, statuses = measure(args.folder, policy, images, times, qualities, args.deadline_ms, options)
        settings = dict(trace=args.trace, replicas=args.replicas, policy=policy, adaptive=policy in POLICIES)
        results["runs"].append(as_json(outcome, **settings))
        print(f"{policy}: {dict(statuses)}", file=sys.stderr, flush=True)
    print(report(results))
    if args.out is not None:
        store(args.out, results)


def store(path: Path, results: dict[str, Any]) -> None:
    """Write results atomically, a run a line."""
    runs = ",\n    ".join(json.dumps(run) for run in results["runs"])
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2)[:-2]
    write_atomically(path, f'{head},\n  "runs": [\n    {runs}\n  ]\n}}\n'.encode())


def positive(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise ValueError(text)
    return value


def counts(text: str) -> list[int]:
    numbers = [int(number) for number in text.split(",")]
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


def traces(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in TRACES]:
        raise argparse.ArgumentTypeError(f"no trace {unknown[0]!r}; there are {', '.join(TRACES)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    simulation = commands.add_parser("simulate", help="replay traces in simulated time")
    simulation.set_defaults(run=simulate_all)
    simulation.add_argument("--points", type=Path, default=POINTS, help="operating points (default: %(default)s)")
    simulation.add_argument("--metric", help="compares stitches (default: the task's own)")
    simulation.add_argument("--deadline-ms", type=positive, default=100.0, help="for an answer (default: 100)")
    simulation.add_argument("--replicas", type=counts, default=[1, 4, 16, 64], help="numbers (default: 1,4,16,64)")
    simulation.add_argument("--traces", type=traces, default=list(TRACES), help=f"of {','.join(TRACES)} (default: all)")
    simulation.add_argument("--seconds", type=positive, default=60.0, help="length of a trace (default: 60)")
    simulation.add_argument("--seed", type=int, default=0, help="of arrivals, routing and noise (default: 0)")
    simulation.add_argument("--noise", type=float, default=0.05, help="relative, of a batch's time (default: 0.05)")
    simulation.add_argument("--out", type=Path, metavar="FILE.json", help="results")
    simulation.add_argument("--picture", type=Path, metavar="FILE.png", help="attainment against quality")
    real = commands.add_parser("real", help="replay a trace against tools/serve.py on this machine")
    real.set_defaults(run=measure_all)
    real.add_argument("folder", type=Path, metavar="FOLDER", help="a published model, with latencies in its front.json")
    real.add_argument("--images", required=True, help="a folder of images to send")
    real.add_argument("--peak", type=positive, required=True, metavar="R", help="requests a second at full load")
    real.add_argument("--trace", choices=TRACES, default="burst", help="default: burst")
    real.add_argument("--seconds", type=positive, default=30.0, help="length of the trace (default: 30)")
    real.add_argument("--deadline-ms", type=positive, default=100.0, help="for an answer (default: 100)")
    real.add_argument("--policies", type=lambda text: text.split(","), help="default: all, and each stitch")
    real.add_argument("--metric", help="compares stitches (default: the task's own)")
    real.add_argument("--replicas", type=int, default=1, help="default: 1")
    real.add_argument("--threads", type=int, default=1, help="of each replica (default: 1)")
    real.add_argument("--seed", type=int, default=0, help="of arrivals (default: 0)")
    real.add_argument("--out", type=Path, metavar="FILE.json", help="results")
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError) as error:  # mistakes in settings or files
        parser.error(str(error))


if __name__ == "__main__":
    main()
