import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from mmsnnet.apis import build_model, load_config
from mmsnnet.evaluation import OperatingPoints
from mmsnnet.evaluation.latencies import batch_latencies

REPOSITORY = Path(__file__).parents[2]
Done = subprocess.CompletedProcess[str]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``here(name, *arguments)`` runs an analysis tool in this process, where the imports are done."""

    def run(name: str, *arguments: object) -> Done:
        path = REPOSITORY / "tools" / "analysis_tools" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        code: Any = 0
        # Not pytest's capture, which closes what it gives: mmengine's logger holds on to the stream that it finds.
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as leave:
                code = leave.code
        return Done(sys.argv, code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def config(segmentor_config: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    """A config of a tiny segmentor with the stitches S, L, SL and LS."""
    path = tmp_path / "tiny.py"
    path.write_text(f"default_scope = 'mmseg'\nmodel = {segmentor_config()!r}\n")
    return path


def is_refused(done: Done, message: str) -> None:
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and message in errors[0], done.stderr


@pytest.mark.slow
def test_latencies_are_added_to_the_file_of_get_flops(config: Path, here: Callable[..., Done], tmp_path: Path) -> None:
    path, checkpoint = tmp_path / "points.json", tmp_path / "model.pth"
    shape = ("--shape", 32, 48)
    assert here("get_flops", config, "--out", path, *shape).returncode == 0
    before = json.loads(path.read_text())
    assert len(before["stitches"]) == 4
    torch.save({"state_dict": build_model(load_config(config)).state_dict()}, checkpoint)
    options = ("--checkpoint", checkpoint, "--out", path, "--device", "cpu", "--warmup", 1, "--repeats", 3)
    options += ("--batch-sizes", 2, "--precision", "bf16", "--channels-last", *shape)

    done = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "analysis_tools" / "benchmark.py", config, *map(str, options)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "60"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())
    for old, new in zip(before["stitches"], after["stitches"], strict=True):
        latency, throughput = new.pop("latency_ms"), new.pop("throughput")
        assert latency > 0 and throughput == pytest.approx(2 * 1000 / latency)
        assert new == old
    how = after.pop("benchmark")
    assert {key: how[key] for key in ("threads", "batch_size", "precision", "channels_last", "warmup", "repeats")} == {
        "threads": 1,
        "batch_size": 2,
        "precision": "bf16",
        "channels_last": True,
        "warmup": 1,
        "repeats": 3,
    }
    assert "batch_sizes" not in how
    del before["stitches"], after["stitches"]
    assert after == before

    lines = done.stdout.splitlines()
    assert "32 x 48" in done.stdout and how["device"] in done.stdout and "channels last" in done.stdout
    header = ["id", "name", "kind", "GFLOPs", "latency", "(ms)", "quartiles", "(ms)", "images/s"]
    rows = [line.split() for line in lines]
    assert header in rows
    assert {row[1] for row in rows if len(row) > 1 and row[0].isdigit()} >= {"S", "L", "S0-L2", "L1-S1"}
    assert "note: peak memory is measured on a GPU only" in lines
    assert lines[-1] == f"written to {path}"

    # One stitch again; then under other conditions or at another input shape, which is refused.
    assert here("benchmark", config, "--stitches", "S", *options).returncode == 0
    assert len(OperatingPoints.load(path)) == 4
    content = path.read_bytes()
    is_refused(
        here("benchmark", config, "--stitches", "S", *options, "--precision", "fp32"), "measured under other conditions"
    )
    is_refused(here("benchmark", config, *options, "--shape", 32, 32), "input shape is (32, 48), not (32, 32)")
    assert path.read_bytes() == content


@pytest.mark.slow
def test_by_default_the_stitches_of_the_file_are_measured(
    config: Path, here: Callable[..., Done], tmp_path: Path
) -> None:
    path, quick = tmp_path / "points.json", ("--device", "cpu", "--warmup", 1, "--repeats", 1)
    assert here("benchmark", config, "--stitches", "anchors", "--out", path, *quick).returncode == 0
    assert [point.name for point in OperatingPoints.load(path)] == ["S", "L"]
    # Another batch size is allowed, because all latencies are replaced. The option's name of before works.
    assert here("benchmark", config, "--out", path, "--batch-size", 2, *quick).returncode == 0
    points = OperatingPoints.load(path)
    assert [point.name for point in points] == ["S", "L"] and points.benchmark["batch_size"] == 2
    nothing = here("benchmark", config, *quick)
    assert nothing.returncode == 0 and "written" not in nothing.stdout and "L1-S1" in nothing.stdout


@pytest.mark.slow
def test_several_batch_sizes(config: Path, here: Callable[..., Done], tmp_path: Path) -> None:
    """Each has a column of the table and a latency in the file; stitches of one file are measured at the same sizes."""
    path = tmp_path / "points.json"
    quick = ("--device", "cpu", "--warmup", 1, "--repeats", 2, "--out", path)
    done = here("benchmark", config, "--stitches", "anchors", "--batch-sizes", "4,1,2", *quick)
    assert done.returncode == 0, done.stderr
    points = OperatingPoints.load(path)
    assert (points.benchmark["batch_size"], points.benchmark["batch_sizes"]) == (1, "1,2,4")
    for point in points:
        assert list(point.latencies_ms) == [1, 2, 4] and point.latencies_ms[1] == point.latency_ms
        assert point.throughput == pytest.approx(1000 / point.latency_ms)
    assert batch_latencies(points) == {point.id: point.latencies_ms for point in points}

    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    words = " ".join(lines)
    assert "batch sizes 1,2,4" in words and "batch size 1," not in words
    header = lines.index("latency (ms) quartiles (ms) images/s")
    assert lines[header + 1] == "id name kind GFLOPs batch 1 batch 2 batch 4 batch 1 at batch"
    (small,) = (line.split() for line in lines if line.startswith("0 S S "))
    assert small[4:7] == [f"{latency:.2f}" for latency in points.points[0].latencies_ms.values()]
    best = max((1000 * size / latency, size) for size, latency in points.points[0].latencies_ms.items())
    assert small[-2:] == [f"{best[0]:.4g}", f"({best[1]})"]

    content = path.read_bytes()
    is_refused(here("benchmark", config, "--stitches", "S", *quick), "batch_size 1,2,4 instead of 1")
    is_refused(
        here("benchmark", config, "--stitches", "S", "--batch-sizes", "1,4", *quick), "batch_size 1,2,4 instead of 1,4"
    )
    assert path.read_bytes() == content
    assert here("benchmark", config, "--stitches", "S", "--batch-sizes", "1,2,4", *quick).returncode == 0
    assert here("benchmark", config, *quick).returncode == 0
    assert not any(point.latencies_ms for point in OperatingPoints.load(path))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stitches", "X9"), "no stitch 'X9'"),
        (("--repeats", "0"), "repeats is at least 1, got 0"),
        (("--batch-sizes", "1,0"), "batch sizes are numbers of at least 1, each once, such as 1,2,4,8; got 1,0"),
        (("--batch-sizes", "4,2,4"), "batch sizes are numbers of at least 1, each once, such as 1,2,4,8; got 4,2,4"),
        (("--batch-sizes", "1,two"), "expected numbers of images, such as 1,2,4,8; got '1,two'"),
        (("--batch-size", "1.5"), "expected numbers of images, such as 1,2,4,8; got '1.5'"),
        (("--checkpoint", "nowhere.pth"), "nowhere.pth"),
        (("--cuda-graph",), "a CUDA graph needs a GPU"),
        (("--shape", "0", "32"), "both positive"),
    ],
)
def test_a_mistake_gets_one_line_and_no_file(
    config: Path, here: Callable[..., Done], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    out = tmp_path / "points.json"
    is_refused(here("benchmark", config, "--out", out, "--device", "cpu", *options), message)
    assert not out.exists()
