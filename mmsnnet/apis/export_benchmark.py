"""Latencies of the stitches of an export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import onnxruntime
import torch

from mmsnnet.apis.benchmark import BenchmarkSettings, clock_ms, device_name, time_rounds
from mmsnnet.deployment.exported_model import ExportedGraphs
from mmsnnet.deployment.graphs import IMAGES
from mmsnnet.errors import SettingError
from mmsnnet.evaluation.latencies import Benchmark, Conditions, StitchLatency
from mmsnnet.stitching import Stitch


def benchmark_export(
    graphs: ExportedGraphs,
    stitches: Sequence[Stitch],
    settings: BenchmarkSettings,
    input_shape: tuple[int, int],
    channels: int = 3,
    progress: bool = False,
) -> Benchmark:
    """Time the graphs of an export in turns, as :func:`mmsnnet.apis.benchmark_stitches` times PyTorch.

    Args:
        graphs: of the export.
        stitches: to time.
        settings: the batch size and the numbers of rounds; all else is as exported.
        input_shape: height and width of the images, which are random with a fixed seed.
        channels: of the images.
        progress: show a progress bar.

    Raises:
        SettingError: a setting is PyTorch's, or the export takes images of another size.
        MissingFileError, DataError: the export lacks a stitch, or a file is damaged.
    """
    conditions = export_conditions(graphs, settings)
    size = graphs.manifest.image_size
    if size is not None and size != input_shape:
        raise SettingError(
            f"the graphs of {graphs.folder} take images of {size[0]} x {size[1]}: set --shape {size[0]} {size[1]}"
        )
    images = torch.randn(
        settings.batch_size, channels, *input_shape, generator=torch.Generator().manual_seed(0)
    ).numpy()

    def run_of(stitch: Stitch) -> Callable[[], object]:
        session = graphs.session(graphs.manifest[stitch.name].file)
        return lambda: session.run(None, {IMAGES: images})

    runs = {stitch: run_of(stitch) for stitch in stitches}
    times = time_rounds(lambda stitch: None, runs, settings, clock_ms, progress)
    latencies = tuple(StitchLatency(stitch, tuple(times[stitch]), settings.batch_size) for stitch in stitches)
    return Benchmark(input_shape=input_shape, conditions=conditions, latencies=latencies)


def export_conditions(graphs: ExportedGraphs, settings: BenchmarkSettings) -> Conditions:
    """The conditions of :func:`benchmark_export`, as a file of operating points has them.

    Raises:
        SettingError: a setting is PyTorch's.
    """
    ours = BenchmarkSettings(batch_size=settings.batch_size, warmup=settings.warmup, repeats=settings.repeats)
    if settings != ours:
        raise SettingError(
            "an export has the precision and the memory format that it was exported with: leave out --precision, "
            "--channels-last, --compile and --cuda-graph"
        )
    return {
        "backend": "onnxruntime",
        "device": device_name(torch.device("cpu")),
        "threads": graphs.threads or torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "precision": graphs.manifest.precision,
        "batch_size": settings.batch_size,
        "warmup": settings.warmup,
        "repeats": settings.repeats,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
