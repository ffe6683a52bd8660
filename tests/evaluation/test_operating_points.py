import ast
import json
import math
import os
import random
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mmsnnet.evaluation import (
    OperatingPoint,
    OperatingPoints,
    default_metric,
    higher_is_better,
    metric_names,
    operating_points,
    pareto_front,
)
from mmsnnet.files import writing


def point(id_: int, flops: int, quality: float | None = None, **kwargs: object) -> OperatingPoint:
    kwargs.setdefault("metrics", {} if quality is None else {"mIoU": quality})
    return OperatingPoint(id_, f"S{id_}-L{2 * id_}", "SL", flops, 10 * flops, **kwargs)


def run(*points: OperatingPoint) -> OperatingPoints:
    return OperatingPoints("configs/a.py", "work_dirs/a.pth", "ADE20K", (512, 384), "NVIDIA H100", points)


def random_points(seed: int, integers: bool = True) -> list[OperatingPoint]:
    """Few distinct values where ``integers``, so that every kind of tie comes up."""
    rng = random.Random(seed)
    count = rng.randint(1, 25)
    draw = (lambda: rng.randint(0, 6)) if integers else (lambda: rng.uniform(0, 6))
    return [point(i, rng.randint(0, 6) if integers else rng.randint(0, 10**9), draw()) for i in range(count)]


def front_by_brute_force(points: list[OperatingPoint], sign: int = 1) -> set[int]:
    def dominates(a: OperatingPoint, b: OperatingPoint) -> bool:
        quality_a, quality_b = sign * a.metrics["mIoU"], sign * b.metrics["mIoU"]
        return a.flops <= b.flops and quality_a >= quality_b and (a.flops < b.flops or quality_a > quality_b)

    return {b.id for b in points if not any(dominates(a, b) for a in points)}


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_front_is_what_no_point_dominates(integers: bool, sign: int) -> None:
    for seed in range(200):
        points = random_points(seed, integers)
        front = pareto_front(points, metric="mIoU", higher=sign == 1)
        assert {p.id for p in front} == front_by_brute_force(points, sign), seed
        assert [p.flops for p in front] == sorted(p.flops for p in front)


def test_a_dominated_point_never_changes_the_front() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        points = random_points(seed)
        front = pareto_front(points, metric="mIoU")
        master = rng.choice(front)
        worse = rng.choice([(1, 0), (0, 1), (2, 3)])
        loser = point(99, master.flops + worse[0], master.metrics["mIoU"] - worse[1])
        points.insert(rng.randint(0, len(points)), loser)
        assert pareto_front(points, metric="mIoU") == front


def test_the_front_of_the_front_is_the_front_and_order_does_not_matter() -> None:
    for seed in range(100):
        points = random_points(seed)
        front = pareto_front(points, metric="mIoU")
        assert pareto_front(front, metric="mIoU") == front
        assert set(pareto_front(points[::-1], metric="mIoU")) == set(front)


def test_front_by_hand() -> None:
    a, b, c, d, e = point(0, 1, 40.0), point(1, 2, 39.0), point(2, 2, 45.0), point(3, 3, 45.0), point(4, 4, 50.0)
    assert pareto_front([e, d, c, b, a], metric="mIoU") == (a, c, e)


def test_points_equal_in_both_all_stay_in_the_order_given() -> None:
    twins = [point(7, 5, 1.0), point(3, 5, 1.0), point(5, 5, 1.0)]
    assert pareto_front([*twins, point(1, 5, 0.5), point(2, 6, 1.0)]) == tuple(twins)


def test_front_over_latency_differs_from_that_over_flops() -> None:
    slow, fast = point(0, 1, 40.0, latency_ms=9.0), point(1, 2, 41.0, latency_ms=3.0)
    assert pareto_front([slow, fast]) == (slow, fast)
    assert pareto_front([slow, fast], cost="latency_ms") == (fast,)


def test_nan_is_never_on_the_front() -> None:
    good, unknown = point(0, 5, 40.0), point(1, 1, math.nan)
    for higher in (True, False):
        assert pareto_front([unknown, good], higher=higher) == (good,)
    assert pareto_front([unknown]) == ()


