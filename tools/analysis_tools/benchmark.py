"""Measures latency, throughput and peak memory of every stitch, and adds them to a file of operating points."""

import os

# OpenMP reads this when torch is loaded: waiting threads go to sleep soon and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import argparse

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmsnnet.apis import (
    BenchmarkSettings,
    benchmark_stitches,
    build_model,
    build_uninitialized,
    count_stitches,
    load_config,
)
from mmsnnet.apis.benchmark import benchmark_conditions
from mmsnnet.apis.model import check_channels
from mmsnnet.cli.arguments import add_backend_option, add_config_arguments
from mmsnnet.cli.errors import exit_on_user_error, user_errors
from mmsnnet.errors import SettingError, needs_extra
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.evaluation.latencies import Benchmark, check_conditions, points_to_time, with_latencies
from mmsnnet.files.locking import locked
from mmsnnet.models import find_stitched_backbone
from mmsnnet.visualization import print_table

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_parser() -> argparse.ArgumentParser:
    defaults = BenchmarkSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        metavar="C",
        help="file, published folder, URL or hf-hub:owner/name (default: random weights)",
    )
    parser.add_argument(
        "--stitches",
        metavar="STITCHES",
        help="all, anchors, or ids and names, such as 57,80 or S4-L10 (default: those in FILE.json, or all)",
    )
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="file of operating points to add to, or to make",
    )
    add_backend_option(parser)
    parser.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help="input size (default: the backbone's img_size)"
    )
    parser.add_argument(
        "--batch-sizes",
        type=_batch_sizes,
        default=defaults.batch_sizes,
        metavar="N[,N...]",
        help="images in a batch, such as 1,2,4,8 (default: 1)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default=defaults.precision,
        help="of weights and images (default: %(default)s)",
    )
    parser.add_argument("--channels-last", action="store_true", help="memory format of weights and images")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile each stitch (inductor)"
    )
    parser.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, help="replay CUDA graphs (default: on a GPU)"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=defaults.warmup,
        metavar="N",
        help="rounds before the measured ones (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=defaults.repeats, metavar="N", help="measured rounds (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        help=f"cpu, cuda, or a GPU by number, such as cuda:1 (default here: {DEVICE}; an export runs on the CPU)",
    )
    return parser


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of images, such as 1,2,4,8; got {text!r}") from None


def benchmark(args: argparse.Namespace) -> None:
    names = ("batch_sizes", "precision", "channels_last", "compile", "cuda_graph", "warmup", "repeats")
    settings = BenchmarkSettings(**{name: getattr(args, name) for name in names})
    graphs = None
    if args.export is None:
        args.device = args.device or DEVICE
        conditions = benchmark_conditions(settings, args.device)
    else:
        with needs_extra("onnx"):
            from mmsnnet.apis.export_benchmark import benchmark_export, export_conditions
            from mmsnnet.deployment.exported_model import ExportedGraphs
        if args.device not in (None, "cpu"):
            raise SettingError(f"an export runs on the CPU: leave out --device {args.device}")
        args.device = "cpu"
        graphs = ExportedGraphs(args.export)
        conditions = export_conditions(graphs, settings)
    config = load_config(args.config, args.cfg_options)
    model = build_model(config, args.checkpoint) if graphs is None else build_uninitialized(config)
    check_channels(config, model)
    shape = args.shape or (graphs and graphs.manifest.image_size)
    counted = count_stitches(config, model, shape, checkpoint=args.checkpoint, device=args.device)
    # Check the file before measuring takes time.
    points = points_to_time(args.out, counted)
    backbone = find_stitched_backbone(model)
    default = [point.id for point in points] if graphs is None else [one.name for one in graphs.manifest.stitches]
    stitches = [stitch.id for stitch in backbone.space.select(args.stitches or default or "all")]
    check_conditions(points, stitches, conditions)

    if graphs is None:
        measured = benchmark_stitches(
            model, stitches, settings, input_shape=counted.input_shape, device=args.device, progress=True
        )
    else:
        chosen = [backbone.space[id_] for id_ in stitches]
        channels = backbone.network.anchor(0).in_chans
        measured = benchmark_export(graphs, chosen, settings, counted.input_shape, channels, progress=True)
    print_table(latency_table(measured, counted))
    for note in measured.notes:
        print(f"note: {note}")
    if args.out:
        with locked(args.out):  # read the file again: it may have changed in the meantime
            with_latencies(points_to_time(args.out, counted), counted, measured).save(args.out)
        print(f"written to {args.out}")


def latency_table(measured: Benchmark, counted: OperatingPoints) -> Table:
    """One row for each stitch, fastest first, below the conditions.

    With several batch sizes there is a column of latencies for each, with the quartiles of the smallest size, the
    throughput of the best one, and the peak of memory of the largest one.
    """
    height, width = measured.input_shape
    hidden = ("date", "batch_size") if "batch_sizes" in measured.conditions else ("date",)
    shown = {k: value for k, value in measured.conditions.items() if k not in hidden and value not in (False, None)}
    title = ", ".join(key if value is True else f"{key} {value}" for key, value in shown.items())
    table = Table(title=Text(f"{height} x {width}, {title.replace('_', ' ')}"), box=SIMPLE_HEAD)
    flops = {point.id: point.flops for point in counted}
    memory = any(latency.peak_memory is not None for latency in measured.latencies)
    sizes = list(measured.latencies[0].times_ms)
    headers = ["id", "name", "kind", "GFLOPs", "latency (ms)", "quartiles (ms)", "images/s"]
    headers += ["peak (MiB)"] if memory else []
    if len(sizes) > 1:
        peak = [f"peak (MiB)\nbatch {sizes[-1]}"] if memory else []
        latencies = [f"latency (ms)\nbatch {sizes[0]}", *(f"\nbatch {size}" for size in sizes[1:])]
        headers[4:] = [*latencies, f"quartiles (ms)\nbatch {sizes[0]}", "images/s\nat batch", *peak]
    for header in headers:
        table.add_column(header, justify="left" if header in ("name", "kind") else "right", no_wrap=True)
    for latency in sorted(measured.latencies, key=lambda latency: latency.latency_ms):
        stitch = latency.stitch
        throughput, size = max((images, size) for size, images in latency.throughputs.items())
        table.add_row(
            str(stitch.id),
            stitch.name,
            stitch.kind,
            f"{flops[stitch.id] / 1e9:.4g}",
            *(f"{one:.2f}" for one in latency.latencies_ms.values()),
            " - ".join(f"{quartile:.2f}" for quartile in latency.quartiles_ms),
            f"{throughput:.4g}" + (f" ({size})" if len(sizes) > 1 else ""),
            *([f"{latency.peak_memory / 2**20:.0f}"] if memory else []),
        )
    return table


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    with exit_on_user_error(parser), user_errors():
        benchmark(args)


if __name__ == "__main__":
    main()
