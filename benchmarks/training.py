"""Training a stitched model and each of its anchors alone, side by side.

mmseg segmentors with the same head do real steps (mmengine's ``train_step``: forward, losses, backward, optimizer) on
random images. An anchor alone is a backbone of one anchor. Each round does one step of each anchor and one of the
stitched model, which draws its stitches as in training, so that a drift of the machine affects all alike.

The expected time of a stitched step is the anchors' times of the same round, interpolated linearly in FLOPs (with
heads) for the drawn stitch.

Memory is measured in one new process for each model: on a GPU the maximum of allocated memory, with weights and
optimizer state; on a CPU the maximum of resident memory, less the resident memory before the model is built.

    python benchmarks/training.py [--widths 192 384] [--depths 12 24] [--size 128] [--batch 2] [--rounds 60]
        [--device cpu|cuda] [--precision fp32|fp16|bf16] [--compile [BACKEND]] [--with-cp] [--optimizer SGD|AdamW]
        [--fused] [--threads N] [--seed 0] [--no-memory]
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.structures import PixelData
from rich.console import Console
from rich.table import Table

from mmsnnet.apis.benchmark import device_name
from mmsnnet.models import model_costs
from mmsnnet.stitching import Stitch, StitchSampler

CLASSES = 8
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HEADINGS = ("model", "stitch", "steps", "GFLOPs", "time", "to anchors", "gradients", "memory")


class Trainer:
    """A segmentor with one or several anchors, its optimizer and a batch, on the device."""

    def __init__(self, args: argparse.Namespace, anchors: Sequence[int]) -> None:
        self.device = torch.device(args.device)
        self.precision = args.precision
        torch.manual_seed(args.seed)
        self.model = self._segmentor(args, anchors).to(self.device).train()
        self.backbone = self.model.backbone
        for layer in self.backbone.network.layers.values():
            layer.set_base(layer.weight, layer.bias)
        self.flops = {id_: cost.flops for id_, cost in model_costs(self.model).items()}
        least, most = min(self.flops.values()), max(self.flops.values())
        self.backbone.flops_step = (most - least) / 32 or 1  # about as many bins as the published anchors have
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        settings = dict(momentum=0.9) if args.optimizer == "SGD" else {}
        optimizer = getattr(torch.optim, args.optimizer)(parameters, lr=1e-5, fused=args.fused, **settings)
        if self.precision == "fp32" or self.device.type == "cpu":
            self.wrapper = OptimWrapper(optimizer)
        else:
            self.wrapper = AmpOptimWrapper(optimizer=optimizer, dtype=DTYPES[self.precision])
        self.gradients = 0
        optimizer.register_step_pre_hook(lambda *_: self._count_gradients(parameters))
        self.batch = self._batch(args)

    def _segmentor(self, args: argparse.Namespace, anchors: Sequence[int]) -> Any:
        from mmseg.registry import MODELS

        configs = [
            dict(
                model="deit3_small_patch16_224",
                embed_dim=args.widths[index],
                depth=args.depths[index],
                num_heads=args.widths[index] // 32,
            )
            for index in anchors
        ]
        backbone = dict(type="mmsnnet.StitchedViT", anchors=configs, img_size=args.size, seed=args.seed)
        if args.compile is not None:
            backbone["compile"] = dict(backend=args.compile)
        head = dict(type="SETRUPHead", in_channels=args.widths[anchors[-1]], channels=64, num_classes=CLASSES)
        head |= dict(num_convs=1, up_scale=4, kernel_size=1, norm_cfg=dict(type="BN"), align_corners=False)
        return MODELS.build(
            dict(
                type="mmseg.EncoderDecoder",
                data_preprocessor=dict(
                    type="mmseg.SegDataPreProcessor",
                    mean=[127.5] * 3,
                    std=[60.0] * 3,
                    size=(args.size, args.size),
                    seg_pad_val=255,
                ),
                backbone=backbone | dict(with_cp=args.with_cp),
                decode_head=head,
                test_cfg=dict(mode="whole"),
            )
        )

    def _batch(self, args: argparse.Namespace) -> dict[str, list[Any]]:
        from mmseg.structures import SegDataSample

        generator = torch.Generator().manual_seed(args.seed)
        shape = args.size, args.size
        inputs, samples = [], []
        for _ in range(args.batch):
            inputs.append(torch.randint(256, (3, *shape), generator=generator, dtype=torch.uint8).to(self.device))
            labels = torch.randint(CLASSES, (1, *shape), generator=generator).to(self.device)
            sample = SegDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, pad_shape=shape))
            samples.append(sample.set_data(dict(gt_sem_seg=PixelData(data=labels))) or sample)
        return dict(inputs=inputs, data_samples=samples)

    def _count_gradients(self, parameters: Iterable[torch.Tensor]) -> None:
        self.gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def _autocast(self) -> AbstractContextManager[None]:
        """Autocast on a CPU; mmengine's AmpOptimWrapper does it on a GPU only."""
        if self.precision == "fp32" or self.device.type != "cpu":
            return nullcontext()
        return torch.autocast("cpu", dtype=DTYPES[self.precision])

    def step(self) -> float:
        """The seconds of one step, from an idle device until it is done."""
        self._synchronize()
        start = time.perf_counter()
        with self._autocast():
            self.model.train_step(self.batch, self.wrapper)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def one_of_each_kind(self) -> list[Stitch]:
        """The middle stitch of each kind."""
        kinds: dict[str, list[Stitch]] = {}
        for stitch in self.backbone.space:
            kinds.setdefault(stitch.kind, []).append(stitch)
        return [stitches[len(stitches) // 2] for stitches in kinds.values()]

    def warm_up(self) -> None:
        """Run each kind of stitch, to create optimizer state, memory and compiled code."""
        for _ in range(2):
            for stitch in self.one_of_each_kind():
                self.backbone._sampler = StitchSampler(((stitch.id,),))
                self.step()
        self.backbone._sampler, self.backbone.draws = None, 0


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` the maximum so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_memory(args: argparse.Namespace, anchors: Sequence[int]) -> int:
    """The maximum of memory for training one model with all kinds of stitches."""
    torch.set_num_threads(args.threads)
    cuda = args.device == "cuda"
    before = 0 if cuda else resident("VmRSS")
    Trainer(args, anchors).warm_up()
    return torch.cuda.max_memory_allocated() if cuda else resident("VmHWM") - before


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs=2, type=int, default=[192, 384])
    parser.add_argument("--depths", nargs=2, type=int, default=[12, 24])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp32")
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND")
    parser.add_argument("--with-cp", action="store_true")
    parser.add_argument("--optimizer", choices=["SGD", "AdamW"], default="SGD")
    parser.add_argument("--fused", action="store_true", help="the fused kernel, of AdamW")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.device == "cpu" and args.precision == "fp16":
        parser.error("autocast on a CPU is for bf16")
    if args.fused and args.optimizer == "SGD":
        parser.error("torch's fused SGD fails where parameters get their first gradient in different steps")
    torch.set_num_threads(args.threads)
    chosen = {"small anchor alone": (0,), "large anchor alone": (1,), "stitched": (0, 1)}
    memory: dict[str, int | None] = dict.fromkeys(chosen)
    if args.memory:
        for name, anchors in chosen.items():  # a new process each: memory that one has freed would serve the next
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                memory[name] = pool.apply(peak_memory, (args, anchors))
    trainers = {name: Trainer(args, anchors) for name, anchors in chosen.items()}
    small, large, stitched = trainers.values()
    for trainer in trainers.values():
        trainer.warm_up()

    times: dict[str, list[float]] = {name: [] for name in trainers}
    drawn: list[Stitch] = []
    gradients: list[int] = []
    gc.collect()
    order = list(trainers)
    for round_ in range(args.rounds):
        for name in order[round_ % 3 :] + order[: round_ % 3]:
            times[name].append(trainers[name].step())
        drawn.append(stitched.backbone.drawn)
        gradients.append(stitched.gradients)

    (least,), (most,) = small.flops.values(), large.flops.values()
    expected = [
        fast + (slow - fast) * (stitched.flops[stitch.id] - least) / (most - least)
        for fast, slow, stitch in zip(*list(times.values())[:2], drawn, strict=True)
    ]
    took = times["stitched"]
    rows = []
    for name, trainer in list(trainers.items())[:2]:
        cost = next(iter(trainer.flops.values()))
        rows.append((name, "", args.rounds, cost, times[name], None, trainer.gradients, memory[name]))
    cost = statistics.mean(stitched.flops[stitch.id] for stitch in drawn)
    ratio, held = sum(took) / sum(expected), statistics.mean(gradients)
    rows.append(("stitched", "as drawn", args.rounds, cost, took, ratio, held, memory["stitched"]))
    for kind in dict.fromkeys(stitch.kind for stitch in stitched.backbone.space):
        drawn_of_kind = [index for index, stitch in enumerate(drawn) if stitch.kind == kind]
        costs = [stitched.flops[drawn[index].id] for index in drawn_of_kind]
        ratio = statistics.median(took[index] / expected[index] for index in drawn_of_kind) if drawn_of_kind else None
        cost = statistics.mean(costs) if drawn_of_kind else None
        held = statistics.mean(gradients[index] for index in drawn_of_kind) if drawn_of_kind else None
        rows.append(("", kind, len(drawn_of_kind), cost, [took[index] for index in drawn_of_kind], ratio, held, None))
    report(args, rows)

    median = statistics.median(one / other for one, other in zip(took, expected, strict=True))
    print(
        f"{args.rounds} stitched steps took {sum(took):.2f} s; the anchors' times of the same rounds, interpolated in "
        f"FLOPs for the stitches drawn, make {sum(expected):.2f} s: ratio {sum(took) / sum(expected):.3f} (median of "
        f"the rounds {median:.3f}). At most 1.05 is wanted."
    )


def report(args: argparse.Namespace, rows: Sequence[tuple[Any, ...]]) -> None:
    """Print the results as a table, then in Markdown."""
    cells = [_cells(*row) for row in rows]
    machine = f"{device_name(torch.device(args.device))}, {args.threads} threads, torch {torch.__version__}"
    described = (
        f"widths {args.widths}, depths {args.depths}, {args.size} x {args.size}, batch {args.batch}, {args.precision}, "
        f"{args.optimizer}{' fused' if args.fused else ''}, compile {args.compile or 'off'}, with_cp {args.with_cp}, "
        f"seed {args.seed}; {machine}; medians of {args.rounds} rounds"
    )
    table = Table(title=described)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for row in cells:
        table.add_row(*row)
    Console(width=120).print(table)
    print(f"\n{described}\n\n| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for row in cells:
        print(f"| {' | '.join(row)} |")
    print()


def _cells(
    model: str,
    kind: str,
    steps: int,
    flops: float | None,
    times: Sequence[float],
    ratio: float | None,
    gradients: float | None,
    memory: int | None,
) -> tuple[str, ...]:
    """A row as text: time per step in ms and steps per second, memory in MiB."""
    time_ = f"{1000 * statistics.median(times):.1f} ms" if times else ""
    if not kind or kind == "as drawn":
        time_ += f", {len(times) / sum(times):.2f}/s"
    return (
        model,
        kind,
        str(steps),
        "" if flops is None else f"{flops / 1e9:.2f}",
        time_,
        "" if ratio is None else f"{ratio:.3f}",
        "" if gradients is None else f"{gradients / 2**20:.1f} MiB",
        "" if memory is None else f"{memory / 2**20:.0f} MiB",
    )


if __name__ == "__main__":
    main()
