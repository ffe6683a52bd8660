"""The choice of a stitch under a budget, and the front that is shipped for it."""

import json
import math
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmsnnet.apis
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, compact_front, read_points, select_stitch


def point(id_: int, gflops: float, quality: float | None = None, ms: float | None = None, **metrics: float) -> Any:
    metrics |= {} if quality is None else {"mIoU": quality}
    return OperatingPoint(id_, f"S{id_}-L{2 * id_}", "SL", round(gflops * 1e9), 10 * id_, metrics, ms)


def run(*points: OperatingPoint) -> OperatingPoints:
    return OperatingPoints("configs/a.py", "a.pth", "ADE20K", (512, 384), "cuda:0", points, {"config": "1f"})


def random_points(seed: int) -> list[OperatingPoint]:
    """Few distinct values, so that every kind of tie comes up, and some metrics that are NaN; in any order."""
    rng = random.Random(seed)
    ids = rng.sample(range(200), rng.randint(1, 25))
    quality = [math.nan, 0, 1, 2, 3, 4]
    return [point(i, rng.randint(1, 6), rng.choice(quality), rng.randint(1, 6), rmse=rng.choice(quality)) for i in ids]


def best_by_brute_force(
    points: list[OperatingPoint], cost: str, budget: float, metric: str, sign: int
) -> OperatingPoint | None:
    """The first of all that fit by (quality, cost, id); costs as fractions, so that nothing is rounded."""

    def price(p: OperatingPoint) -> Fraction:
        return Fraction(p.flops, 10**9) if cost == "max_gflops" else Fraction(p.latency_ms)

    fit = [p for p in points if price(p) <= Fraction(budget) and not math.isnan(p.metrics[metric])]
    return min(fit, key=lambda p: (-sign * p.metrics[metric], price(p), p.id), default=None)


@pytest.mark.parametrize("cost", ["max_gflops", "max_latency_ms"])
@pytest.mark.parametrize(("metric", "sign"), [("mIoU", 1), ("rmse", -1)])
def test_the_choice_is_that_of_brute_force_from_all_points_and_from_the_front(
    cost: str, metric: str, sign: int
) -> None:
    chosen, refused = set(), 0
    for seed in range(150):
        points = random_points(seed)
        measured = any(not math.isnan(p.metrics[metric]) for p in points)
        front = compact_front(run(*points), metric) if measured else ()
        for budget in (0.5, 1, 2, 2.5, 3, 4, 5, 6, 100):
            expected = best_by_brute_force(points, cost, budget, metric, sign)
            if expected is None:
                refused += 1
                for source in (points, front):
                    with pytest.raises(ValueError, match=r"below the cheapest|no stitch has a finite|found none"):
                        select_stitch(source, metric=metric, **{cost: budget})
            else:
                chosen.add((seed, expected.id))
                assert select_stitch(points, metric=metric, **{cost: budget}) == expected
                assert select_stitch(front, **{cost: budget}).id == expected.id
    assert len(chosen) > 200 and refused > 50


def test_more_budget_is_never_worse() -> None:
    for seed in range(50):
        points = [p for p in random_points(seed) if not math.isnan(p.metrics["mIoU"])]
        if points:
            budgets = sorted({p.flops / 1e9 for p in points})
            qualities = [select_stitch(points, max_gflops=budget, metric="mIoU").metrics["mIoU"] for budget in budgets]
            assert qualities == sorted(qualities)


def test_a_cost_given_back_as_the_budget_is_within_it() -> None:
    """Whatever the rounding: 527.159040199 * 1e9 is below 527159040199."""
    rng = random.Random(0)
    for flops in (527159040199, *(rng.randint(1, 10**13) for _ in range(2000))):
        only = OperatingPoint(0, "S", "S", flops, 1, {"mIoU": 1.0})
        assert select_stitch([only], max_gflops=float(f"{flops // 10**9}.{flops % 10**9:09d}")) == only
        with pytest.raises(ValueError, match="below the cheapest"):
            select_stitch([only], max_gflops=math.nextafter(flops / 1e9, 0))


