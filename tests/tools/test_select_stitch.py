import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from tests.conftest import Tool

Main = Callable[[list[str]], int]
REPOSITORY = Path(__file__).parents[2]
TOOL = "analysis_tools/select_stitch"
POINTS = (
    OperatingPoint(0, "S", "S", 32_500_000_000, 23_000_000, {"aAcc": 80.5, "mIoU": 45.5}, 9.0),
    OperatingPoint(1, "L", "L", 363_000_000_000, 307_000_000, {"aAcc": 82.5, "mIoU": 51.5}, 40.0),
    OperatingPoint(2, "S0-L2", "SL", 300_000_000_000, 290_000_000, {"aAcc": 80.0, "mIoU": 44.0}, 30.0),
    OperatingPoint(40, "L5-S4-L18", "LSL", 250_000_000_000, 301_000_000, {"aAcc": 81.5, "mIoU": 46.5}, 22.0),
    OperatingPoint(57, "L5-S3-L12", "LSL", 226_000_000_000, 301_000_000, {"aAcc": 81.0, "mIoU": 46.38}, 25.0),
)


@pytest.fixture
def points(tmp_path: Path) -> Path:
    path = tmp_path / "points.json"
    OperatingPoints("configs/a.py", "a.pth", "ADE20K", (512, 512), "cuda:0", POINTS, {"config": "1f"}).save(path)
    return path


def test_prints_the_stitch_its_neighbours_and_the_line_for_a_config(points: Path, tool: Tool) -> None:
    """Over FLOPs the front is S, L5-S3-L12, L5-S4-L18, L."""
    done = tool.attempt(
        TOOL, points.name, "--max-gflops", 240, "--out", "fronts/front.json", cwd=points.parent, columns=40
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "The best of 5 stitches within 240 GFLOPs is 57 (L5-S3-L12); its neighbours on the front:"
    result = [line.split() for line in lines]
    assert ["id", "name", "kind", "GFLOPs", "params", "(M)", "latency", "(ms)", "mIoU", "aAcc", "mark"] in result
    rows = [line for line in result if line and line[0].isdigit()]
    assert [row[0] for row in rows] == ["0", "57", "40"]
    assert rows[1] == ["57", "L5-S3-L12", "LSL", "226.00", "301.00", "25.00", "46.38", "81.00", "front"]
    assert lines[-2:] == [
        "stitch='L5-S3-L12'  # in model.backbone of the config",
        f"{os.path.join('fronts', 'front.json')}: 4 stitches",
    ]
    front = OperatingPoints.load(points.parent / "fronts" / "front.json")
    expected = [replace(p, metrics={"mIoU": p.metrics["mIoU"]}) for p in POINTS if p.name != "S0-L2"]
    assert (list(front), front.dataset) == (expected, "ADE20K")


@pytest.mark.slow
def test_a_budget_below_the_cheapest_is_an_error_and_writes_nothing(points: Path, tool: Tool) -> None:
    before = points.read_bytes()
    done = tool.attempt(TOOL, points, "--max-gflops", 30, "--out", "front.json", cwd=points.parent, columns=40)
    message = "error: a budget of 30.0 GFLOPs is below the cheapest stitch, 0 (S), which needs 32.5 GFLOPs\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
    assert os.listdir(points.parent) == [points.name] and points.read_bytes() == before


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command in this process: a new process takes seconds to start."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools" / "analysis_tools"))
    import select_stitch as command

    return command.main


@pytest.mark.parametrize(
    ("options", "budget", "name", "rows"),
    [
        (["--max-gflops", "32.5"], "32.5 GFLOPs", "S", ["0", "57"]),
        (["--max-gflops", "1e6"], "1e+06 GFLOPs", "L", ["40", "1"]),
        # Over latency the front is S, L5-S4-L18, L.
        (["--max-latency-ms", "39"], "39 ms", "L5-S4-L18", ["0", "40", "1"]),
        (["--max-gflops", "300", "--metric", "aAcc"], "300 GFLOPs", "L5-S4-L18", ["57", "40", "1"]),
        (["--max-gflops", "300", "--better", "lower"], "300 GFLOPs", "S0-L2", ["0", "2"]),
    ],
)
def test_choices_that_were_made_by_hand(
    points: Path, main: Main, capsys: pytest.CaptureFixture[str], options: list[str], budget: str, name: str, rows: list
) -> None:
    assert main([str(points), *options]) == 0
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert f"within {budget} is " in lines[0] and f" ({name}); " in lines[0]
    assert [line.split()[0] for line in lines if line.strip()[:1].isdigit()] == rows
    assert (lines[-1], error) == (f"stitch='{name}'  # in model.backbone of the config", "")
    assert os.listdir(points.parent) == [points.name]


def without(**changes: object) -> tuple[OperatingPoint, ...]:
    return (replace(POINTS[0], **changes), *POINTS[1:])


@pytest.mark.parametrize(
    ("changed", "options", "message"),
    [
        (
            POINTS,
            ["--max-latency-ms", "8"],
            "a budget of 8.0 ms is below the cheapest stitch, 0 (S), which needs 9.0 ms",
        ),
        (POINTS, ["--max-gflops", "99", "--metric", "mAP"], "stitch 0 (S) has no metric 'mAP'; it has aAcc, mIoU"),
        (POINTS, ["--max-gflops", "-1"], "max_gflops: expected a positive number, found -1.0"),
        (
            without(latency_ms=None),
            ["--max-latency-ms", "8"],
            "stitch 0 (S) has no latency_ms: tools/analysis_tools/benc",
        ),
        (
            (replace(POINTS[0], metrics={}),),
            ["--max-gflops", "99"],
            "expected points with metrics, found none: tools/test",
        ),
        ((replace(POINTS[0], metrics={"mIoU": math.nan}),), ["--max-gflops", "99"], "no stitch has a finite mIoU"),
        ((replace(POINTS[0], metrics={"q": 1.0}),), ["--max-gflops", "99"], "metric 'q' is not known"),
        ((), ["--max-gflops", "99"], "expected operating points, found none"),
    ],
)
def test_mistakes(
    points: Path,
    main: Main,
    capsys: pytest.CaptureFixture[str],
    changed: tuple[OperatingPoint, ...],
    options: list[str],
    message: str,
) -> None:
    replace(OperatingPoints.load(points), points=changed).save(points)
    out = points.parent / "front.json"
    out.write_bytes(b"old")
    assert main([str(points), "--out", str(out), *options]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.startswith(f"error: {message}") and len(error.splitlines()) == 1
    assert out.read_bytes() == b"old"


def test_a_damaged_and_a_missing_file(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    points.write_bytes(points.read_bytes()[:-20])
    for path, message in ((points, "expected operating points in JSON"), (points.parent / "no.json", "no such file")):
        assert main([str(path), "--max-gflops", "99", "--out", str(points.parent / "front.json")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {path}: {message}")
    assert os.listdir(points.parent) == [points.name]


def test_the_input_file_is_not_written(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    before = points.read_bytes()
    link = points.parent / "link.json"
    link.symlink_to(points)
    for out in (points, link):
        assert main([str(points), "--max-gflops", "240", "--out", str(out)]) == 2
        assert "is the input file" in capsys.readouterr().err
    assert points.read_bytes() == before


@pytest.mark.parametrize("options", [[], ["--max-gflops", "99", "--max-latency-ms", "9"], ["--max-gflops", "many"]])
def test_exactly_one_budget(points: Path, main: Main, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([str(points), *options])
    assert stopped.value.code == 2 and "--max-gflops" in capsys.readouterr().err.splitlines()[-1]
