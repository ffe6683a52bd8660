"""Latencies of stitches, and how they are added to a file of operating points."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmsnnet.errors import SettingError
from mmsnnet.evaluation.operating_points import OperatingPoint, OperatingPoints
from mmsnnet.files.writing import check_output
from mmsnnet.stitching import Stitch

Conditions = Mapping[str, str | int | bool | None]
# Conditions that do not matter when two measurements are compared.
INCIDENTAL = ("warmup", "repeats", "date")


@dataclass(frozen=True)
class StitchLatency:
    """What was measured of one stitch.

    Args:
        stitch: the stitch.
        times_ms: of a batch, in milliseconds, one for each repeat; by batch size, ascending.
        peak_memory: bytes of GPU memory in use at most with the largest batch, which has to fit; None on a CPU. It
            counts the batch, the activations and the weights of all stitches: a model that can change its stitch at any
            time.
    """

    stitch: Stitch
    times_ms: Mapping[int, tuple[float, ...]] = field(hash=False)
    peak_memory: int | None = None

    @property
    def latencies_ms(self) -> dict[int, float]:
        """The median time of a batch in milliseconds, by batch size."""
        return {size: float(np.median(times)) for size, times in self.times_ms.items()}

    @property
    def latency_ms(self) -> float:
        """The median time of the smallest batch, in milliseconds."""
        return next(iter(self.latencies_ms.values()))

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """The first and the third quartile of the times of the smallest batch."""
        first, third = np.quantile(next(iter(self.times_ms.values())), (0.25, 0.75))
        return float(first), float(third)

    @property
    def throughputs(self) -> dict[int, float]:
        """Images per second, one batch after the other; by batch size."""
        return {size: 1000 * size / latency for size, latency in self.latencies_ms.items()}

    @property
    def throughput(self) -> float:
        """Images per second in batches of the smallest size."""
        return next(iter(self.throughputs.values()))


@dataclass(frozen=True)
class Benchmark:
    """The latencies that :func:`mmsnnet.apis.benchmark_stitches` measured.

    Args:
        input_shape: height and width of the images.
        conditions: how and on what, as the file of operating points has them under ``benchmark``.
        latencies: one for each stitch.
        notes: remarks for a reader of the figures.
    """

    input_shape: tuple[int, int]
    conditions: Conditions
    latencies: tuple[StitchLatency, ...]
    notes: tuple[str, ...] = ()


def points_to_time(path: str | os.PathLike[str] | None, counted: OperatingPoints) -> OperatingPoints:
    """The operating points to add latencies to: those of a file, or none if there is no file.

    Args:
        path: of the file, or None.
        counted: every stitch of the model with its costs, and config and input shape.

    Raises:
        SettingError: the file has operating points of another config, input shape or model.
        OutputError: the file cannot be written.
        ValueError: the file has no operating points.
    """
    if path is not None:
        check_output(path, "--out")
    if path is None or not Path(path).exists():
        return replace(counted, points=())
    points = OperatingPoints.load(path)
    mismatch = f"{path} has other operating points, set another --out:"
    if points.config and counted.config and Path(points.config).name != Path(counted.config).name:
        raise SettingError(f"{mismatch} its config is {points.config}, not {counted.config}")
    if points.input_shape != counted.input_shape:
        raise SettingError(f"{mismatch} its input shape is {points.input_shape}, not {counted.input_shape}")
    known = {point.id: point for point in counted}
    for point in points:
        ours = known.get(point.id)
        if ours is None:
            raise SettingError(f"{mismatch} the model has no stitch {point}")
        for key in ("name", "kind", "flops", "params"):
            if getattr(point, key) != getattr(ours, key):
                raise SettingError(
                    f"{mismatch} its stitch {point} has {key} {getattr(point, key)}, the model's {getattr(ours, key)}"
                )
    return points


def check_conditions(points: OperatingPoints, measured: Iterable[int], conditions: Conditions) -> None:
    """Check that the latencies of other stitches than ``measured`` have the same conditions.

    Raises:
        SettingError: they differ, or are unknown.
    """
    measured = set(measured)
    kept = [point for point in points if point.latency_ms is not None and point.id not in measured]
    relevant = _relevant(conditions)
    known = {"backend": "torch", **_relevant(points.benchmark)}  # older files name no backend
    different = [k for k, value in relevant.items() if k not in known or known[k] != value]
    if kept and different:
        details = ", ".join(f"{k} {known.get(k, 'unknown')} instead of {relevant[k]}" for k in different)
        raise SettingError(
            f"the latencies of other stitches, such as {kept[0]}, were measured under other conditions ({details}): "
            "measure these stitches too (--stitches), or set another --out"
        )


def with_latencies(points: OperatingPoints, counted: OperatingPoints, benchmark: Benchmark) -> OperatingPoints:
    """``points`` with the latencies of a benchmark; all else is kept.

    Stitches that ``points`` lacks are added from ``counted``, without metrics.

    Raises:
        SettingError: latencies of other stitches were measured under other conditions.
    """
    check_conditions(points, (latency.stitch.id for latency in benchmark.latencies), benchmark.conditions)
    merged = {point.id: point for point in points}
    known = {point.id: point for point in counted}
    for latency in benchmark.latencies:
        id_ = latency.stitch.id
        merged[id_] = replace(
            merged.get(id_, known[id_]),
            latency_ms=latency.latency_ms,
            throughput=latency.throughput,
            peak_memory=latency.peak_memory,
            latencies_ms=latency.latencies_ms if len(latency.times_ms) > 1 else {},
        )
    ordered = tuple(merged[id_] for id_ in sorted(merged))
    return replace(points, points=ordered, benchmark=dict(benchmark.conditions))


def batch_latencies(points: OperatingPoints) -> dict[int, Mapping[int, float]]:
    """The milliseconds for a batch by its number of images, ascending, for each stitch by its id.

    A point without ``latencies_ms`` was measured at one size: ``batch_size`` of the points' ``benchmark``.

    Raises:
        ValueError: a point has no latency, or the file does not record the batch size.
    """
    latencies: dict[int, Mapping[int, float]] = {}
    for point in points:
        latency = point.cost("latency_ms")
        latencies[point.id] = point.latencies_ms or {_only_size(points, point): latency}
    return latencies


def _only_size(points: OperatingPoints, point: OperatingPoint) -> int:
    size = points.benchmark.get("batch_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(
            f"the batch size of the latency of stitch {point} is unknown (benchmark: batch_size is {size!r}): "
            "tools/analysis_tools/benchmark.py CONFIG --out FILE.json measures it again"
        )
    return size


def _relevant(conditions: Conditions) -> Conditions:
    """The conditions that two measurements have to share, with all batch sizes under ``batch_size``."""
    relevant = {key: value for key, value in conditions.items() if key not in INCIDENTAL}
    sizes = relevant.pop("batch_sizes", None)
    return relevant if sizes is None else relevant | {"batch_size": sizes}
