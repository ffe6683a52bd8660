import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from tests.conftest import Tool

Main = Callable[[list[str]], int]
REPOSITORY = Path(__file__).parents[2]
TOOL = "analysis_tools/plot_pareto"


@pytest.fixture
def points(tmp_path: Path) -> Path:
    path = tmp_path / "points.json"
    OperatingPoints(
        "configs/quickstart/a_config_with_a_name.py",
        None,
        "shapes",
        (64, 64),
        "cpu",
        (
            OperatingPoint(0, "S", "S", 32_000_000, 23_000_000, {"mIoU": 45.5}),
            OperatingPoint(1, "L", "L", 363_000_000, 307_000_000, {"mIoU": 51.5}),
            OperatingPoint(57, "L5-S3-L12", "LSL", 226_000_000, 301_000_000, {"mIoU": 46.38}),
        ),
    ).save(path)
    return path


@pytest.mark.slow
def test_writes_the_picture_and_prints_the_table(points: Path, tool: Tool, tmp_path: Path) -> None:
    done = tool.attempt(TOOL, points, "--out", "plots/pareto.png", "--table", cwd=tmp_path, columns=40)
    assert (done.returncode, done.stderr) == (0, "")
    first, *table = done.stdout.splitlines()
    assert first == os.path.join("plots", "pareto.png")
    with Image.open(tmp_path / first) as image:
        image.load()
        assert image.size == (1200, 750)
    result = [line.split() for line in table]
    assert ["id", "name", "kind", "MFLOPs", "params", "(M)", "mIoU", "mark"] in result
    assert ["57", "L5-S3-L12", "LSL", "226.00", "301.00", "46.38", "front"] in result


@pytest.mark.slow
def test_help(tool: Tool, tmp_path: Path) -> None:
    done = tool.attempt(TOOL, "--help", cwd=tmp_path, columns=40)
    assert done.returncode == 0
    assert all(
        option in done.stdout for option in ("--out", "--metric", "--table", "--cost", "--better", "--reference")
    )


