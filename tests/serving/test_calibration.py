"""A server knows how long its own batches take, from the file of operating points where that is of this machine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmsnnet.apis import OperatingPoints, Predictor, build_model, export_stitches
from mmsnnet.apis.devices import device_name
from mmsnnet.datasets import write_shapes
from mmsnnet.evaluation import OperatingPoint
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.serving import calibration
from mmsnnet.serving.calibration import BATCH_SIZES, calibrate, fit, servable
from mmsnnet.stitching import Stitch, StitchSpace
from tests.deployment.families import random_checkpoint, segmentor

SPACE = StitchSpace.two_way((2, 4))
NAMES = ["S", "S0-L2", "L"]
SIZES = (1, 2, 4)
CPU = torch.device("cpu")
HERE = dict(backend="torch", device=device_name(CPU), threads=3, batch_size=1)


def network_ms(stitch: str, size: int) -> float:
    """The network alone takes this long for a batch."""
    return (1 + NAMES.index(stitch)) * (3 + size)


def served_ms(stitch: str, size: int) -> float:
    """And the server so long."""
    return 1.5 * network_ms(stitch, size) + 2 * size


def points_of(benchmark: dict[str, Any] | None = None, timed: Sequence[str] = NAMES) -> OperatingPoints:
    points = OperatingPoints(None, None, None, (32, 32), None, benchmark=benchmark or {})
    for quality, name in enumerate(NAMES):
        stitch = SPACE[name]
        point = OperatingPoint(stitch.id, name, stitch.kind, 1000 + quality, 10, {"mIoU": 30.0 + quality})
        if name in timed:
            latencies = {size: network_ms(name, size) for size in SIZES}
            point = replace(point, latency_ms=latencies[1], latencies_ms=latencies)
        points = points.add(point)
    return points


@dataclass
class FakePredictor:
    """A predictor whose batches take ``served_ms`` of its own clock.

    Attributes:
        timed: the stitch and the size of each batch.
    """

    backend: str = "torch"
    device: torch.device = CPU
    now: float = 0.0
    timed: set[tuple[str, int]] = field(default_factory=set)
    space = SPACE

    def predict(self, images: Sequence[object], stitch: Stitch) -> None:
        self.timed.add((stitch.name, len(images)))
        self.now += served_ms(stitch.name, len(images)) / 1000


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> FakePredictor:
    fake = FakePredictor()
    monkeypatch.setattr(calibration, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    monkeypatch.setattr(calibration, "blank_image", lambda predictor, size: object())
    return fake


@pytest.mark.parametrize("seed", range(10))
def test_fit_finds_the_factor_and_the_rest(seed: int) -> None:
    generator = np.random.default_rng(seed)
    network = {name: dict(zip(SIZES, row, strict=True)) for name, row in zip("abcd", made_up(generator), strict=True)}
    factor, rest = generator.uniform(0.2, 5), dict(zip(SIZES, generator.uniform(0, 10, 3), strict=True))
    expected = {name: {size: factor * of[size] + rest[size] for size in SIZES} for name, of in network.items()}
    found = fit(network, {name: expected[name] for name in "ad"}, SIZES)
    for name, latencies in expected.items():
        assert found[name] == pytest.approx(latencies)


def made_up(generator: np.random.Generator) -> np.ndarray:
    """Latencies (4, 3) that grow with the stitch."""
    return generator.uniform(0.1, 3, (4, len(SIZES))).cumsum(0)


@pytest.mark.parametrize("seed", range(10))
def test_no_noise_makes_latencies_negative_or_their_order_another(seed: int) -> None:
    generator = np.random.default_rng(seed)
    network = {name: dict(zip(SIZES, row, strict=True)) for name, row in zip("abcd", made_up(generator), strict=True)}
    timed = {name: dict(zip(SIZES, generator.uniform(0.01, 5, 3), strict=True)) for name in "ad"}
    found = fit(network, timed, SIZES)
    for size in SIZES:
        latencies = [found[name][size] for name in "abcd"]
        assert latencies[0] > 0 and latencies == sorted(latencies)


def test_fit_of_one_stitch_takes_the_difference_as_rest() -> None:
    assert fit({"S": {1: 5.0, 2: 6.0}}, {"S": {1: 7.0, 2: 7.0}}, [1, 2]) == {"S": {1: 7.0, 2: 7.0}}


def test_latencies_of_this_machine_are_used(predictor: FakePredictor) -> None:
    table = calibrate(predictor, points_of(HERE), NAMES, 1000, threads=3)  # type: ignore[arg-type]
    assert {name for name, _ in predictor.timed} == {"S", "L"} and {size for _, size in predictor.timed} == set(SIZES)
    assert table.names == ("S", "S0-L2", "L")
    for name, row in zip(NAMES, table.ms, strict=True):
        assert [row[size] for size in SIZES] == pytest.approx([served_ms(name, size) for size in SIZES])


def test_a_file_without_backend_is_of_pytorch(predictor: FakePredictor) -> None:
    benchmark = {name: value for name, value in HERE.items() if name != "backend"}
    calibrate(predictor, points_of(benchmark), NAMES, 1000, threads=3)  # type: ignore[arg-type]
    assert {name for name, _ in predictor.timed} == {"S", "L"}


def test_threads_do_not_matter_on_a_gpu(predictor: FakePredictor, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor.device = torch.device("cuda")
    monkeypatch.setattr(calibration, "device_name", lambda device: "NVIDIA H200")
    calibrate(predictor, points_of(HERE | dict(device="NVIDIA H200")), NAMES, 1000, threads=1)  # type: ignore[arg-type]
    assert {name for name, _ in predictor.timed} == {"S", "L"}


@pytest.mark.parametrize(
    "benchmark",
    [{}, HERE | dict(device="NVIDIA H200"), HERE | dict(threads=1), HERE | dict(backend="onnxruntime")],
    ids=["none", "device", "threads", "backend"],
)
def test_other_latencies_are_not_used(predictor: FakePredictor, benchmark: dict[str, Any]) -> None:
    table = calibrate(predictor, points_of(benchmark), NAMES, 1000, threads=3)  # type: ignore[arg-type]
    assert predictor.timed == {(name, size) for name in NAMES for size in BATCH_SIZES}
    for name, row in zip(NAMES, table.ms, strict=True):
        assert [row[size] for size in BATCH_SIZES] == pytest.approx([served_ms(name, size) for size in BATCH_SIZES])


def test_all_stitches_are_timed_where_one_has_no_latency(predictor: FakePredictor) -> None:
    calibrate(predictor, points_of(HERE, timed=["S", "L"]), NAMES, 1000, threads=3)  # type: ignore[arg-type]
    assert {name for name, _ in predictor.timed} == set(NAMES)


@pytest.mark.parametrize("benchmark", [{}, HERE], ids=["all timed", "two timed"])
def test_no_larger_batches_than_the_deadline_allows(predictor: FakePredictor, benchmark: dict[str, Any]) -> None:
    """Sizes up to the first that takes too long, so that those before it can be interpolated."""
    table = calibrate(predictor, points_of(benchmark), NAMES, served_ms("S", 1) + 0.1, threads=3)  # type: ignore[arg-type]
    assert {size for _, size in predictor.timed} == {1, 2} and table.max_batch == 2
    predictor.timed.clear()
    table = calibrate(predictor, points_of(benchmark), NAMES, 0.001, threads=3)  # type: ignore[arg-type]
    assert {size for _, size in predictor.timed} == {1} and table.max_batch == 1


def test_one_stitch_is_timed_once(predictor: FakePredictor) -> None:
    table = calibrate(predictor, points_of(HERE), ["S0-L2"], 1000, threads=3)  # type: ignore[arg-type]
    assert {name for name, _ in predictor.timed} == {"S0-L2"}
    assert table.ms[0][2] == pytest.approx(served_ms("S0-L2", 2))


def test_the_front_is_over_latency_if_all_have_one() -> None:
    def names(points: OperatingPoints, metric: str | None = None) -> list[str]:
        return [point.name for point in servable(points, metric)]

    points = points_of(HERE)
    assert names(points) == NAMES
    # S0-L2 is slower than L, with fewer FLOPs.
    slow = [replace(point, latency_ms=99.0) if point.name == "S0-L2" else point for point in points]
    assert names(replace(points, points=tuple(slow))) == ["S", "L"]
    slow[0] = replace(slow[0], latency_ms=None)
    assert names(replace(points, points=tuple(slow))) == NAMES
    # Another metric has another front.
    other = [replace(point, metrics=point.metrics | {"aAcc": -point.metrics["mIoU"]}) for point in points]
    assert names(replace(points, points=tuple(other)), "aAcc") == ["S"]


@pytest.mark.slow
def test_an_export_is_timed_in_onnx_runtime(tmp_path: Path) -> None:
    """Latencies of PyTorch do not count for it; its own do."""
    config = segmentor(write_shapes(tmp_path / "data", "shapes", 2, 2, (64, 64)))
    checkpoint = random_checkpoint(config, tmp_path / "model.pth")
    model = build_model(config)
    stitch = find_stitched_backbone(model).space["S"]
    cost = model_costs(model)[stitch.id]
    point = OperatingPoint(stitch.id, "S", stitch.kind, cost.flops, cost.params, {"mIoU": 30.0})
    points = OperatingPoints(str(config.filename), None, None, (64, 64), None, points=(point,))
    export_stitches(config, checkpoint, ["S"], tmp_path / "out", points=points)
    predictor = Predictor(tmp_path / "out")
    assert predictor.points is not None and predictor.backend == "onnxruntime"
    table = calibrate(predictor, predictor.points, ["S"], 10_000, threads=1)
    assert table.names == ("S",) and table.max_batch == 8
    timed = (replace(point, latency_ms=1.0, latencies_ms={1: 1.0, 2: 2.0}),)
    for backend, max_batch in (("torch", 8), ("onnxruntime", 2)):
        measured = replace(predictor.points, points=timed, benchmark=HERE | dict(backend=backend, threads=1))
        assert calibrate(predictor, measured, ["S"], 10_000, threads=1).max_batch == max_batch
