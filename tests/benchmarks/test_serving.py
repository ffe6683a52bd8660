"""The simulation of a server under load, and its command."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.serving.policy import FixedStitch, LatencyTable, LookAhead
from tests.python_processes import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from serving import main, read_front, run_trace
from serving_figures import best_of_equal_attainment, best_of_equal_quality, comparison
from serving_simulation import TRACES, arrivals, simulate

SETTINGS = dict(deadline_ms=100.0, seconds=20.0, seed=0, noise=0.05)


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """A file of ten stitches, of which the best takes ten times as long as the worst, and of one off the front."""
    stitches = []
    for number in range(10):
        ms = 4 * 10 ** (number / 9)
        latencies = {size: ms * (0.3 + 0.7 * size) for size in (1, 2, 4, 8)}
        quality = 50 - 20 * (1 - number / 9) ** 2
        stitches.append(
            OperatingPoint(number, f"stitch-{number}", "SL", number, 1, {"mIoU": quality}, ms, latencies_ms=latencies)
        )
    dominated = {1: 30.0, 2: 50.0, 4: 90.0, 8: 170.0}
    stitches.append(OperatingPoint(10, "dominated", "SL", 5, 1, {"mIoU": 25.0}, 30.0, latencies_ms=dominated))
    OperatingPoints(None, None, "shapes", (64, 64), None, tuple(stitches)).save(tmp_path / "points.json")
    return tmp_path / "points.json"


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 4])
def test_in_bursts_look_ahead_meets_deadlines_that_fixed_stitches_of_its_quality_miss(
    points: Path, replicas: int
) -> None:
    runs = run_trace(read_front(points, None, 100.0), "burst", replicas, **SETTINGS)
    policy = runs[0]
    assert policy["policy"] == "look-ahead" and policy["attained"] >= 0.99
    equal_quality, equal_attainment = best_of_equal_quality(runs, policy), best_of_equal_attainment(runs, policy)
    assert equal_quality is not None and equal_quality["attained"] < 0.9
    assert equal_attainment is not None and equal_attainment["quality"] < policy["quality"]


def test_a_seed_gives_the_same_outcome_and_another_one_another(points: Path) -> None:
    front = read_front(points, None, 100.0)
    first, again, other = (
        run_trace(front, "day", 2, **{**SETTINGS, "seconds": 2.0, "seed": seed}) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_each_request_is_answered_in_time_or_late_or_refused() -> None:
    """With exact latencies, look-ahead answers none late."""
    table = LatencyTable({"S": {1: 4, 8: 20}, "L": {1: 40, 8: 240}})
    top = table.throughput(1) / table.throughput(0)
    for name, rate in TRACES.items():
        times = list(arrivals(rate, top, 2 * table.throughput(0), 5000, seed=1))
        for policy in (LookAhead(table), FixedStitch(table, 0), FixedStitch(table, 1)):
            outcome = simulate(times, [policy] * 2, (40.0, 50.0), 100.0, noise=0)
            assert outcome.requests == len(times)
            assert outcome.attained + outcome.late + outcome.rejected == pytest.approx(1)
            assert 40 <= outcome.quality <= 50 and outcome.p50 <= outcome.p99
            if isinstance(policy, LookAhead):
                assert outcome.late == 0, name


def test_a_refused_request_is_sent_once_more() -> None:
    """One of two idle replicas refuses all: half of the requests come to it first, and half of these once more."""
    fast, slow = (FixedStitch(LatencyTable({"S": {1: ms}}), 0) for ms in (4, 400))
    times = [1000.0 * number for number in range(2000)]
    outcome = simulate(times, [fast, slow], (40.0,), 100.0)
    assert outcome.rejected == pytest.approx(0.25, abs=0.03) and outcome.attained + outcome.rejected == 1
    assert (
        simulate(times, [fast], (40.0,), 100.0).rejected == 0 and simulate(times, [slow], (40.0,), 100.0).rejected == 1
    )


def test_rates_are_shares_of_what_the_replicas_can_answer() -> None:
    for name, rate in TRACES.items():
        for top in (0.05, 0.5, 1.0):
            shares = [rate(part / 1000, top) for part in range(1000)]
            assert min(shares) >= 0 and max(shares) <= 1, name
            expected = 10_000 * sum(shares) / len(shares)
            assert len(list(arrivals(rate, top, 2.0, 5000, seed=0))) == pytest.approx(expected, rel=0.15, abs=30)


def run(policy: str, attained: float, quality: float | None) -> dict[str, Any]:
    return dict(policy=policy, adaptive=policy == "look-ahead", attained=attained, quality=quality)


def test_fixed_stitches_of_equal_quality_and_of_equal_attainment() -> None:
    policy = run("look-ahead", 0.995, 40.0)
    runs = [policy, run("a", 1, 30), run("b", 0.991, 35), run("c", 0.8, 40), run("d", 0.7, 45), run("e", 0, None)]
    assert best_of_equal_quality(runs, policy) == run("c", 0.8, 40)
    assert best_of_equal_attainment(runs, policy) == run("b", 0.991, 35)
    assert best_of_equal_attainment(runs, run("look-ahead", 0.75, 40)) == run("c", 0.8, 40)
    assert best_of_equal_quality(runs, run("look-ahead", 1, 50)) is None
    assert "quality: c, 80.00 % attained at 40.00" in comparison(runs)[0]


def test_a_metric_of_which_less_is_better() -> None:
    policy = run("look-ahead", 0.995, 0.5)
    runs = [policy, run("a", 1, 0.9), run("b", 0.991, 0.8), run("c", 0.8, 0.5), run("d", 0.7, 0.4)]
    assert best_of_equal_quality(runs, policy, higher=False) == run("c", 0.8, 0.5)
    assert best_of_equal_attainment(runs, policy, higher=False) == run("b", 0.991, 0.8)


def test_the_front_leaves_out_what_is_dominated_and_batches_that_are_late_even_on_the_cheapest_stitch(
    points: Path,
) -> None:
    front = read_front(points, None, 20.0)
    assert front.table.names == tuple(f"stitch-{number}" for number in range(10))
    assert front.metric == "mIoU" and front.qualities[0] == 30 and front.qualities[-1] == 50
    assert front.table.max_batch == 4  # eight take 23.6 ms


@pytest.mark.slow
def test_the_command_writes_tables_results_and_a_picture(
    points: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "results.json", tmp_path / "picture.png"
    sizes = ["--replicas", "1,2", "--traces", "steady,burst", "--seconds", "2"]
    main(["simulate", "--points", str(points), *sizes, "--out", str(out), "--picture", str(picture)])
    tables = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert len(results["runs"]) == 2 * 2 * (3 + 10)
    assert list(results["latencies_ms"]) == [f"stitch-{number}" for number in range(10)]
    assert tables.count("| policy | attained (%) | mean mIoU |") == 4
    assert "**burst**, 2 replicas: " in tables and "\n| stitch-9 | " in tables
    assert tables.count("Best fixed stitch with at least this quality: ") == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--points", "missing.json"], "missing.json: no such file"),
        (["--traces", "burst,storm"], "no trace 'storm'; there are steady, ramp, burst, day"),
        (["--replicas", "0"], "invalid counts value: '0'"),
        (["--deadline-ms", "3"], "the cheapest stitch takes 4 ms: set --deadline-ms above it, not to 3"),
        (["--metric", "PQ"], "has no metric 'PQ'"),
    ],
)
def test_mistakes_are_one_line(
    points: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["simulate", "--points", str(points), *arguments])
    assert ended.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last