def test_front_of_nothing_is_empty() -> None:
    assert pareto_front([]) == ()
    assert pareto_front(run(), metric="mIoU") == ()


def test_front_refuses_what_was_not_measured() -> None:
    with pytest.raises(ValueError, match=r"1 \(S1-L2\) has no metric 'mIoU'; it has none"):
        pareto_front([point(0, 1, 2.0), point(1, 1)], metric="mIoU")
    with pytest.raises(ValueError, match=r"0 \(S0-L0\) has no latency_ms"):
        pareto_front([point(0, 1, 2.0)], cost="latency_ms")
    with pytest.raises(ValueError, match="'flops' or 'latency_ms', got 'gflops'"):
        pareto_front([point(0, 1, 2.0)], cost="gflops")


@pytest.mark.parametrize(
    ("better", "names"),
    [
        (True, "mIoU aAcc mAcc mDice mFscore mPrecision mRecall d1 d2 d3 accuracy/top1 accuracy/top5 top1"),
        (
            True,
            "coco/bbox_mAP coco/bbox_mAP_50 coco/bbox_mAP_s coco/segm_mAP coco/segm_mAP_75 coco/AR@100 coco/AR_s@1000",
        ),
        (True, "pascal_voc/mAP pascal_voc/AP50 coco/person_precision"),
        (False, "abs_rel sq_rel rmse rmse_log log10 silog depth/rmse loss loss_ce decode.loss_ce aux.loss val_loss"),
        (False, "latency_ms"),
    ],
)
def test_the_direction_of_known_metrics(better: bool, names: str) -> None:
    assert {name: higher_is_better(name) for name in names.split()} == dict.fromkeys(names.split(), better)


@pytest.mark.parametrize("name", ["", "quality", "mIoU/", "rmse/other", "lossless", "d4", "MIOU", "map"])
def test_the_direction_of_an_unknown_metric_is_not_guessed(name: str) -> None:
    with pytest.raises(ValueError, match=f"metric {name!r} is not known"):
        higher_is_better(name)
    points = [point(0, 1, metrics={name: 1.0}), point(1, 2, metrics={name: 2.0})]
    with pytest.raises(ValueError, match="--better"):
        pareto_front(points, metric=name)
    assert len(pareto_front(points, metric=name, higher=True)) == 2
    assert len(pareto_front(points, metric=name, higher=False)) == 1


def test_the_front_goes_down_where_lower_is_better() -> None:
    """As depth is measured: the better stitch has the smaller error and the larger share of good pixels."""
    cheap = point(0, 1, metrics={"abs_rel": 0.12, "d1": 0.85})
    wasteful = point(1, 2, metrics={"abs_rel": 0.13, "d1": 0.84})
    good = point(2, 3, metrics={"abs_rel": 0.10, "d1": 0.90})
    for metric in ("abs_rel", "d1", None):
        assert pareto_front([wasteful, good, cheap], metric=metric) == (cheap, good)


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        (["aAcc", "mIoU", "mAcc"], "mIoU"),
        (["d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog"], "abs_rel"),
        (["coco/bbox_mAP", "coco/bbox_mAP_50", "coco/segm_mAP"], "coco/bbox_mAP"),
        (["accuracy/top5", "accuracy/top1", "loss"], "accuracy/top1"),
        (["quality"], "quality"),
    ],
)
def test_the_default_is_what_the_task_is_known_by(names: list[str], metric: str) -> None:
    assert default_metric([point(index, 1, metrics=dict.fromkeys(names, 1.0)) for index in (0, 1)]) == metric


def test_the_default_is_one_that_all_points_have() -> None:
    one = point(0, 1, metrics={"mIoU": 1.0, "aAcc": 2.0, "mAcc": 1.0})
    assert default_metric([one, point(1, 1, metrics={"aAcc": 3.0})]) == "aAcc"
    with pytest.raises(ValueError, match=r"2 in common: aAcc, mAcc; say which \(--metric\)"):
        default_metric([one, point(1, 1, metrics={"aAcc": 3.0, "mAcc": 1.0})])
    with pytest.raises(ValueError, match="found mIoU, aAcc, mAcc, rmse in some of them only"):
        pareto_front([one, point(1, 1, metrics={"rmse": 3.0})])
    with pytest.raises(ValueError, match="found none"):
        default_metric([])


