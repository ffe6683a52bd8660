"""Latency, throughput and peak memory of the stitches of a model on this machine."""

from __future__ import annotations

import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from rich.console import Console
from rich.progress import track
from torch import Tensor

from mmsnnet.apis.devices import checked_device, device_name
from mmsnnet.apis.model import deployed
from mmsnnet.errors import SettingError
from mmsnnet.evaluation.latencies import Benchmark, StitchLatency
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.backbones import StitchedBackbone
from mmsnnet.stitching import Stitch

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

Run = Callable[[], object]
# A stitch and a batch size: what one run is of.
Case = tuple[Stitch, int]


@dataclass(frozen=True)
class BenchmarkSettings:
    """How stitches are timed.

    Args:
        batch_sizes: the numbers of images in a batch, each once; they are sorted.
        precision: ``'fp32'``, ``'fp16'`` or ``'bf16'``: weights and images are cast, as for deployment, without
            autocast.
        channels_last: use this memory format for weights and images.
        compile: a backend of ``torch.compile`` for each stitch; None does not compile.
        cuda_graph: replay each stitch as a CUDA graph; None does so on a GPU.
        warmup: rounds over all stitches before the measured ones.
        repeats: measured rounds.

    Raises:
        SettingError: a number is too small, or there is no such precision or backend.
    """

    batch_sizes: tuple[int, ...] = (1,)
    precision: str = "fp32"
    channels_last: bool = False
    compile: str | None = None
    cuda_graph: bool | None = None
    warmup: int = 5
    repeats: int = 20

    def __post_init__(self) -> None:
        sizes = tuple(sorted(self.batch_sizes))
        if not sizes or sizes[0] < 1 or len(set(sizes)) < len(sizes):
            listed = ",".join(map(str, self.batch_sizes)) or "none"
            raise SettingError(f"batch sizes are numbers of at least 1, each once, such as 1,2,4,8; got {listed}")
        object.__setattr__(self, "batch_sizes", sizes)
        for name in ("warmup", "repeats"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is at least 1, got {getattr(self, name)}")
        if self.precision not in PRECISIONS:
            raise SettingError(f"precision is one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.compile is not None and self.compile not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise SettingError(f"torch.compile has no backend {self.compile!r}; it has {', '.join(backends)}")

    @property
    def conditions(self) -> dict[str, str | int | bool | None]:
        """The settings as a file of operating points has them: ``batch_sizes``, a text, only if there are several."""
        settings = asdict(self)
        sizes = settings.pop("batch_sizes")
        several = {"batch_sizes": ",".join(map(str, sizes))} if len(sizes) > 1 else {}
        return {"batch_size": sizes[0]} | several | settings


def benchmark_stitches(
    model: BaseModel,
    stitches: str | Sequence[int | str] = "all",
    settings: BenchmarkSettings | None = None,
    *,
    input_shape: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Benchmark:
    """Time the deployed model at each stitch: low-rank updates merged, evaluation mode, no gradients.

    The model runs in its tensor mode, from preprocessed images to the outputs of its heads, as
    :func:`mmsnnet.models.model_costs` counts it. Resizing to the original image, box decoding and the like are not
    included. For a two-stage detector the run includes decoding and NMS of the RPN, RoIAlign, the box head on the RPN's
    proposals (their number depends on weights and images) and the mask head on the first 100.

    Each round runs every stitch once with a batch of each size, so that a drift of the machine affects all alike. A run
    is timed from an idle device until it is done, on a GPU with CUDA events. There all runs are replayed as CUDA graphs
    by default, or none of them if one cannot be captured. The peak of memory is that of the largest batch.

    Args:
        model: a copy of it is measured.
        stitches: as for :meth:`mmsnnet.stitching.StitchSpace.select`.
        settings: default: ``BenchmarkSettings()``.
        input_shape: height and width of the images, which are random with a fixed seed; default: the backbone's
            ``img_size``.
        device: a CPU or a CUDA device; default: the model's.
        progress: show a progress bar.

    Raises:
        SettingError: there is no such device, it does not support a setting, or the model does not run in the
            precision, or with the largest batch in the device's memory.
        UnknownStitchError: the space lacks one of the stitches.
    """
    settings = settings or BenchmarkSettings()
    backbone = find_stitched_backbone(model)
    chosen = backbone.space.select(stitches)
    shape = backbone.img_size if input_shape is None else input_shape
    device = _checked_device(next(model.parameters()).device if device is None else device, settings)
    # The current GPU is that of streams, events and graphs.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        options: dict[str, Any] = dict(dtype=PRECISIONS[settings.precision])
        if settings.channels_last:
            options |= dict(memory_format=torch.channels_last)
        copied = deployed(model).to(device=device, **options)
        channels = backbone.network.anchor(0).in_chans
        images = torch.randn(max(settings.batch_sizes), channels, *shape, generator=torch.Generator().manual_seed(0))
        images = images.to(device=device, **options)
        with torch.inference_mode():
            return _benchmark(copied, images, chosen, settings, before, progress)


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
    # Smaller batches are views of the largest one, so that they add nothing to its peak of memory.
    batches = {size: images[:size] for size in settings.batch_sizes}
    forwards = {size: _forward(deployed, batch) for size, batch in batches.items()}
    # A stitch follows another one, not itself at another size: its weights are not in a cache from the last run.
    runs = {
        (stitch, size): _run(forwards[size], batch, settings.compile)
        for size, batch in batches.items()
        for stitch in stitches
    }
    largest = settings.batch_sizes[-1]
    peaks, notes = {}, []
    for stitch in stitches:
        backbone.set_stitch(stitch)
        with _errors_of_settings(settings, device):
            forwards[largest](images)
        peaks[stitch] = _peak_memory(runs[stitch, largest], device, before)
    conditions = benchmark_conditions(settings, device)
    timed = runs
    if conditions["cuda_graph"]:
        timed, failure = _captured(backbone, runs)  # `runs` stays alive: the graphs use what it has compiled
        if failure is not None:
            conditions["cuda_graph"] = False
            notes.append(failure)
    if device.type != "cuda":
        notes.append("peak memory is measured on a GPU only")
    if hasattr(deployed, "roi_head"):
        notes.append("two-stage detector: the box head runs on the RPN's proposals for random images")
    time_ms = _event_ms if device.type == "cuda" else clock_ms
    times = time_rounds(backbone.set_stitch, timed, settings, time_ms, progress)
    return Benchmark(
        input_shape=shape,
        conditions=conditions,
        latencies=tuple(StitchLatency(s, times[s], peaks[s]) for s in stitches),
        notes=tuple(notes),
    )


def benchmark_conditions(settings: BenchmarkSettings, device: str | torch.device) -> dict[str, str | int | bool | None]:
    """The conditions of a benchmark, as a file of operating points has them, if CUDA graphs can be captured.

    Raises:
        SettingError: there is no such device, or it does not support a setting.
    """
    device = _checked_device(device, settings)
    return {
        "backend": "torch",
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **settings.conditions,
        "cuda_graph": device.type == "cuda" and settings.cuda_graph is not False,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _checked_device(device: str | torch.device, settings: BenchmarkSettings) -> torch.device:
    device = checked_device(device)
    if device.type == "cpu" and settings.cuda_graph:
        raise SettingError("a CUDA graph needs a GPU: leave out --cuda-graph, or set --device to a GPU")
    return device


def _forward(model: BaseModel, images: Tensor) -> Callable[[Tensor], object]:
    """The model's tensor mode, with the metadata of images that mmdet needs."""
    shape = tuple(images.shape[-2:])
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape, scale_factor=(1.0, 1.0))
    samples = [BaseDataElement(metainfo=meta) for _ in images]

    def forward(images: Tensor) -> object:
        return model(images, samples, mode="tensor")

    return forward


def _run(forward: Callable[[Tensor], object], images: Tensor, backend: str | None) -> Run:
    """A function that runs the stitch that is active at its first call."""
    if backend is not None:
        # torch.compile caches a few variants for each code object, and searches them at each call: a copy for each
        # stitch.
        copied = types.FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__, closure=forward.__closure__
        )
        forward = torch.compile(copied, backend=backend, dynamic=False)
    return lambda: forward(images)


@contextmanager
def _errors_of_settings(settings: BenchmarkSettings, device: torch.device) -> Iterator[None]:
    """Name the setting in errors: a batch may be too large, and not all operators have half precision."""
    largest, precision = settings.batch_sizes[-1], settings.precision
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingError(
            f"a batch of {largest} images does not fit in the memory of {device}: set smaller --batch-sizes"
        ) from error
    except RuntimeError as error:
        if precision == "fp32":
            raise
        reason = str(error).splitlines()[0]
        raise SettingError(
            f"the model does not run in {precision} on {device}: {reason}; use --precision fp32"
        ) from error


def _peak_memory(run: Run, device: torch.device, before: int) -> int | None:
    if device.type != "cuda":
        return None
    run()  # the first run also allocates memory for libraries and compilers
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _captured(backbone: StitchedBackbone, runs: Mapping[Case, Run]) -> tuple[dict[Case, Run], str | None]:
    """The replay of a CUDA graph for each run, and None.

    If one run cannot be captured, all stay as they are, so that all are measured alike; the second value tells why.
    """
    replays: dict[Case, Run] = {}
    # After a failed capture its stream would stay the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        # Graphs can share memory: they never run at the same time, and nothing reads their outputs.
        pool = torch.cuda.graph_pool_handle()
        for (stitch, size), run in runs.items():
            backbone.set_stitch(stitch)
            try:
                replays[stitch, size] = _capture(run, pool)
            except RuntimeError as error:
                cause: BaseException = error
                while isinstance(cause.__context__, RuntimeError):  # the first error
                    cause = cause.__context__
                reason = str(cause).splitlines()[0]
                return dict(runs), f"measured without CUDA graphs: stitch {stitch} cannot be captured: {reason}"
    return replays, None


def _capture(run: Run, pool: Any) -> Run:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    # An operation that waits for the GPU cannot be captured: this run finds it before a capture fails half-way.
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


def time_rounds(
    set_stitch: Callable[[Stitch], object],
    runs: Mapping[Case, Run],
    settings: BenchmarkSettings,
    time_ms: Callable[[Run], float],
    progress: bool,
) -> dict[Stitch, dict[int, tuple[float, ...]]]:
    """The times of each stitch in milliseconds, one for each measured round; by batch size.

    Args:
        set_stitch: called before each run.
        runs: by stitch and batch size. Each round runs all of them, in this order.
        settings: the numbers of rounds.
        time_ms: runs and times.
        progress: show a progress bar.
    """
    times: dict[Case, list[float]] = {case: [] for case in runs}
    by_stitch: dict[Stitch, dict[int, tuple[float, ...]]] = {stitch: {} for stitch, _ in runs}
    rounds = [(index, case) for index in range(settings.warmup + settings.repeats) for case in runs]
    title, console = f"{len(by_stitch)} stitches", Console(stderr=True)
    for index, case in track(rounds, title, console=console, transient=True, disable=not progress):
        set_stitch(case[0])
        elapsed = time_ms(runs[case])
        if index >= settings.warmup:
            times[case].append(elapsed)
    for (stitch, size), elapsed_ms in times.items():
        by_stitch[stitch][size] = tuple(elapsed_ms)
    return by_stitch


def clock_ms(run: Run) -> float:
    """The time of a run in milliseconds, by the clock."""
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
