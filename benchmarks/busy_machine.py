"""Training on a busy machine with OpenMP's default waiting of threads and with the setting of the tools.

By default OpenMP's threads spin for milliseconds at each barrier. If another process keeps each core busy, a spinning
thread takes the core from the thread that it waits for. Each variant is a process with its environment, which trains
the quickstart's stitched model on random images without a data loader. Variants take turns of a few iterations, first
alone, then beside one busy process for each core. A turn starts when all other processes take less than ``--others`` of
a core, and does not count if they take more during it (read from Linux's /proc).

    python benchmarks/busy_machine.py [--rounds 10] [--iterations 10] [--others 0.1] [--minutes 10]
        [--variants NAME ...]
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"
# How OpenMP waits, and its number of threads. The tools set GOMP_SPINCOUNT=4000.
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
VARIANTS: dict[str, dict[str, str]] = {
    "OpenMP's default": {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=2000": {"GOMP_SPINCOUNT": "2000"},
    "GOMP_SPINCOUNT=4000": {"GOMP_SPINCOUNT": "4000"},
    "GOMP_SPINCOUNT=8000": {"GOMP_SPINCOUNT": "8000"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def work() -> None:
    """The process of a variant: read a number of iterations from each line of the input, and print their seconds."""
    import torch
    from mmengine.optim import OptimWrapper
    from mmengine.structures import PixelData

    from mmsnnet.apis import build_model, load_config

    torch.manual_seed(0)
    config = load_config(CONFIG)
    model = build_model(config).train()
    for layer in model.backbone.network.layers.values():
        layer.set_base(layer.weight, layer.bias)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    wrapper = OptimWrapper(optimizer, clip_grad=dict(max_norm=1.0))

    from mmseg.structures import SegDataSample

    shape = model.backbone.img_size
    inputs, samples = [], []
    for _ in range(config.train_dataloader.batch_size):
        inputs.append(torch.randint(256, (3, *shape), dtype=torch.uint8))
        sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
        sample.set_data(dict(gt_sem_seg=PixelData(data=torch.randint(8, (1, *shape)))))
        samples.append(sample)
    for line in sys.stdin:
        model.backbone.draws = 0  # the same stitches in each turn
        start = time.perf_counter()
        for _ in range(int(line)):
            model.train_step(dict(inputs=inputs, data_samples=samples), wrapper)
        print("seconds", time.perf_counter() - start, flush=True)


class Variant:
    """A process that trains on request."""

    def __init__(self, environment: dict[str, str]) -> None:
        inherited = {key: value for key, value in os.environ.items() if key not in VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--work"],
            env=inherited | environment | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, iterations: int) -> float:
        """Train for ``iterations``; return the mean milliseconds of one."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{iterations}\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("seconds"):
            if not line:
                raise RuntimeError("the process of a variant has ended")
        return 1000 * float(line.split()[1]) / iterations


class OtherWork:
    """The number of cores that processes other than ``ours`` keep busy from now on."""

    def __init__(self, ours: Sequence[int]) -> None:
        self.ours = ours
        self.start, self.before = time.monotonic(), self._ticks()

    def _ticks(self) -> int:
        cpu = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        busy = sum(map(int, cpu)) - int(cpu[3]) - int(cpu[4])  # all but idle and waiting for a disk
        for pid in self.ours:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            busy -= int(fields[11]) + int(fields[12])
        return busy

    def cores(self) -> float:
        seconds = time.monotonic() - self.start
        return (self._ticks() - self.before) / os.sysconf("SC_CLK_TCK") / seconds


def measure(args: argparse.Namespace, variants: dict[str, Variant], busy: Sequence[int]) -> dict[str, list[float]]:
    """Milliseconds for an iteration, one number for each undisturbed turn of each variant."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    ours = [*busy, *(variant.process.pid for variant in variants.values())]
    end = time.monotonic() + 60 * args.minutes
    while min(map(len, times.values())) < args.rounds and time.monotonic() < end:
        for name, variant in variants.items():
            if len(times[name]) < args.rounds:
                while _others(ours, seconds=0.2) > args.others and time.monotonic() < end:
                    time.sleep(0.5)
                others = OtherWork(ours)
                milliseconds = variant.train(args.iterations)
                if others.cores() <= args.others:
                    times[name].append(milliseconds)
    return times


def _others(ours: Sequence[int], seconds: float) -> float:
    others = OtherWork(ours)
    time.sleep(seconds)
    return others.cores()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="undisturbed turns of each variant")
    parser.add_argument("--iterations", type=int, default=10, help="of a turn")
    parser.add_argument("--others", type=float, default=0.1, help="cores that other processes may take in a turn")
    parser.add_argument("--minutes", type=float, default=10, help="time limit of each of the two parts")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work()
        return

    cores = len(os.sched_getaffinity(0))
    variants = {name: Variant(VARIANTS[name]) for name in args.variants}
    spinning: list[subprocess.Popen[bytes]] = []
    try:
        for variant in variants.values():
            variant.train(args.iterations)
        alone = measure(args, variants, ())
        spinning += [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
        beside = measure(args, variants, [process.pid for process in spinning])
    finally:
        for process in [*spinning, *(variant.process for variant in variants.values())]:
            process.kill()
    print(f"{cores} cores; median (number) of turns of {args.iterations} iterations")
    print(f"| variant | alone | beside {cores} busy processes | ratio |\n|---|---|---|---|")
    for name in variants:
        if alone[name] and beside[name]:
            first, second = statistics.median(alone[name]), statistics.median(beside[name])
            counts = f"({len(alone[name])})", f"({len(beside[name])})"
            print(f"| {name} | {first:.0f} ms {counts[0]} | {second:.0f} ms {counts[1]} | {second / first:.1f} |")
        else:
            print(f"| {name} | {len(alone[name])} and {len(beside[name])} turns were not disturbed | | |")


if __name__ == "__main__":
    main()
