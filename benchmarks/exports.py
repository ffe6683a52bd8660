"""What an exported front costs: disk, memory of sessions that are loaded together, and latency beside PyTorch.

The weights are random: costs do not depend on them. Exports are made once and kept in --folder.

    python benchmarks/exports.py CONFIG --stitches S,L,57 --images FOLDER [--precision int8] [--rounds 5]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402

import mmsnnet.safe_loading  # noqa: E402, F401
from mmsnnet.apis import (  # noqa: E402
    ExportSettings,
    build_model,
    export_stitches,
    load_config,
)
from mmsnnet.apis.model import deployed  # noqa: E402
from mmsnnet.deployment.graphs import IMAGES, stitch_graph  # noqa: E402
from mmsnnet.deployment.manifest import Manifest  # noqa: E402
from mmsnnet.deployment.sessions import open_session  # noqa: E402
from mmsnnet.models import find_stitched_backbone  # noqa: E402

# Loads graphs in a process without torch, runs each once, and prints the memory that this takes, in bytes: pages that
# sessions share count once.
MEMORY = """
import json, sys
import numpy, onnxruntime
shape, shared, files = json.loads(sys.argv[1]), sys.argv[2] == "shared", sys.argv[3:]
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
    return 1024 * int(fields["Pss"].split()[0])
before = memory()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
if shared:
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.enable_cpu_mem_arena = False
off = ["ConstantFolding"]
sessions = [onnxruntime.InferenceSession(f, options, ["CPUExecutionProvider"], disabled_optimizers=off) for f in files]
for session in sessions:
    session.run(None, {"images": numpy.zeros(shape, numpy.float32)})
print(memory() - before)
"""
WAYS = ("shared", "packed")  # as open_session's ``shared``


def memory(files: list[Path], shape: list[int], way: str) -> int:
    arguments = [json.dumps(shape), way, *map(str, files)]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    return int(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--stitches", default="anchors")
    parser.add_argument("--images", required=True, help="a folder of images, for the comparison")
    parser.add_argument("--folder", type=Path, default=Path("work_dirs/exports"))
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=("fp32", "fp16", "int8"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = load_config(args.config)
    args.folder.mkdir(parents=True, exist_ok=True)
    checkpoint = args.folder / "model.pth"
    if not checkpoint.exists():
        torch.manual_seed(0)
        torch.save({"state_dict": build_model(config).state_dict()}, checkpoint)
    model = deployed(build_model(config, checkpoint))
    backbone = find_stitched_backbone(model)
    stitches = [stitch.name for stitch in backbone.space.select(args.stitches)]
    for precision in args.precision:
        out = args.folder / precision
        if not out.exists():
            start = time.monotonic()
            settings = ExportSettings(precision=precision, num_images=1, tolerance=1.0 if precision == "int8" else None)
            export_stitches(config, checkpoint, stitches, out, settings, images=args.images, done=print)
            print(f"{precision}: exported in {time.monotonic() - start:.0f} s")
    print(f"\n{date.today()}, {platform.machine()}, {args.threads} threads, torch {torch.__version__}\n")
    manifests = {precision: Manifest.load(args.folder / precision) for precision in args.precision}
    size = next(iter(manifests.values())).image_size
    images = torch.randn(1, backbone.network.anchor(0).in_chans, *size, generator=torch.Generator().manual_seed(0))
    for precision in args.precision:
        folder = args.folder / precision
        disk = sum(file.stat().st_size for file in folder.iterdir())
        share = disk / checkpoint.stat().st_size
        print(f"{precision}: {disk / 1e6:.0f} MB on disk, {share:.3f} of the checkpoint's")
        files = [folder / stitch.file for stitch in manifests[precision].stitches]
        for way in WAYS:
            alone = max(memory([file], list(images.shape), way) for file in files)
            together = memory(files, list(images.shape), way)
            print(
                f"{precision}, {way}: {len(files)} sessions: {together / 1e6:.0f} MB, {together / alone:.2f} of "
                f"the largest alone ({alone / 1e6:.0f} MB)"
            )
    columns = [(precision, way) for precision in args.precision for way in WAYS]
    print("\n| stitch | GFLOPs | PyTorch (ms) |", " | ".join(f"{p}, {way} (ms, ratio)" for p, way in columns), "|")
    print("|---|---|---|" + "---|" * len(columns))
    for name in stitches:
        backbone.set_stitch(name)
        graph, array = stitch_graph(model), images.numpy()
        runs = {"torch": partial(graph, images)}
        for precision, way in columns:
            path = args.folder / precision / manifests[precision][name].file
            session = open_session(path, args.threads, shared=way == "shared")
            runs[precision, way] = partial(session.run, None, {IMAGES: array})
        times: dict[object, list[float]] = {key: [] for key in runs}
        with torch.inference_mode():
            for _ in range(args.rounds + 1):  # in turns; the first round warms up
                for key, run in runs.items():
                    start = time.perf_counter()
                    run()
                    times[key].append(1000 * (time.perf_counter() - start))
        middle = {key: median(values[1:]) for key, values in times.items()}
        flops = next(iter(manifests.values()))[name].flops / 1e9
        cells = [f"{middle[column]:.0f} ({middle['torch'] / middle[column]:.2f})" for column in columns]
        print(f"| {name} | {flops:.3g} | {middle['torch']:.0f} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
