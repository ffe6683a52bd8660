"""Time training steps of several stitches as a tree against their separate passes.

Both run the same stitches on the same batch, forward and backward, in turns. The bound is 5 % above what the FLOPs
promise: the time of the separate passes, times the FLOPs of the tree over those of the separate passes, heads included.

    python benchmarks/shared_steps.py [--stitches 3 8] [--widths 192 384] [--depths 12 24] [--size 128] [--batch 2]
        [--rounds 15] [--cpu-time] [--device cpu|cuda]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from training import Trainer

from mmsnnet.apis.benchmark import device_name
from mmsnnet.engine.runner.train_step import several_stitches
from mmsnnet.stitching import Stitch, StitchSampler


class Steps:
    """The passes of one batch through a trainer's model."""

    def __init__(self, trainer: Trainer, cpu_time: bool) -> None:
        self.model, self.backbone = trainer.model, trainer.backbone
        self.synchronize = trainer._synchronize
        self.batch = self.model.data_preprocessor(trainer.batch, True)
        self.clock: Callable[[], float] = time.process_time if cpu_time else time.perf_counter

    def tree(self, sampler: StitchSampler, first: int) -> float:
        """The seconds of one backward pass over the stitches of a step from draw ``first``, as they share blocks."""
        self.backbone._sampler, self.backbone.stitches_per_step = sampler, sampler.stitches_per_step
        self.backbone.draws = first
        self.model.zero_grad()
        self.synchronize()
        start = self.clock()
        with several_stitches(self.model):
            loss, _ = self.model.parse_losses(self.model(**self.batch, mode="loss"))
        loss.backward()
        self.synchronize()
        return self.clock() - start

    def apart(self, stitches: list[Stitch]) -> float:
        """The seconds of a forward and a backward pass for each stitch."""
        self.backbone.stitches_per_step = 1
        self.model.zero_grad()
        self.synchronize()
        start = self.clock()
        for stitch in stitches:
            self.backbone._sampler = StitchSampler(((stitch.id,),))
            loss, _ = self.model.parse_losses(self.model(**self.batch, mode="loss"))
            loss.backward()
        self.synchronize()
        return self.clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stitches", nargs="+", type=int, default=[3, 8])
    parser.add_argument("--widths", nargs=2, type=int, default=[192, 384])
    parser.add_argument("--depths", nargs=2, type=int, default=[12, 24])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="time of this process alone, beside other work")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.set_defaults(seed=0, precision="fp32", compile=None, with_cp=False, optimizer="SGD", fused=False)
    args = parser.parse_args()
    if min(args.stitches) < 2 or (args.cpu_time and args.device != "cpu"):
        parser.error("a step has two stitches or more, and --cpu-time is for a CPU")
    trainer = Trainer(args, (0, 1))
    trainer.warm_up()
    backbone, steps = trainer.backbone, Steps(trainer, args.cpu_time)
    draws, counted, costs = backbone.sampler(), backbone.cost_model(), backbone.costs()
    heads = trainer.flops[0] - costs[0].flops
    print(
        f"widths {args.widths}, depths {args.depths}, {args.size} x {args.size}, batch {args.batch}; "
        f"{device_name(torch.device(args.device))}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{'CPU' if args.cpu_time else 'wall'} time, medians of {args.rounds} rounds of seed 0\n\n"
        "| stitches | FLOPs, tree over apart | time, tree over apart | time over FLOPs |\n|---|---|---|---|"
    )
    for k in args.stitches:
        flops, times = [], []
        for round_ in range(args.rounds):
            sampler, first = replace(draws, stitches_per_step=k), round_ * k
            stitches = [backbone.space[sampler.draw(number)] for number in range(first, first + k)]
            apart = sum(counted.tree([stitch], backbone.out_indices).flops + heads for stitch in stitches)
            flops.append((counted.tree(stitches, backbone.out_indices).flops + k * heads) / apart)
            if round_ % 2:
                together, separate = steps.tree(sampler, first), steps.apart(stitches)
            else:
                separate, together = steps.apart(stitches), steps.tree(sampler, first)
            times.append(together / separate)
        excess = statistics.median(one / other for one, other in zip(times, flops, strict=True))
        print(f"| {k} | {statistics.median(flops):.3f} | {statistics.median(times):.3f} | {excess:.3f} |", flush=True)


if __name__ == "__main__":
    main()
