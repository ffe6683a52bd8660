"""Latencies are added to operating points without changing anything else."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.evaluation.latencies import (
    Benchmark,
    StitchLatency,
    batch_latencies,
    check_conditions,
    points_to_time,
    with_latencies,
)
from mmsnnet.stitching import Stitch, StitchSpace

SPACE = StitchSpace.two_way((2, 4))


def counted(**kwargs: Any) -> OperatingPoints:
    """Every stitch of a model with its costs."""
    head = dict(config="configs/a.py", checkpoint=None, dataset=None, input_shape=(32, 32), device="cpu") | kwargs
    points = tuple(OperatingPoint(s.id, s.name, s.kind, 1000 + s.id, 100 + s.id) for s in SPACE)
    return OperatingPoints(**({"points": points} | head))


def evaluated(*stitches: Stitch, **kwargs: Any) -> OperatingPoints:
    """Operating points of some stitches, as test.py writes them."""
    head = dict(checkpoint="a.pth", dataset="shapes", device="cuda:0", fingerprint={"checkpoint": "abc"}) | kwargs
    points = [replace(p, metrics={"mIoU": 40.0 + p.id}) for p in counted() if SPACE[p.id] in stitches]
    return counted(points=tuple(points), **head)


def measured(*stitches: Stitch, milliseconds: float = 10.0, **conditions: Any) -> Benchmark:
    values = {"device": "CPU", "threads": 1, "batch_size": 2, "warmup": 1, "repeats": 2, "date": "today"} | conditions
    sizes = map(int, str(values.get("batch_sizes", values["batch_size"])).split(","))
    times = {size: milliseconds * size / 2 for size in sizes}
    latencies = (StitchLatency(s, {n: (ms + s.id,) for n, ms in times.items()}, peak_memory=7) for s in stitches)
    return Benchmark((32, 32), values, tuple(latencies))


SMALL, LARGE, THIRD, FOURTH = SPACE


def test_latencies_are_added_and_all_else_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    evaluated(SMALL, LARGE, THIRD).save(path)
    before = json.loads(path.read_text())
    points = points_to_time(path, counted())
    with_latencies(points, counted(), measured(LARGE, FOURTH)).save(path)
    after = json.loads(path.read_text())
    assert {key: after[key] for key in before if key != "stitches"} == {k: before[k] for k in before if k != "stitches"}
    assert after["benchmark"] == measured().conditions
    assert [entry["id"] for entry in after["stitches"]] == [0, 1, 2, 4]
    assert [after["stitches"][index] for index in (0, 2)] == [before["stitches"][index] for index in (0, 2)]
    new = dict(latency_ms=11.0, throughput=2000 / 11.0, peak_memory=7)
    assert after["stitches"][1] == before["stitches"][1] | new
    assert after["stitches"][3]["metrics"] == {} and after["stitches"][3]["latency_ms"] == 14.0
    loaded = OperatingPoints.load(path)
    assert loaded.benchmark == after["benchmark"] and loaded.fingerprint == {"checkpoint": "abc"}
    assert math.isclose(loaded.points[1].throughput, 2000 / 11.0) and loaded.points[1].peak_memory == 7


def test_a_new_file_has_the_stitches_that_were_measured(tmp_path: Path) -> None:
    points = points_to_time(tmp_path / "none.json", counted())
    assert points == points_to_time(None, counted()) == counted(points=())
    result = with_latencies(points, counted(), measured(THIRD, SMALL))
    assert [(p.id, p.flops, p.latency_ms) for p in result] == [(0, 1000, 10.0), (2, 1002, 12.0)]


def test_measuring_again_replaces(tmp_path: Path) -> None:
    first = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE))
    again = with_latencies(first, counted(), measured(SMALL, milliseconds=20.0, repeats=9, date="tomorrow"))
    assert [point.latency_ms for point in again] == [20.0, 11.0] and again.benchmark["date"] == "tomorrow"
    other = with_latencies(first, counted(), measured(SMALL, LARGE, milliseconds=5.0, device="GPU"))
    assert [point.latency_ms for point in other] == [5.0, 6.0] and other.benchmark["device"] == "GPU"


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (dict(batch_size=8), "batch_size 2 instead of 8"),
        (dict(batch_sizes="2,8"), "batch_size 2 instead of 2,8"),
        (dict(device="GPU", threads=3), "device CPU instead of GPU, threads 1 instead of 3"),
        (dict(precision="fp16"), "precision unknown instead of fp16"),
    ],
)
def test_one_file_has_latencies_of_one_kind_of_conditions(conditions: dict[str, Any], message: str) -> None:
    points = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE))
    benchmark = measured(SMALL, **conditions)
    with pytest.raises(ValueError, match=rf"latencies of other stitches, such as 1 \(L\), .*{message}.*--stitches"):
        with_latencies(points, counted(), benchmark)
    with pytest.raises(ValueError, match=message):
        check_conditions(points, [0], benchmark.conditions)
    check_conditions(points, [0, 1], benchmark.conditions)


@pytest.mark.parametrize("conditions", [dict(), dict(batch_size=8), dict(batch_sizes="2,4"), dict(batch_size=1)])
def test_all_stitches_of_a_file_have_the_same_batch_sizes(conditions: dict[str, Any]) -> None:
    several = dict(batch_sizes="2,4,8")
    points = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE, **several))
    with pytest.raises(ValueError, match=r"batch_size 2,4,8 instead of \d.*--stitches"):
        with_latencies(points, counted(), measured(SMALL, **conditions))
    again = with_latencies(points, counted(), measured(SMALL, milliseconds=20.0, **several))
    assert [list(point.latencies_ms) for point in again] == [[2, 4, 8]] * 2
    # All stitches again, under any conditions.
    other = with_latencies(points, counted(), measured(SMALL, LARGE, **conditions))
    assert other.benchmark == measured(**conditions).conditions


def test_several_batch_sizes_add_a_latency_for_each(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    points = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE, batch_sizes="2,4,8"))
    points.save(path)
    loaded = OperatingPoints.load(path)
    assert loaded == points and loaded.benchmark["batch_sizes"] == "2,4,8"
    small, large = loaded
    assert small.latencies_ms == {2: 10.0, 4: 20.0, 8: 40.0} and large.latencies_ms == {2: 11.0, 4: 21.0, 8: 41.0}
    assert (large.latency_ms, large.throughput, large.peak_memory) == (11.0, 2000 / 11.0, 7)
    assert batch_latencies(loaded) == {0: small.latencies_ms, 1: large.latencies_ms}
    # One size again: nothing of the others stays.
    one = with_latencies(loaded, counted(), measured(SMALL, LARGE))
    assert one == with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE))
    assert not any("latencies_ms" in point.to_json() for point in one) and "batch_sizes" not in one.benchmark


def test_the_latencies_of_a_file_with_one_batch_size() -> None:
    points = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL, LARGE))
    assert batch_latencies(points) == {0: {2: 10.0}, 1: {2: 11.0}}
    assert batch_latencies(counted(points=())) == {}


def test_latencies_that_were_not_measured_are_named() -> None:
    points = with_latencies(evaluated(SMALL, LARGE), counted(), measured(SMALL))
    with pytest.raises(ValueError, match=r"stitch 1 \(L\) has no latency_ms: .*benchmark\.py"):
        batch_latencies(points)
    for size in (None, "2", True, 0):
        unknown = replace(points, points=points.points[:1], benchmark=dict(batch_size=size))
        with pytest.raises(ValueError, match=r"batch size of the latency of stitch 0 \(S\) is unknown.*benchmark\.py"):
            batch_latencies(unknown)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (evaluated(SMALL, config="configs/b.py"), "its config is configs/b.py, not configs/a.py"),
        (evaluated(SMALL, input_shape=(64, 32)), r"its input shape is \(64, 32\), not \(32, 32\)"),
        (counted(points=(OperatingPoint(1, "M", "L", 1001, 101),)), r"1 \(M\) has name M, the model's L"),
        (
            counted(points=(OperatingPoint(1, "L", "L", 1002, 101),)),
            r"1 \(L\) has flops 1002, the model's 1001",
        ),
        (counted(points=(OperatingPoint(1, "L", "L", 1001, 1),)), "has params 1, the model's 101"),
        (counted(points=(OperatingPoint(99, "L", "L", 1001, 1),)), "the model has no stitch 99"),
    ],
)
def test_a_file_of_another_model_is_refused(file: OperatingPoints, message: str, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    file.save(path)
    with pytest.raises(ValueError, match=message) as refused:
        points_to_time(path, counted())
    assert "points.json has other operating points, set another --out" in str(refused.value)


def test_the_folder_of_the_config_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    evaluated(SMALL, config="/elsewhere/a.py").save(path)
    assert points_to_time(path, counted()).config == "/elsewhere/a.py"
    evaluated(SMALL, config=None).save(path)
    assert len(points_to_time(path, counted())) == 1


def test_a_file_without_operating_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="is a folder"):
        points_to_time(tmp_path, counted())
    cut = tmp_path / "cut.json"
    evaluated(SMALL).save(cut)
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.json: .*no valid JSON"):
        points_to_time(cut, counted())
