"""Times every stitch of a model on the device at hand, and adds what was measured to a file of operating points."""

from __future__ import annotations

import copy
import os
import platform
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmsnnet.evaluation import OperatingPoints
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.backbones import StitchedBackbone
from mmsnnet.stitching import Stitch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What says nothing of whether two measurements can be compared.
INCIDENTAL = ("warmup", "repeats", "date")

Run = Callable[[], object]


@dataclass(frozen=True)
class BenchmarkSettings:
    """How stitches are timed.

    Args:
        batch_size: the images in a batch.
        precision: of weights, images and all between, ``'fp32'``, ``'fp16'`` or ``'bf16'``: they are cast, as for
            deployment, and not left to autocast.
        channels_last: use the memory format of this name for weights and images.
        compile: the backend of ``torch.compile`` to compile each stitch with, None for none.
        cuda_graph: replay each stitch as a CUDA graph; None for yes on a GPU.
        warmup: rounds over all stitches before those that count.
        repeats: rounds that count.

    Raises:
        ValueError: a number is too small, or there is no such precision or backend.
    """

    batch_size: int = 1
    precision: str = "fp32"
    channels_last: bool = False
    compile: str | None = None
    cuda_graph: bool | None = None
    warmup: int = 5
    repeats: int = 20

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("warmup", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {least} or more, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.compile is not None and self.compile not in torch.compiler.list_backends(exclude_tags=()):
            backends = ", ".join(torch.compiler.list_backends(exclude_tags=()))
            raise ValueError(f"torch.compile has no backend {self.compile!r}; it has {backends}")


@dataclass(frozen=True)
class StitchLatency:
    """What was measured of one stitch: the milliseconds for a batch of ``batch_size`` images, one number for each
    repeat, and the most memory of the GPU in use while it ran (None on a CPU, where it is not measured). The memory, in
    bytes, is that of the batch, of what is computed from it, and of the weights of all stitches: of a model that can
    change over at any time.
    """

    stitch: Stitch
    times_ms: tuple[float, ...]
    batch_size: int = 1
    peak_memory: int | None = None

    @property
    def latency_ms(self) -> float:
        """The median time for a batch, in milliseconds."""
        return float(np.median(self.times_ms))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """Between them lies the middle half of the times."""
        first, third = np.quantile(self.times_ms, (0.25, 0.75))
        return float(first), float(third)

    @property
    def throughput(self) -> float:
        """Images per second, one batch after the other."""
        return 1000 * self.batch_size / self.latency_ms


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark_stitches` measured. ``conditions`` say how and on what, by name, as the file of operating
    points has it under ``benchmark``; ``notes`` what a reader of the figures should know."""

    input_shape: tuple[int, int]
    conditions: Mapping[str, str | int | bool | None]
    latencies: tuple[StitchLatency, ...]
    notes: tuple[str, ...] = ()


def benchmark_stitches(
    model: BaseModel,
    stitches: str | Sequence[int | str] = "all",
    settings: BenchmarkSettings | None = None,
    *,
    input_shape: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Benchmark:
    """Times the whole model at each stitch as it is deployed: low-rank updates merged, evaluation mode, no gradients.

    What runs is the model's tensor mode, from preprocessed images to what its heads put out, as
    :func:`mmsnnet.models.model_costs` counts it; scaling to the size of the original image, decoding of boxes and the
    like come on top. Of a two-stage detector that includes decoding and NMS of its RPN, RoIAlign, the box head on the
    proposals that the RPN leaves (their number depends on weights and images) and the mask head on the first 100.

    Stitches take turns: each round runs each of them once, so that a drift of the machine hits all alike. A run is
    timed from the moment when the device has nothing else to do until it is done: with CUDA events on a GPU, where,
    unless the settings say otherwise, all stitches are replayed as CUDA graphs or, if one of them cannot be captured,
    none is.

    Args:
        model: is left as it is; a copy of it is measured.
        stitches: as of :meth:`mmsnnet.stitching.StitchSpace.select`.
        settings: the defaults of :class:`BenchmarkSettings` if None.
        input_shape: height and width of the images, by default the backbone's ``img_size``. They are the same random
            ones each time.
        device: where to measure, a CPU or a CUDA device; by default where the model is.
        progress: show it on the console.

    Raises:
        ValueError: there is no such device, the settings ask for what it does not do, or the model does not run in the
            precision.
        UnknownStitchError: the space lacks one of the stitches.
    """
    settings = settings or BenchmarkSettings()
    backbone = find_stitched_backbone(model)
    chosen = backbone.space.select(stitches)
    shape = backbone.img_size if input_shape is None else input_shape
    device = _checked_device(next(model.parameters()).device if device is None else device, settings)
    with _current(device):
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        kind = dict(dtype=PRECISIONS[settings.precision])
        if settings.channels_last:
            kind |= dict(memory_format=torch.channels_last)
        deployed = _deployed(model).to(device=device, **kind)
        channels = backbone.network.anchor(0).in_chans
        images = torch.randn(settings.batch_size, channels, *shape, generator=torch.Generator().manual_seed(0))
        images = images.to(device=device, **kind)
        with torch.inference_mode():
            return _benchmark(deployed, images, chosen, settings, before, progress)


def _benchmark(
    deployed: BaseModel,
    images: Tensor,
    stitches: Sequence[Stitch],
    settings: BenchmarkSettings,
    before: int,
    progress: bool,
) -> Benchmark:
    device, shape = images.device, (images.shape[-2], images.shape[-1])
    backbone = find_stitched_backbone(deployed)
    forward = _forward(deployed, images)
    runs = {stitch: _run(forward, images, settings.compile) for stitch in stitches}
    peaks, notes = {}, []
    for stitch in stitches:
        backbone.set_stitch(stitch)
        with _said_of_precision(settings.precision, device):
            forward(images)
        peaks[stitch] = _peak_memory(runs[stitch], device, before)
    conditions = benchmark_conditions(settings, device)
    timed = runs
    if conditions["cuda_graph"]:
        timed, failure = _captured(backbone, runs)  # the runs live on: graphs read what they have compiled
        if failure is not None:
            conditions["cuda_graph"] = False
            notes.append(failure)
    if device.type != "cuda":
        notes.append("peak memory is measured on a GPU only")
    if hasattr(deployed, "roi_head"):
        notes.append("a two-stage detector: the box head runs on the proposals that the RPN leaves of a random image")
    times = _in_turns(backbone, timed, settings, _event_ms if device.type == "cuda" else _clock_ms, progress)
    return Benchmark(
        input_shape=shape,
        conditions=conditions,
        latencies=tuple(StitchLatency(s, tuple(times[s]), settings.batch_size, peaks[s]) for s in stitches),
        notes=tuple(notes),
    )


def benchmark_conditions(settings: BenchmarkSettings, device: str | torch.device) -> dict[str, str | int | bool | None]:
    """What a file of operating points says of a benchmark, provided that CUDA graphs can be captured.

    Raises:
        ValueError: there is no such device, or the settings ask for what it does not do.
    """
    device = _checked_device(device, settings)
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **asdict(settings),
        "cuda_graph": device.type == "cuda" and settings.cuda_graph is not False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """What a device is called by its maker."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    information = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", information.read_text(), re.M) if information.exists() else None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _checked_device(device: str | torch.device, settings: BenchmarkSettings) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is none: {str(error).splitlines()[0]}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"stitches are timed on a CPU or a CUDA device, got {str(device)!r}")
    if device.type == "cpu" and settings.cuda_graph:
        raise ValueError("a CUDA graph needs a GPU, and the device is the CPU: leave out --cuda-graph, or set --device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {str(device)!r}: PyTorch finds {torch.cuda.device_count()} GPUs")
    return device


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Makes a GPU the one whose streams events and graphs are of."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def _deployed(model: BaseModel) -> BaseModel:
    """A copy of a model with its low-rank updates merged, in evaluation mode."""
    network = find_stitched_backbone(model).network
    return copy.deepcopy(model, {id(network): network.merged()}).eval()


def _forward(model: BaseModel, images: Tensor) -> Callable[[Tensor], object]:
    """A model's tensor mode, with what mmdet's needs to know of each image."""
    shape = tuple(images.shape[-2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    samples = [BaseDataElement(metainfo=meta) for _ in images]

    def forward(images: Tensor) -> object:
        return model(images, samples, mode="tensor")

    return forward


def _run(forward: Callable[[Tensor], object], images: Tensor, backend: str | None) -> Run:
    """What runs one stitch, the one that is active when it is first called."""
    if backend is not None:
        # torch.compile keeps what it compiled with the code object, few variants of it, and looks through them at each
        # call: so each stitch has a code object of its own.
        own = types.FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, closure=forward.__closure__
        )
        forward = torch.compile(own, backend=backend, dynamic=False)
    return lambda: forward(images)


@contextmanager
def _said_of_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Says of what fails in half precision that this may be why: not every operator of the toolboxes has it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if precision == "fp32":
            raise
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the model does not run in {precision} on {device}: {reason}; use --precision fp32"
        ) from error


def _peak_memory(run: Run, device: torch.device, before: int) -> int | None:
    if device.type != "cuda":
        return None
    run()  # what libraries and compilers allocate for themselves at a first run is there, or gone, at the next
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _captured(backbone: StitchedBackbone, runs: Mapping[Stitch, Run]) -> tuple[dict[Stitch, Run], str | None]:
    """Each run as the replay of a CUDA graph and None; or, if one cannot be captured, the runs as they are, so that all
    are measured alike, and why."""
    replays: dict[Stitch, Run] = {}
    # A failed capture leaves its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        # Graphs may share memory, because they never run at the same time and nobody reads what they put out.
        pool = torch.cuda.graph_pool_handle()
        for stitch, run in runs.items():
            backbone.set_stitch(stitch)
            try:
                replays[stitch] = _capture(run, pool)
            except RuntimeError as error:
                cause: BaseException = error
                while isinstance(cause.__context__, RuntimeError):  # what went wrong first
                    cause = cause.__context__
                reason = str(cause).splitlines()[0]
                return dict(runs), f"measured without CUDA graphs: capture fails at stitch {stitch}: {reason}"
    return replays, None


def _capture(run: Run, pool: Any) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    # What waits for the GPU cannot be captured. It is better found before a capture that fails half-way.
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def _in_turns(
    backbone: StitchedBackbone,
    runs: Mapping[Stitch, Run],
    settings: BenchmarkSettings,
    time_ms: Callable[[Run], float],
    progress: bool,
) -> dict[Stitch, list[float]]:
    """The times of each stitch, in milliseconds, one for each round that counts."""
    times: dict[Stitch, list[float]] = {stitch: [] for stitch in runs}
    rounds = [(index, stitch) for index in range(settings.warmup + settings.repeats) for stitch in runs]
    console = Console(stderr=True)
    for index, stitch in track(rounds, f"{len(runs)} stitches", console=console, transient=True, disable=not progress):
        backbone.set_stitch(stitch)
        elapsed = time_ms(runs[stitch])
        if index >= settings.warmup:
            times[stitch].append(elapsed)
    return times


def _clock_ms(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - start)


def _event_ms(run: Run) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def points_to_time(path: str | os.PathLike[str] | None, described: OperatingPoints) -> OperatingPoints:
    """The operating points that latencies are to be added to: those in a file, if there is one, or else ``described``
    without its points.

    Args:
        path: of the file, which need not exist; or None.
        described: every stitch of the model with its costs, and config and input shape.

    Raises:
        ValueError: the file is none of operating points, or is of another config, input shape or model.
    """
    if path is None or not Path(path).exists():
        return replace(described, points=())
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file")
    found = OperatingPoints.load(path)
    other = f"{path} is left as it is, give another --out:"
    if None not in (found.config, described.config) and Path(found.config).name != Path(described.config).name:
        raise ValueError(f"{other} it is of config {found.config}, not {described.config}")
    if found.input_shape != described.input_shape:
        raise ValueError(f"{other} it is of input shape {found.input_shape}, not {described.input_shape}")
    known = {point.id: point for point in described}
    for point in found:
        ours = known.get(point.id)
        for key in ("name", "kind", "flops", "params"):
            if ours is None or getattr(point, key) != getattr(ours, key):
                has = "none with this id" if ours is None else f"{key} {getattr(ours, key)}"
                raise ValueError(f"{other} its stitch {point} has {key} {getattr(point, key)}, the model's {has}")
    return found


def check_conditions(
    points: OperatingPoints, measured: Iterable[int], conditions: Mapping[str, str | int | bool | None]
) -> None:
    """Sees to it that latencies that stay, those of other stitches than ``measured``, were measured as these are.

    Raises:
        ValueError: they were not, or nothing says how.
    """
    measured = set(measured)
    staying = [point for point in points if point.latency_ms is not None and point.id not in measured]
    wanted = {key: value for key, value in conditions.items() if key not in INCIDENTAL}
    others = [key for key, value in wanted.items() if key not in points.benchmark or points.benchmark[key] != value]
    if staying and others:
        found = ", ".join(f"{key} {points.benchmark.get(key, 'unknown')} instead of {wanted[key]}" for key in others)
        raise ValueError(
            f"stitches that are not measured now, {staying[0]} for one, would keep latencies measured otherwise "
            f"({found}): measure them too (--stitches), or give another --out"
        )


def with_latencies(points: OperatingPoints, described: OperatingPoints, benchmark: Benchmark) -> OperatingPoints:
    """``points`` with what a benchmark measured, by id; stitches that were not among them are added without metrics.
    All else stays. ``described`` as of :func:`points_to_time`.

    Raises:
        ValueError: latencies that stay were measured otherwise.
    """
    check_conditions(points, (latency.stitch.id for latency in benchmark.latencies), benchmark.conditions)
    merged = {point.id: point for point in points}
    fresh = {point.id: point for point in described}
    for latency in benchmark.latencies:
        id_ = latency.stitch.id
        merged[id_] = replace(
            merged.get(id_, fresh[id_]),
            latency_ms=latency.latency_ms,
            throughput=latency.throughput,
            peak_memory=latency.peak_memory,
        )
    ordered = tuple(merged[id_] for id_ in sorted(merged))
    return replace(points, points=ordered, benchmark=dict(benchmark.conditions))
