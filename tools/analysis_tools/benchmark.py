"""Measures latency, throughput and peak memory of a stitched model at each stitch, and adds them to the file of
operating points."""

import os

# OpenMP reads it when torch is loaded: threads that wait sleep soon, and leave their cores to other processes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import argparse

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmsnnet.apis import build_model, load_config
from mmsnnet.apis.benchmark import (
    Benchmark,
    BenchmarkSettings,
    benchmark_conditions,
    benchmark_stitches,
    check_conditions,
    points_to_time,
    with_latencies,
)
from mmsnnet.apis.model import check_channels
from mmsnnet.cli.arguments import DictAction
from mmsnnet.cli.errors import mistakes_answered
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.visualization import print_table


def parser() -> argparse.ArgumentParser:
    defaults = BenchmarkSettings()
    described = argparse.ArgumentParser(description=__doc__)
    described.add_argument("config", type=os.path.expanduser, help="config file")
    described.add_argument(
        "--checkpoint",
        type=os.path.expanduser,
        metavar="C",
        help="file, published folder, URL or hf-hub:owner/name (default: random weights)",
    )
    described.add_argument(
        "--stitches",
        metavar="WHICH",
        help="all, anchors, or ids and names, such as 57,80 or S4-L10 (default: those in FILE.json, or all)",
    )
    described.add_argument(
        "--out",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="file of operating points; if it exists, all else in it is kept",
    )
    described.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help="input size (default: the backbone's img_size)"
    )
    described.add_argument(
        "--batch-size", type=int, default=defaults.batch_size, metavar="N", help="images (default: %(default)s)"
    )
    described.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        default=defaults.precision,
        help="of weights and images (default: %(default)s)",
    )
    described.add_argument("--channels-last", action="store_true", help="memory format of weights and images")
    described.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile each stitch (inductor)"
    )
    described.add_argument(
        "--cuda-graph", action=argparse.BooleanOptionalAction, help="replay CUDA graphs (default: on a GPU)"
    )
    described.add_argument(
        "--warmup", type=int, default=defaults.warmup, metavar="N", help="rounds before (default: %(default)s)"
    )
    described.add_argument(
        "--repeats", type=int, default=defaults.repeats, metavar="N", help="rounds that count (default: %(default)s)"
    )
    described.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, or a GPU by number, such as cuda:1 (default here: %(default)s)",
    )
    described.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="override settings of the config"
    )
    return described


def benchmark(args: argparse.Namespace) -> None:
    names = ("batch_size", "precision", "channels_last", "compile", "cuda_graph", "warmup", "repeats")
    settings = BenchmarkSettings(**{name: getattr(args, name) for name in names})
    conditions = benchmark_conditions(settings, args.device)
    config = load_config(args.config, args.cfg_options)
    model = build_model(config, args.checkpoint)
    check_channels(config, model)
    backbone = find_stitched_backbone(model)
    shape = tuple(args.shape or backbone.img_size)
    described = OperatingPoints(
        str(config.filename), args.checkpoint, None, shape, args.device, depths=backbone.space.depths
    )
    costs = model_costs(model, shape)
    for s in backbone.space:
        described = described.add(OperatingPoint(s.id, s.name, s.kind, costs[s.id].flops, costs[s.id].params))
    # What cannot be added to is found before the time is spent.
    points = points_to_time(args.out, described)
    stitches = backbone.space.select(args.stitches or [point.id for point in points] or "all")
    check_conditions(points, (stitch.id for stitch in stitches), conditions)

    found = benchmark_stitches(
        model, [stitch.id for stitch in stitches], settings, input_shape=shape, device=args.device, progress=True
    )
    print_table(latency_table(found, described))
    for note in found.notes:
        print(f"note: {note}")
    if args.out:
        with_latencies(points_to_time(args.out, described), described, found).save(args.out)
        print(f"written to {args.out}")


def latency_table(found: Benchmark, described: OperatingPoints) -> Table:
    """One row per stitch, fastest first; above it what was measured, and how."""
    said = {key: value for key, value in found.conditions.items() if key != "date" and value not in (False, None)}
    height, width = found.input_shape
    how = ", ".join(key.replace("_", " ") if value is True else f"{key} {value}" for key, value in said.items())
    table = Table(title=Text(f"{height} x {width}, {how.replace('_', ' ')}"), box=SIMPLE_HEAD)
    flops = {point.id: point.flops for point in described}
    memory = any(latency.peak_memory is not None for latency in found.latencies)
    for header in ("id", "name", "kind", "GFLOPs", "latency (ms)", "quartiles (ms)", "images/s"):
        table.add_column(header, justify="left" if header in ("name", "kind") else "right", no_wrap=True)
    if memory:
        table.add_column("peak (MiB)", justify="right", no_wrap=True)
    for latency in sorted(found.latencies, key=lambda latency: latency.latency_ms):
        stitch = latency.stitch
        table.add_row(
            str(stitch.id),
            stitch.name,
            stitch.kind,
            f"{flops[stitch.id] / 1e9:.4g}",
            f"{latency.latency_ms:.2f}",
            " - ".join(f"{quartile:.2f}" for quartile in latency.quartiles_ms),
            f"{latency.throughput:.4g}",
            *([f"{latency.peak_memory / 2**20:.0f}"] if memory else []),
        )
    return table


def main() -> None:
    command = parser()
    args = command.parse_args()
    with mistakes_answered(command):
        benchmark(args)


if __name__ == "__main__":
    main()
