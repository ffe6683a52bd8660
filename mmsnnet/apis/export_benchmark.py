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
        settings: the batch sizes and the numbers of rounds; all else is as exported.
        input_shape: height and width of the images, which are random with a fixed seed.
        channels: of the images.
        progress: show a progress bar.

    Raises:
        SettingError: a setting is PyTorch's, or the export takes images of another size or batches of another size.
        MissingFileError, DataError: the export lacks a stitch, or a file is damaged.
    """
    conditions = export_conditions(graphs, settings)
    size = graphs.manifest.image_size
    if size is not None and size != input_shape:
        raise SettingError(
            f"the graphs of {graphs.folder} take images of {size[0]} x {size[1]}: set --shape {size[0]} {size[1]}"
        )
    images = torch.randn(
        max(settings.batch_sizes), channels, *input_shape, generator=torch.Generator().manual_seed(0)
    ).numpy()

    def run_of(stitch: Stitch, size: int) -> Callable[[], object]:
        session, batch = graphs.session(graphs.manifest[stitch.name].file), images[:size]
        return lambda: session.run(None, {IMAGES: batch})

    for stitch in stitches:
        _check_batch_sizes(graphs, graphs.manifest[stitch.name].file, settings)
    runs = {(stitch, size): run_of(stitch, size) for size in settings.batch_sizes for stitch in stitches}
    times = time_rounds(lambda stitch: None, runs, settings, clock_ms, progress)
    latencies = tuple(StitchLatency(stitch, times[stitch]) for stitch in stitches)
    return Benchmark(input_shape=input_shape, conditions=conditions, latencies=latencies)


def _check_batch_sizes(graphs: ExportedGraphs, file: str, settings: BenchmarkSettings) -> None:
    """Check that a graph takes the batches. ONNX has the size as a number only if it is fixed."""
    fixed = next(one.shape[0] for one in graphs.session(file).get_inputs() if one.name == IMAGES)
    if isinstance(fixed, int) and settings.batch_sizes != (fixed,):
        raise SettingError(
            f"{graphs.folder / file} takes batches of {fixed} alone: set --batch-sizes {fixed}, or export again with "
            "tools/deployment/export.py, whose graphs take batches of any size"
        )


def export_conditions(graphs: ExportedGraphs, settings: BenchmarkSettings) -> Conditions:
    """The conditions of :func:`benchmark_export`, as a file of operating points has them.

    Raises:
        SettingError: a setting is PyTorch's.
    """
    ours = BenchmarkSettings(settings.batch_sizes, warmup=settings.warmup, repeats=settings.repeats)
    if settings != ours:
        raise SettingError(
            "an export has the precision and the memory format that it was exported with: leave out --precision, "
            "--channels-last, --compile and --cuda-graph"
        )
    of_settings = settings.conditions
    return {
        "backend": "onnxruntime",
        "device": device_name(torch.device("cpu")),
        "threads": graphs.threads or torch.get_num_threads(),
        "onnxruntime": onnxruntime.__version__,
        "precision": graphs.manifest.precision,
        **{key: of_settings[key] for key in ("batch_size", "batch_sizes", "warmup", "repeats") if key in of_settings},
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