A, B, C, D = point(5, 10, 40, 9.0), point(3, 20, 45, 3.0), point(4, 20, 45, 3.0), point(1, 30, 44, 1.0)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (dict(max_gflops=10), A),
        (dict(max_gflops=19.9), A),
        (dict(max_gflops=20), B),  # as good and as cheap as C, of a lower id
        (dict(max_gflops=1e9), B),  # better than D, which is dearer
        (dict(max_gflops=math.inf), B),
        (dict(max_gflops=np.float32(20)), B),
        (dict(max_latency_ms=2.9), D),
        (dict(max_latency_ms=9), B),
    ],
)
def test_by_hand(budget: dict[str, float], expected: OperatingPoint) -> None:
    for points in ([A, B, C, D], [D, C, B, A]):
        assert select_stitch(points, **budget) == expected


def test_of_equally_good_ones_the_cheaper() -> None:
    assert select_stitch([point(0, 5, 40), point(9, 4, 40)], max_gflops=5).id == 9


def test_a_metric_of_which_less_is_better() -> None:
    points = [point(0, 1, rmse=0.9, d1=0.7), point(1, 2, rmse=0.5, d1=0.6), point(2, 3, rmse=0.7, d1=0.9)]
    assert select_stitch(points, max_gflops=3, metric="rmse").id == 1
    assert select_stitch(points, max_gflops=3, metric="d1").id == 2
    assert select_stitch(points, max_gflops=1, metric="rmse").id == 0


def test_the_direction_of_an_unknown_metric_is_asked_for() -> None:
    points = [point(0, 1, quality_index=1.0), point(1, 2, quality_index=2.0)]
    with pytest.raises(ValueError, match=r"'quality_index' is not known.*--better"):
        select_stitch(points, max_gflops=3)
    assert select_stitch(points, max_gflops=3, higher=True).id == 1
    assert select_stitch(points, max_gflops=3, higher=False).id == 0
    assert [p.id for p in compact_front(run(*points), higher=False)] == [0]


@pytest.mark.parametrize(
    ("points", "arguments", "error", "message"),
    [
        ([A, B], {}, ValueError, "max_gflops or max_latency_ms, one of the two; got neither"),
        ([A, B], dict(max_gflops=1, max_latency_ms=2), ValueError, "got max_gflops=1 and max_latency_ms=2"),
        ([A, B], dict(max_gflops=0), ValueError, "max_gflops: expected a positive number, found 0"),
        ([A, B], dict(max_gflops=math.nan), ValueError, "max_gflops: expected a positive number, found nan"),
        ([A, B], dict(max_latency_ms="3"), TypeError, "max_latency_ms: expected a number, found '3'"),
        ([A, B], dict(max_gflops=True), TypeError, "max_gflops: expected a number, found True"),
        ([A, B], dict(max_gflops=9.5), ValueError, r"of 9.5 GFLOPs is below .* 5 \(S5-L10\), which needs 10.0 GFLOPs"),
        ([A, B], dict(max_latency_ms=1), ValueError, r"of 1 ms is below .* 3 \(S3-L6\), which needs 3.0 ms"),
        ([A, point(0, 1, 3)], dict(max_latency_ms=1), ValueError, r"0 \(S0-L0\) has no latency_ms: .*benchmark\.py"),
        ([A], dict(max_gflops=99, metric="mAcc"), ValueError, r"5 \(S5-L10\) has no metric 'mAcc'; it has mIoU"),
        ([point(0, 1)], dict(max_gflops=99), ValueError, r"points with metrics, found none: tools/test\.py"),
        ([point(0, 1)], dict(max_gflops=99, metric="mIoU"), ValueError, "no metric 'mIoU'; it has none"),
        ([point(0, 1, math.nan)], dict(max_gflops=99), ValueError, "no stitch has a finite mIoU"),
        ([], dict(max_gflops=99), ValueError, "expected operating points, found none"),
        ([], dict(max_gflops=99, metric="mIoU"), ValueError, "expected operating points, found none"),
        (3, dict(max_gflops=99), TypeError, "expected a file of operating points or a list of them, found 3"),
        ({"id": 3}, dict(max_gflops=99), TypeError, "expected a file of operating points or a list of them"),
        ([3], dict(max_gflops=99), TypeError, "expected an object, found 3"),
        ([{"id": 3}], dict(max_gflops=99), ValueError, "expected the keys id, name, .*found no name"),
        ("nowhere.json", dict(max_gflops=99), FileNotFoundError, "nowhere.json: no such file"),
    ],
)
def test_mistakes(points: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_stitch(points, **arguments)


def test_points_come_from_a_file_its_contents_or_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    run(A, B, point(9, 1, math.nan, 1.0)).save(path)
    entries = json.loads(path.read_text())["stitches"]
    sources = (path, str(path), OperatingPoints.load(path), entries, [A, *entries[1:]], iter(entries))
    for source in sources:
        found = read_points(source)
        assert found[:2] == (A, B) and math.isnan(found[2].metrics["mIoU"])
    assert mmsnnet.apis.select_stitch(path, max_gflops=20) == B


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    run(A, B).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"points\.json: expected operating points in JSON, found no valid JSON"):
        select_stitch(path, max_gflops=20)