def test_add_appends_or_takes_the_place_of_the_same_id() -> None:
    before = run(point(5, 1, 1.0), point(2, 1, 1.0))
    assert [p.id for p in before.add(point(3, 1, 1.0))] == [5, 2, 3]
    after = before.add(point(5, 1, 9.0))
    assert [(p.id, p.metrics["mIoU"]) for p in after] == [(5, 9.0), (2, 1.0)]
    assert before == run(point(5, 1, 1.0), point(2, 1, 1.0))
    assert (after.config, after.input_shape, after.device) == (before.config, before.input_shape, before.device)


def test_save_and_load_give_the_same_points(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "points.json"
    for seed in range(20):
        rng = random.Random(seed)
        saved = run(
            *(
                point(
                    i,
                    10**11 + i,
                    rng.random(),
                    latency_ms=rng.choice([None, rng.random()]),
                    latencies_ms={size: rng.random() for size in rng.sample(range(1, 65), rng.randint(0, 5))},
                )
                for i in rng.sample(range(200), rng.randint(0, 30))
            )
        )
        saved.save(path)
        assert OperatingPoints.load(path) == saved
        assert [p.id for p in OperatingPoints.load(path)] == [p.id for p in saved]
    assert os.listdir(path.parent) == ["points.json"]


def test_the_file_is_the_one_of_the_design(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    lsl = OperatingPoint(57, "L5-S3-L12", "LSL", 226892446208, 301000000, {"mIoU": 46.38}, 21.4)
    OperatingPoints(None, None, "Zürich", (512, 512), None, (lsl, point(1, 7, latency_ms=None))).save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "schema": 1,
        "config": None,
        "checkpoint": None,
        "dataset": "Zürich",
        "input_shape": [512, 512],
        "device": None,
        "stitches": [
            {
                "id": 57,
                "name": "L5-S3-L12",
                "kind": "LSL",
                "flops": 226892446208,
                "params": 301000000,
                "metrics": {"mIoU": 46.38},
                "latency_ms": 21.4,
            },
            {"id": 1, "name": "S1-L2", "kind": "SL", "flops": 7, "params": 70, "metrics": {}},
        ],
    }


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_without_a_finite_value_is_null_in_the_file(tmp_path: Path, value: float) -> None:
    path = tmp_path / "points.json"
    run(point(0, 1, metrics={"rmse": value, "mIoU": 2.0})).save(path)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["stitches"][0]["metrics"] == {"rmse": None, "mIoU": 2.0}
    (loaded,) = OperatingPoints.load(path)
    assert math.isnan(loaded.metrics["rmse"]) and loaded.metrics["mIoU"] == 2.0
    again = tmp_path / "again.json"
    run(loaded).save(again)
    assert again.read_bytes() == path.read_bytes()


def test_numbers_of_numpy_are_taken_as_numbers(tmp_path: Path) -> None:
    measured = OperatingPoint(np.int64(3), "S", "S", np.int64(5), np.int32(6), {"mIoU": np.float32(0.5)}, np.float64(2))
    run(measured).save(tmp_path / "points.json")
    assert OperatingPoints.load(tmp_path / "points.json").points == (
        OperatingPoint(3, "S", "S", 5, 6, {"mIoU": 0.5}, 2.0),
    )
    assert type(measured.id) is int and type(measured.metrics["mIoU"]) is float


@pytest.mark.parametrize("interruption", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_an_interrupted_save_leaves_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException, function: str
) -> None:
    path = tmp_path / "points.json"
    run(point(0, 1, 1.0)).save(path)
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise interruption

    monkeypatch.setattr(os, function, interrupt)
    with pytest.raises(type(interruption)):
        run(point(0, 1, 1.0), point(1, 2, 2.0)).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["points.json"]


def test_the_file_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    run().save(tmp_path / "points.json")
    (tmp_path / "other").touch()
    assert (tmp_path / "points.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_the_depths_of_the_anchors_are_kept_where_they_are_known(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    run().save(path)
    assert "depths" not in json.loads(path.read_text()) and OperatingPoints.load(path).depths is None
    replace(run(), depths=(12, 24)).save(path)
    assert json.loads(path.read_text())["depths"] == [12, 24] and OperatingPoints.load(path).depths == (12, 24)


def test_the_number_of_images_of_a_recalibration_is_kept(tmp_path: Path) -> None:
    for number in (None, 64):
        points = replace(run(point(0, 5, 40.0)), recalibrated=number)
        points.save(tmp_path / "points.json")
        assert OperatingPoints.load(tmp_path / "points.json") == points
        assert ("recalibrated" in json.loads((tmp_path / "points.json").read_text())) == (number is not None)
        assert points.add(point(1, 6, 41.0)).merged_with(run(point(2, 7))).recalibrated == number


def test_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    run(point(0, 1, 1.0), point(1, 2, math.nan, latency_ms=2.0)).save(path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"points.json: expected operating points in JSON, found no valid JSON"):
            OperatingPoints.load(path)


def test_the_latencies_of_batches_are_sorted_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    saved = run(point(0, 1, 1.0, latency_ms=2, latencies_ms={8: 9, np.int64(1): np.float64(2), 4: 5.5}), point(1, 2))
    saved.save(path)
    first, second = json.loads(path.read_text())["stitches"]
    assert first["latencies_ms"] == {"1": 2.0, "4": 5.5, "8": 9.0} and "latencies_ms" not in second
    loaded = OperatingPoints.load(path)
    assert loaded == saved and list(loaded.points[0].latencies_ms.items()) == [(1, 2.0), (4, 5.5), (8, 9.0)]
    assert all(type(size) is int for size in saved.points[0].latencies_ms)
    assert OperatingPoint.from_json(first) == OperatingPoint.from_json(saved.points[0].to_json()) == saved.points[0]
    assert hash(saved.points[0]) == hash(replace(saved.points[0], latencies_ms={}))
    assert saved.merged_with(saved) == replace(saved, points=()).merged_with(saved) == saved


def document(**changes: object) -> dict[str, object]:
    stitch: dict[str, object] = {"id": 0, "name": "S", "kind": "S", "flops": 5, "params": 6, "metrics": {"mIoU": 1.5}}
    stitch |= {"latency_ms": 2, "latencies_ms": None}
    head = {"schema": 1, "config": "c", "checkpoint": "k", "dataset": "d", "input_shape": [4, 6], "device": "cpu"}
    result = {**head, "stitches": [stitch]}
    for key, value in changes.items():
        place = stitch if key in stitch else result
        place[key] = value
        if value is KeyError:
            del place[key]
    return result


def test_the_document_to_be_spoilt_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text(json.dumps(document(latency_ms=None, config=None, note="a key of another program")))
    loaded = OperatingPoints.load(path)
    assert loaded == OperatingPoints(None, "k", "d", (4, 6), "cpu", (OperatingPoint(0, "S", "S", 5, 6, {"mIoU": 1.5}),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": 12}, "depths: expected the anchors' numbers of blocks, found 12"),
        ({"depths": [12, 0]}, r"depths: expected the anchors' numbers of blocks, found \[12, 0\]"),
        ({"depths": [12, 2.5]}, "depths: expected a whole number, found 2.5"),
        ({"schema": 2}, "schema: expected 1, found 2"),
        ({"schema": "1"}, "schema: expected 1, found '1'"),
        ({"schema": True}, "schema: expected 1, found True"),
        ({"schema": KeyError}, "schema: expected 1, found none among the keys"),
        *(({key: KeyError}, f"expected the keys .*found no {key}") for key in ("config", "checkpoint", "dataset")),
        *(({key: KeyError}, f"expected the keys .*found no {key}") for key in ("input_shape", "device", "stitches")),
        *(({key: KeyError}, rf"stitches\[0\]: expected the keys .*found no {key}") for key in ("id", "name", "kind")),
        *(({key: KeyError}, rf"stitches\[0\]: expected the keys .*found no {key}") for key in ("flops", "metrics")),
        *(({key: 3}, f"{key}: expected a string or nothing, found 3") for key in ("config", "dataset", "device")),
        ({"input_shape": 512}, r"input_shape: expected \[height, width\], found 512"),
        ({"input_shape": None}, r"input_shape: expected \[height, width\], found None"),
        ({"input_shape": [512]}, r"input_shape: expected \[height, width\], both positive, found \[512\]"),
        ({"input_shape": [0, 5]}, r"input_shape: .*found \[0, 5\]"),
        ({"input_shape": [1.5, 5]}, "input_shape: expected a whole number, found 1.5"),
        ({"stitches": {}}, "stitches: expected a list, found {}"),
        ({"stitches": [7]}, r"stitches\[0\]: expected an object, found 7"),
        ({"id": "0"}, r"stitches\[0\]: id: expected a whole number, found '0'"),
        ({"id": -1}, r"stitches\[0\]: id: expected a whole number that is not negative, found -1"),
        ({"name": 5}, r"stitches\[0\]: name: expected a string, found 5"),
        ({"kind": ""}, r"stitches\[0\]: kind: expected a string that is not empty"),
        ({"flops": 5.0}, r"stitches\[0\]: flops: expected a whole number, found 5.0"),
        ({"flops": True}, r"stitches\[0\]: flops: expected a whole number, found True"),
        ({"params": None}, r"stitches\[0\]: params: expected a whole number, found None"),
        ({"metrics": [1]}, r"stitches\[0\]: metrics: expected a mapping of names to numbers, found \[1\]"),
        ({"metrics": {"mIoU": "46"}}, r"stitches\[0\]: metrics: mIoU: expected a number, found '46'"),
        ({"metrics": {"mIoU": False}}, r"stitches\[0\]: metrics: mIoU: expected a number, found False"),
        ({"latency_ms": "fast"}, r"stitches\[0\]: latency_ms: expected a number, found 'fast'"),
        ({"latencies_ms": [1]}, r"stitches\[0\]: latencies_ms: expected a mapping of batch sizes to times in ms"),
        *(
            ({"latencies_ms": {size: 1}}, r"stitches\[0\]: latencies_ms: expected batch sizes, .* found '?" + size[:20])
            for size in ("0", "-1", "01", "1.5", "many", "9" * 5000)
        ),
        ({"latencies_ms": {"4": "fast"}}, r"stitches\[0\]: latencies_ms: 4: expected a number, found 'fast'"),
        ({"latencies_ms": {"4": -1}}, r"stitches\[0\]: latencies_ms: 4: expected a time in ms, finite and not neg"),
        ({"latencies_ms": {"4": None}}, r"stitches\[0\]: latencies_ms: 4: expected a number, found None"),
        ({"latency_ms": -1}, r"stitches\[0\]: latency_ms: expected a time in ms, finite and not negative, found -1.0"),
    ],
)
def test_load_says_what_is_wrong(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = tmp_path / "points.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ValueError, match=f"points.json: {message}"):
        OperatingPoints.load(path)


HUGE = ["1" + "0" * 400, "-" + "9" * 5000, "1e999"]


@pytest.mark.parametrize("number", HUGE, ids=["400", "5000", "1e999"])
@pytest.mark.parametrize(
    "key",
    [
        "id",
        "flops",
        "params",
        "peak_memory",
        "latency_ms",
        "latencies_ms",
        "throughput",
        "metrics",
        "input_shape",
        "depths",
    ],
)
def test_a_number_that_no_float_holds_is_refused(key: str, number: str, tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    values = {"metrics": {"mIoU": "?"}, "latencies_ms": {"4": "?"}, "input_shape": ["?", 4], "depths": ["?"]}
    spoilt: dict[str, Any] = document(**({} if key in ("peak_memory", "throughput") else {key: values.get(key, "?")}))
    if key in ("peak_memory", "throughput"):
        spoilt["stitches"][0][key] = "?"
    path.write_text(json.dumps(spoilt).replace('"?"', number))
    with pytest.raises(
        ValueError, match=rf"points\.json: .*{key}: .*expected a.* number, found '{number[:20]}"
    ) as caught:
        OperatingPoints.load(path)
    assert len(str(caught.value)) < 300
    assert ("in stitch 'S'" in str(caught.value)) == (key not in ("input_shape", "depths"))


@pytest.mark.parametrize("number", [10**400, -(10**5000), Fraction(10**400)], ids=["400", "5000", "fraction"])
@pytest.mark.parametrize("key", ["id", "flops", "latency_ms", "metrics"])
def test_python_numbers_that_no_float_holds_are_refused(key: str, number: Any, tmp_path: Path) -> None:
    entry = point(0, 1, 1.0).to_json() | {key: {"mIoU": number} if key == "metrics" else number}
    with pytest.raises(ValueError, match=rf"^{key}: .*expected a .*number, found .*, in stitch '"):
        OperatingPoint.from_json(entry)


def test_load_refuses_two_points_of_one_id(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    spoilt = document()
    spoilt["stitches"] = [*spoilt["stitches"], {**spoilt["stitches"][0], "name": "L"}]
    path.write_text(json.dumps(spoilt))
    with pytest.raises(ValueError, match=r"points.json: expected each id once, found id 0 twice, for S and L"):
        OperatingPoints.load(path)


@pytest.mark.parametrize("content", [b"", b"mIoU 46", b"\xff\xfe\x00", b'{"schema": NaN}', b"[" * 100_000])
def test_load_refuses_what_is_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "points.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"points.json: expected operating points in JSON, found no valid JSON"):
        OperatingPoints.load(path)


def test_load_refuses_json_that_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "points.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"points.json: expected a JSON object with schema 1, found \[1, 2\]"):
        OperatingPoints.load(path)


def test_load_of_a_missing_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"points.json: no such file; tools/test.py"):
        OperatingPoints.load(tmp_path / "points.json")


def test_a_wrong_type_in_code_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"flops: expected a whole number, found 1.5"):
        point(0, 1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="names that are strings, found 3"):
        point(0, 1, metrics={3: 1.0})
    with pytest.raises(TypeError, match="expected operating points, found 'S'"):
        run("S")  # type: ignore[arg-type]


def test_points_are_values() -> None:
    metrics = {"mIoU": 1.0}
    one = point(0, 1, metrics=metrics)
    metrics["mIoU"] = 2.0
    assert one.metrics == {"mIoU": 1.0}
    assert len({one, point(0, 1, 1.0)}) == 1
    assert [OperatingPoint(0, "x", kind, 1, 1).is_anchor for kind in ("S", "L", "A", "SL", "LSL")] == [True] * 3 + [
        False
    ] * 2


@pytest.mark.parametrize("module", [operating_points, writing, metric_names])
def test_the_module_is_data_alone(module: ModuleType) -> None:
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    imported = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {writing.__name__, metric_names.__name__, "mmsnnet.errors", "mmsnnet.files.locking"}
    assert {name.split(".")[0] for name in imported - own} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("entry", [dict(name="\ud800"), dict(kind="\ud800"), dict(metrics={"\ud800": 1.0})])
def test_text_that_no_file_holds_is_refused_with_the_stitch(entry: dict[str, Any], tmp_path: Path) -> None:
    point = dict(id=0, name="S", kind="S", flops=5, params=5, metrics={}) | entry
    document = dict(schema=OperatingPoints.schema, config=None, checkpoint=None, dataset="d", input_shape=[4, 4])
    (tmp_path / "p.json").write_text(json.dumps(document | dict(device=None, stitches=[point])))
    with pytest.raises(ValueError, match=r"p\.json: stitches\[0\]: .*surrogates not allowed, in stitch"):
        OperatingPoints.load(tmp_path / "p.json")
