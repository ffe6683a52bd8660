"""The sections of ``benchmarks/gpu.py``: what each of them measures on a device.

Each section gets a :class:`Device` and returns rows. It runs in a process of its own, so it builds its own models.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmsnnet.stitching import (
    Anchor,
    PrefixPlan,
    SharedPrefixes,
    Stitch,
    StitchedNetwork,
    StitchSpace,
    create_anchor,
    prefix_order,
)

SMALL, LARGE = "deit3_small_patch16_224", "deit3_large_patch16_224"
TINY = {SMALL: dict(embed_dim=32, depth=2, num_heads=2), LARGE: dict(embed_dim=48, depth=4, num_heads=3)}

Step = Callable[[], object]


class NeedsGPUError(Exception):
    """A section measures what only a GPU has."""


@dataclass(frozen=True)
class Row:
    """One measured value.

    Attributes:
        case: what was measured.
        value: the median, in ``unit``.
        ratio: the value divided by the value of the case ``to``, which ran in turns with it.
        note: what a reader needs beside the value.
    """

    case: str
    value: float
    unit: str = "ms"
    ratio: float | None = None
    to: str = ""
    note: str = ""


@dataclass(frozen=True)
class Device:
    """The device of a section, the size of its models, and the time that it has.

    Attributes:
        name: ``'cuda'`` or ``'cpu'``.
        tiny: use models and images that a CPU runs in milliseconds.
        seconds: no round of a comparison begins after this time.
    """

    name: str
    tiny: bool
    seconds: float

    @property
    def is_gpu(self) -> bool:
        return self.name == "cuda"

    def require_gpu(self) -> None:
        if not self.is_gpu:
            raise NeedsGPUError("needs a GPU")

    def anchor(self, model: str, size: int, **options: Any) -> Anchor:
        """An anchor with random weights."""
        with torch.device(self.name):
            return create_anchor(model, self.side(size), **(TINY[model] if self.tiny else {}), **options)

    def network(self, size: int = 224, with_cp: bool = False) -> StitchedNetwork:
        """DeiT III S and L with classifiers, stitched, with random weights."""
        anchors = [self.anchor(model, size, classifier=True) for model in (SMALL, LARGE)]
        with torch.device(self.name):
            space = StitchSpace.two_way([anchor.stages for anchor in anchors])
            network = StitchedNetwork(anchors, space, with_cp=with_cp)
        for key in space.layers:
            layer = network.layer(key)
            layer.set_base(layer.weight, layer.bias)
        return network

    def images(self, batch: int, size: int = 224, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.batch(batch), 3, self.side(size), self.side(size), device=self.name, dtype=dtype)

    def side(self, size: int) -> int:
        return 32 if self.tiny else size

    def batch(self, batch: int) -> int:
        return min(batch, 2) if self.tiny else batch

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def milliseconds(self, step: Step) -> float:
        """The time of one step, from an idle device until the device is idle again."""
        self.synchronize()
        start = time.perf_counter()
        step()
        self.synchronize()
        return 1000 * (time.perf_counter() - start)

    def in_turns(self, cases: Mapping[str, Step], repeats: int = 20, warmup: int = 2) -> dict[str, float]:
        """The median time of each case in ms. The cases take turns, so that a drift of the machine affects all."""
        end = time.monotonic() + self.seconds
        repeats = 3 if self.tiny else repeats
        times: dict[str, list[float]] = {case: [] for case in cases}
        for _ in range(warmup):
            for step in cases.values():
                step()
        order = list(cases)
        for round_ in range(repeats):
            if round_ >= 3 and time.monotonic() > end:
                break
            for case in order if round_ % 2 else reversed(order):
                times[case].append(self.milliseconds(cases[case]))
        return {case: statistics.median(values) for case, values in times.items()}


def compared(times: Mapping[str, float], notes: Mapping[str, str] | None = None) -> list[Row]:
    """A row for each case, with its ratio to the first case."""
    first, *_ = times
    return [
        Row(case, took, "ms", None if case == first else took / times[first], "" if case == first else first, note)
        for case, took in times.items()
        for note in [(notes or {}).get(case, "")]
    ]


def flops(step: Step) -> int:
    """FLOPs of a step as torch counts them: two for each multiply-accumulate."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch misses some fused kernels
        step()
    return counter.get_total_flops()


@contextmanager
def autocast(device: Device) -> Iterator[None]:
    with torch.autocast(device.name, dtype=torch.bfloat16):
        yield


class Trainer:
    """A classifier in training with bf16 autocast and AdamW; a step has forward, backward and optimizer."""

    def __init__(self, device: Device, network: nn.Module, images: Tensor) -> None:
        self.device, self.network, self.images = device, network.train(), images
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=device.is_gpu)

    def step(self, run: Callable[[Tensor], Tensor], after_backward: Step = lambda: None) -> None:
        self.optimizer.zero_grad()
        with autocast(self.device):
            loss = run(self.images).float().square().mean()
        loss.backward()
        after_backward()
        self.optimizer.step()


