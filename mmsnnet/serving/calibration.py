"""The latencies of a server's own batches: the model's, and what is done around it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from mmsnnet.apis.devices import device_name
from mmsnnet.apis.images import LoadedImage
from mmsnnet.apis.predictor import Predictor
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, pareto_front
from mmsnnet.evaluation.latencies import batch_latencies
from mmsnnet.models import find_stitched_backbone
from mmsnnet.serving.policy import LatencyTable

BATCH_SIZES = (1, 2, 4, 8)
REPEATS = 3

Latencies = dict[str, dict[int, float]]


def servable(points: OperatingPoints, metric: str | None) -> tuple[OperatingPoint, ...]:
    """The stitches that a server chooses from, worst first: the front over latency, or over FLOPs without latencies."""
    timed = all(point.latency_ms is not None for point in points)
    return pareto_front(points, "latency_ms" if timed else "flops", metric)


def calibrate(
    predictor: Predictor, points: OperatingPoints, stitches: Sequence[str], deadline_ms: float, threads: int
) -> LatencyTable:
    """The time of a batch in this process, from the model's input to its data samples, by stitch and batch size.

    Latencies of the file of operating points, if they are of this device and backend, are those of the network alone.
    The worst and the best stitch are then timed here, and give the time of all else. Without such latencies all
    stitches are timed. Sizes after the first at which the worst stitch misses the deadline are left out.

    Args:
        predictor: of the server.
        points: its operating points.
        stitches: by name, worst first.
        deadline_ms: of the server.
        threads: of torch.
    """
    image = blank_image(predictor, points.input_shape)
    measured = _measured_on(predictor, points, threads)
    if measured is None:
        return LatencyTable(_time_batches(predictor, image, stitches, BATCH_SIZES, deadline_ms))
    sizes = sorted(measured[stitches[0]])
    ends = list(dict.fromkeys((stitches[0], stitches[-1])))
    timed = _time_batches(predictor, image, ends, sizes, deadline_ms)
    sizes = [size for size in sizes if size in timed[ends[0]]]
    return LatencyTable(fit({name: measured[name] for name in stitches}, timed, sizes))


def fit(network: Mapping[str, Mapping[int, float]], timed: Latencies, sizes: Sequence[int]) -> Latencies:
    """The latencies of all stitches, from those of the network and the measured ones of a few.

    At each batch size ``timed = factor * network + rest``, with one factor, and neither is negative.

    Args:
        network: milliseconds by stitch and batch size.
        timed: of some of these stitches.
        sizes: the batch sizes of ``timed``.
    """
    worst, *_, best = timed if len(timed) > 1 else 2 * list(timed)
    slopes = [
        (timed[best][size] - timed[worst][size]) / (network[best][size] - network[worst][size])
        for size in sizes
        if network[best][size] > network[worst][size]
    ]
    factor = max(0.1, median(slopes)) if slopes else 1.0
    rest = {
        size: max(0.0, float(np.mean([timed[name][size] - factor * network[name][size] for name in timed])))
        for size in sizes
    }
    return {name: {size: factor * row[size] + rest[size] for size in sizes} for name, row in network.items()}


def blank_image(predictor: Predictor, size: tuple[int, int]) -> LoadedImage:
    """A black image of the size (height, width), loaded and preprocessed."""
    channels = find_stitched_backbone(predictor.model).network.anchor(0).in_chans
    return predictor.load(np.zeros((*size, channels), np.uint8))


def _measured_on(
    predictor: Predictor, points: OperatingPoints, threads: int
) -> Mapping[str, Mapping[int, float]] | None:
    """The latencies of a file by stitch name, if they were measured as the server runs."""
    expected: dict[str, object] = dict(backend=predictor.backend, device=device_name(predictor.device))
    if predictor.device.type == "cpu":
        expected["threads"] = threads
    # A server runs the model as it is loaded. On a GPU, benchmark.py times CUDA graphs unless told otherwise.
    expected |= dict(precision="fp32", compile=None, cuda_graph=False, channels_last=False)
    recorded: dict[str, object] = dict(
        backend="torch", precision="fp32", compile=None, cuda_graph=False, channels_last=False
    )
    recorded |= points.benchmark
    if predictor.backend != "torch":
        recorded["precision"] = "fp32"  # an export's own, which its graphs have
    timed = all(point.latency_ms is not None for point in points)
    if not timed or any(recorded.get(name) != value for name, value in expected.items()):
        return None
    by_id = batch_latencies(points)
    return {point.name: by_id[point.id] for point in points}


def _time_batches(
    predictor: Predictor, image: LoadedImage, stitches: Sequence[str], sizes: Sequence[int], deadline_ms: float
) -> Latencies:
    """The median time of a few batches; the last size is the first at which the first stitch misses the deadline."""
    times: Latencies = {name: {} for name in stitches}
    for size in sizes:
        for name in stitches:
            stitch = predictor.space[name]
            predictor.predict([image] * size, stitch)
            runs = []
            for _ in range(REPEATS):
                start = time.perf_counter()
                predictor.predict([image] * size, stitch)
                runs.append(1000 * (time.perf_counter() - start))
            times[name][size] = median(runs)
        if times[stitches[0]][size] > deadline_ms:
            break
    return times