def test_the_front_is_a_small_file_of_operating_points(tmp_path: Path) -> None:
    """134 stitches with the metrics of segmentation; as few as the front has, with the one that it is a front of."""
    rng = random.Random(0)
    points = [point(i, 50 + i, 40 + i / 10 - rng.random(), 20 + i / 9, aAcc=80.0, mAcc=50.0) for i in range(134)]
    run(*points).save(tmp_path / "all.json")
    front = compact_front(OperatingPoints.load(tmp_path / "all.json"))
    front.save(tmp_path / "front.json")
    assert 10 < len(front) < 60
    assert all(list(p.metrics) == ["mIoU"] for p in front)
    assert OperatingPoints.load(tmp_path / "front.json") == front == compact_front(front)
    assert (front.dataset, front.input_shape, front.checkpoint) == ("ADE20K", (512, 384), "a.pth")
    # A run that would resume from it, as if it were its own, sees that it is not.
    assert front.fingerprint == {}
    assert (tmp_path / "front.json").stat().st_size < 400 + 160 * len(front)


def test_the_front_has_both_costs_where_all_points_have_both() -> None:
    slow, fast, dear, dominated = point(0, 1, 40, 9.0), point(1, 2, 40, 3.0), point(2, 3, 41, 9.5), point(3, 3, 40, 9.0)
    assert [p.id for p in compact_front(run(slow, dominated, fast, dear))] == [0, 1, 2]
    untimed = point(1, 2, 40)
    front = compact_front(run(slow, dominated, untimed, dear))
    assert [(p.id, p.latency_ms) for p in front] == [(0, None), (2, None)]
    with pytest.raises(ValueError, match=r"benchmark\.py"):
        select_stitch(front, max_latency_ms=9)


def test_the_front_keeps_the_latencies_of_batches_or_drops_all_latencies() -> None:
    points = [replace(point(i, 1 + i, 40 + i, 3.0 + i), latencies_ms={1: 3.0 + i, 4: 9.0 + i}) for i in range(3)]
    assert compact_front(run(*points)).points == tuple(points)
    front = compact_front(run(*points, point(3, 9, 50)))
    assert [(p.latency_ms, p.latencies_ms) for p in front] == [(None, {})] * 4


def test_there_is_no_front_of_nothing() -> None:
    with pytest.raises(ValueError, match="no stitch has a finite mIoU"):
        compact_front(run(point(0, 1, math.nan)))
    for metric in (None, "mIoU"):
        with pytest.raises(ValueError, match="expected operating points, found none"):
            compact_front(run(), metric)