@pytest.mark.slow
def test_a_broken_file_is_an_error_and_overwrites_nothing(points: Path, tool: Tool, tmp_path: Path) -> None:
    out = tmp_path / "pareto.png"
    out.write_bytes(b"old")
    points.write_bytes(points.read_bytes()[:-20])
    done = tool.attempt(TOOL, points, "--out", out, cwd=tmp_path, columns=40)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {points}: expected operating points in JSON, found no valid JSON")
    assert len(done.stderr.splitlines()) == 1 and out.read_bytes() == b"old"


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Main:
    """The command in this process: a new process takes seconds to start."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools" / "analysis_tools"))
    import plot_pareto as command

    return command.main


@pytest.mark.slow
def test_several_runs_as_svg(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = points.parent / "pareto.svg"
    assert main([str(points), str(points), "--metric", "mIoU", "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    assert ElementTree.parse(out).getroot().tag.endswith("svg")


@pytest.mark.slow
def test_a_page(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = points.parent / "pareto.html"
    assert main([str(points), "--out", str(out)]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")
    page = out.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "L5-S3-L12" in page


def test_a_reference(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    out = points.parent / "pareto.svg"
    arguments = ["--out", str(out), "--reference", "ade20k"]
    assert main([str(changed(points, "ade20k.json", dataset="ADE20KDataset")), *arguments]) == 0
    assert out.is_file()
    out.write_bytes(b"old")
    capsys.readouterr()
    assert main([str(points), *arguments]) == 2
    assert "reference ade20k is for ADE20KDataset, but the operating points are for shapes" in capsys.readouterr().err
    assert out.read_bytes() == b"old"


def changed(points: Path, name: str, **changes: object) -> Path:
    path = points.parent / name
    path.write_text(json.dumps({**json.loads(points.read_text()), **changes}))
    return path


STITCH = {"id": 0, "name": "S", "kind": "S", "flops": 5, "params": 6, "metrics": {"rmse": 1.5, "abs_rel": 0.1}}


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"dataset": "NYUv2"}, [], "runs of different data sets cannot share a plot, found shapes, NYUv2"),
        ({"stitches": [STITCH]}, [], "expected a metric that all points have, found mIoU, rmse, abs_rel"),
        ({"stitches": [STITCH]}, ["--metric", "mIoU"], "stitch 0 (S) has no metric 'mIoU'; it has rmse, abs_rel"),
        ({"stitches": []}, [], "has no stitches"),
        ({"schema": 2}, [], "schema: expected 1, found 2"),
        ({}, ["--metric", "mAP"], "stitch 0 (S) has no metric 'mAP'; it has mIoU"),
        ({}, ["--metric", "mAP", "--table"], "stitch 0 (S) has no metric 'mAP'; it has mIoU"),
        ({}, ["--cost", "latency_ms"], "stitch 0 (S) has no latency_ms"),
    ],
)
def test_mistakes(
    points: Path, main: Main, capsys: pytest.CaptureFixture[str], changes: dict, options: list[str], message: str
) -> None:
    out = points.parent / "pareto.png"
    out.write_bytes(b"old")
    other = changed(points, "other.json", **changes)
    assert main([str(points), str(other), "--out", str(out), *options]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("error: ") and message in output.err
    assert out.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "metric", "front"),
    [
        ([], "abs_rel", ["S", "L"]),
        (["--metric", "rmse"], "rmse", ["S"]),
        (["--metric", "rmse", "--better", "higher"], "rmse", ["S", "L"]),
        (["--metric", "quality", "--better", "higher"], "quality", ["S"]),
        (["--metric", "quality", "--better", "lower"], "quality", ["S", "L"]),
    ],
)
def test_which_metric_and_which_way(
    points: Path, main: Main, capsys: pytest.CaptureFixture[str], options: list[str], metric: str, front: list[str]
) -> None:
    metrics = ({"rmse": 1.5, "abs_rel": 0.1, "quality": 3.0}, {"rmse": 1.6, "abs_rel": 0.05, "quality": 2.0})
    stitches = [STITCH | {"metrics": metrics[0]}, STITCH | {"id": 1, "name": "L", "flops": 9, "metrics": metrics[1]}]
    other = changed(points, "other.json", stitches=stitches)
    assert main([str(other), "--out", str(points.parent / "pareto.png"), "--table", *options]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (header,) = (line for line in lines if line[:1] == ["id"])
    assert header[header.index("(M)") + 1] == metric
    assert [line[1] for line in lines if "front," in line] == front


def test_a_metric_of_unknown_direction(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    other = changed(points, "other.json", stitches=[STITCH | {"metrics": {"quality": 3.0, "speed": 2.0}}])
    out = points.parent / "pareto.png"
    assert main([str(other), "--out", str(out)]) == 2
    assert "which metric? The points have 2 in common: quality, speed; say which (--metric)" in (
        capsys.readouterr().err
    )
    assert main([str(other), "--out", str(out), "--metric", "quality"]) == 2
    assert "metric 'quality' is not known, nor whether more or less of it is better" in capsys.readouterr().err
    assert not out.exists()


def test_wrong_paths(points: Path, main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    folder = points.parent
    assert main([str(folder / "none.json"), "--out", str(folder / "pareto.png")]) == 2
    assert "none.json: no such file" in capsys.readouterr().err
    assert main([str(folder), "--out", str(folder / "pareto.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    before = points.read_bytes()
    assert main([str(points), "--out", str(points)]) == 2
    assert "expected a name that ends in .png, .svg or .html, found '.json'" in capsys.readouterr().err
    assert points.read_bytes() == before
    assert main([str(points), "--out", str(points / "pareto.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["a.json"],
        ["--out", "a.png"],
        ["a.json", "--out", "a.png", "--cost", "watts"],
        ["a.json", "--out", "a.png", "--reference", "cityscapes"],
    ],
)
def test_the_command_line_is_checked(main: Main, capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(args)
    assert leave.value.code == 2 and "error: " in capsys.readouterr().err