def one_of_each_kind(space: StitchSpace) -> list[Stitch]:
    """The middle stitch of each kind."""
    kinds: dict[str, list[Stitch]] = {}
    for stitch in space:
        kinds.setdefault(stitch.kind, []).append(stitch)
    return [stitches[len(stitches) // 2] for stitches in kinds.values()]


@torch.inference_mode()
def forward(device: Device) -> list[Row]:
    """bf16 forward of S and L against the device's matrix product, and against timm alone."""
    network = device.network().eval().to(torch.bfloat16)
    images = device.images(128, dtype=torch.bfloat16)
    side = 64 if device.tiny else 8192
    left, right = torch.randn(2, side, side, device=device.name, dtype=torch.bfloat16)
    small, large = network.space.anchors
    model = network.anchor(1).model
    cases: dict[str, Step] = {
        f"bf16 matrix product of {side}": lambda: left @ right,
        "L": lambda: network.classify(images, large),
        "L, timm's forward": lambda: model(images),
        "S": lambda: network.classify(images, small),
    }
    times = device.in_turns(cases, warmup=3)
    rates = {case: flops(step) / times[case] / 1e9 for case, step in cases.items()}
    peak = next(iter(rates.values()))
    rows = [
        Row(case, rate, "TFLOP/s", rate / peak, "matrix product", f"{times[case]:.3f} ms")
        for case, rate in rates.items()
    ]
    ratio = times["L"] / times["L, timm's forward"]
    return [*rows, Row("L, stitched over timm", times["L"], "ms", ratio, "timm's forward", f"batch {len(images)}")]


def training(device: Device) -> list[Row]:
    """A training step with bf16 autocast, with compiled blocks and without."""
    images = device.images(32)
    trainers = {}
    for case in ("eager", "compiled"):
        trainers[case] = Trainer(device, device.network(), images)
    compiled = trainers["compiled"].network
    compiled.compile_blocks(backend="eager" if device.tiny else "inductor")
    start = time.perf_counter()
    stitches = one_of_each_kind(compiled.space)
    for trainer in trainers.values():
        for stitch in stitches:
            trainer.step(lambda x, t=trainer, s=stitch: t.network.classify(x, s))
    device.synchronize()
    rows = [Row("first steps, compilation included", time.perf_counter() - start, "s")]
    for stitch in stitches:
        cases = {
            f"{stitch} {case}": lambda t=trainer, s=stitch: t.step(lambda x: t.network.classify(x, s))
            for case, trainer in trainers.items()
        }
        shorter = Device(device.name, device.tiny, device.seconds / len(stitches))
        rows += compared(shorter.in_turns(cases, repeats=10, warmup=1))
    return rows


@torch.inference_mode()
def evaluation(device: Device) -> list[Row]:
    """All stitches on one batch, each from the stem and with shared prefixes; the logits must be equal."""
    network = device.network().eval().to(torch.bfloat16)
    images = device.images(32, dtype=torch.bfloat16)
    order = prefix_order(network.space, network.space.stitches, None)
    plan = PrefixPlan(network.space, order, None)

    def from_stem() -> list[Tensor]:
        return [network.classify(images, stitch) for stitch in order]

    def shared() -> list[Tensor]:
        walker = SharedPrefixes(network, plan, compare=False)
        logits = []
        for stitch in order:
            walker.begin()
            logits.append(network.classify(images, stitch, walker))
        return logits

    differing = sum(not torch.equal(one, other) for one, other in zip(from_stem(), shared(), strict=True))
    cases = {"each stitch from the stem": from_stem, "shared prefixes": shared}
    note = f"{len(order)} stitches, batch {len(images)}; logits of {differing} differ"
    return compared(device.in_turns(cases, repeats=7, warmup=1), dict.fromkeys(cases, note))


def communication(device: Device) -> list[Row]:
    """A training step of one process, alone, with all-reduces of its gradients, and in DDP."""
    backend = "nccl" if device.is_gpu else "gloo"
    trainers = [Trainer(device, device.network(), device.images(32)) for _ in range(3)]
    large = trainers[0].network.space.anchors[-1]
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            alone, reducing, parallel = trainers
            ddp = nn.parallel.DistributedDataParallel(Classifier(parallel.network, large), find_unused_parameters=True)

            def all_reduce() -> None:
                for parameter in reducing.network.parameters():
                    if parameter.grad is not None:
                        dist.all_reduce(parameter.grad)

            cases = {
                "L, no communication": lambda: alone.step(Classifier(alone.network, large)),
                "L, one all-reduce for each gradient": lambda: reducing.step(
                    Classifier(reducing.network, large), all_reduce
                ),
                "L, DDP(find_unused_parameters=True)": lambda: parallel.step(ddp),
            }
            return compared(device.in_turns(cases, repeats=10), dict.fromkeys(cases, f"{backend}, one process"))
        finally:
            dist.destroy_process_group()


class Classifier(nn.Module):
    """One stitch of a network as a module of images."""

    def __init__(self, network: StitchedNetwork, stitch: Stitch) -> None:
        super().__init__()
        self.network, self.stitch = network, stitch

    def forward(self, images: Tensor) -> Tensor:
        return self.network.classify(images, self.stitch)


def position_bias(device: Device) -> list[Row]:
    """A training step of L at 512 with the learned position bias: fused, and with materialised attention."""
    images = device.images(4, 512)
    variants = {"no bias": {}, "bias, fused": dict(rel_pos_bias=True), "bias, materialised": dict(rel_pos_bias=True)}
    trainers, cases, notes = {}, {}, {}
    for case, options in variants.items():
        trainers[case] = trainer = Trainer(device, device.anchor(LARGE, 512, **options), images)
        if case == "bias, materialised":
            for block in trainer.network.model.blocks:
                block.attn.fused_attn = False
        cases[case] = lambda t=trainer: t.step(lambda x: last_tokens(t.network, x))
        notes[case] = f"{peak_memory(device, cases[case])}{kernels(device, cases[case])}"
    return compared(device.in_turns(cases, repeats=10, warmup=1), notes)


def last_tokens(anchor: Anchor, images: Tensor) -> Tensor:
    *_, (_, features) = anchor.run(anchor.stem(images))
    return features.data


def peak_memory(device: Device, step: Step) -> str:
    """The peak of allocated memory during a step, for a note. The first step creates the optimizer's state."""
    step()
    if not device.is_gpu:
        return ""
    torch.cuda.reset_peak_memory_stats()
    step()
    return f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB; "


def kernels(device: Device, step: Step) -> str:
    """The attention operators of a step, and on a GPU the kernels with the names of attention."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.is_gpu else []
    with torch.profiler.profile(activities=activities) as profile:
        step()
        device.synchronize()
    names = {event.key for event in profile.key_averages()}
    operators = sorted(name.removeprefix("aten::") for name in names if "aten::_scaled_dot_product" in name)
    marks = ("fmha", "flash", "cudnn_generated", "attention_kernel")
    found = {name.split("<")[0][:60] for name in names if "::_" not in name and any(mark in name for mark in marks)}
    return ", ".join([*operators, *sorted(found)]) or "no fused attention"


@torch.inference_mode()
def cuda_graphs(device: Device) -> list[Row]:
    """Forward passes of small batches, launched by Python and replayed as a CUDA graph."""
    device.require_gpu()
    network = device.network().eval().to(torch.bfloat16)
    rows = []
    for stitch in one_of_each_kind(network.space)[:3]:
        images = device.images(1, dtype=torch.bfloat16)
        side_stream = torch.cuda.Stream()
        with torch.cuda.stream(side_stream):
            for _ in range(3):
                network.classify(images, stitch)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = network.classify(images, stitch)
        graph.replay()
        difference = (replayed - network.classify(images, stitch)).abs().max().item()
        cases = {f"{stitch}, launched": lambda s=stitch, x=images: network.classify(x, s)}
        cases[f"{stitch}, graph"] = graph.replay
        rows += compared(device.in_turns(cases), dict.fromkeys(cases, f"batch 1; largest difference {difference:.2g}"))
    return rows


def memory(device: Device) -> list[Row]:
    """Peak memory of training steps, with weights and optimizer, with and without recomputed activations."""
    device.require_gpu()
    space = device.network().space
    rows = []
    for stitch in (*space.anchors, space.stitches[-1]):
        for with_cp in (False, True):
            trainer = Trainer(device, device.network(with_cp=with_cp), device.images(32))
            run = Classifier(trainer.network, stitch)
            trainer.step(run)
            torch.cuda.reset_peak_memory_stats()
            trainer.step(run)
            peak = torch.cuda.max_memory_allocated() / 2**30
            rows.append(Row(f"{stitch}{', with_cp' if with_cp else ''}", peak, "GiB", note="batch 32, bf16 autocast"))
            del trainer, run
            gc.collect()
    return rows


@torch.no_grad()
def export(device: Device) -> list[Row]:
    """One stitch through ``torch.export``: saved, loaded, compared and timed against the network."""
    network = device.network().eval()
    stitch = one_of_each_kind(network.space)[2]
    module, images = Classifier(network.merged(), stitch).eval(), device.images(8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stitch.pt2"
        torch.export.save(torch.export.export(module, (images,)), path)
        loaded = torch.export.load(path).module()
        size = path.stat().st_size / 2**20
    difference = (loaded(images) - module(images)).abs().max().item()
    compiled = torch.compile(loaded, backend="eager" if device.tiny else "inductor")
    cases = {
        f"{stitch}, network": lambda: module(images),
        f"{stitch}, exported": lambda: loaded(images),
        f"{stitch}, exported and compiled": lambda: compiled(images),
    }
    note = f"float32, batch {len(images)}, {size:.0f} MiB; largest difference {difference:.2g}"
    return compared(device.in_turns(cases, repeats=10), dict.fromkeys(cases, note))


Section = Callable[[Device], list[Row]]
SECTIONS: Mapping[str, Section] = {
    "forward": forward,
    "training": training,
    "evaluation": evaluation,
    "position_bias": position_bias,
    "communication": communication,
    "cuda_graphs": cuda_graphs,
    "memory": memory,
    "export": export,
}
