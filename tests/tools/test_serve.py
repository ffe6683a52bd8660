"""Mistakes are told in one line, before Ray is imported, where that can be."""

import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmsnnet.deployment.manifest import MANIFEST, ExportedStitch, Manifest
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.stitching import StitchSpace
from tests.ports import free_port

TOOL = Path(__file__).parents[2] / "tools/serve.py"
SPACE = StitchSpace.two_way((2, 4))
Run = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the tool reads of a published model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.py").write_text("")
    stitches = (SPACE["S"], SPACE["L"])
    points = (OperatingPoint(s.id, s.name, s.kind, 1000 + s.id, 10, {"mIoU": 30.0 + s.id}) for s in stitches)
    OperatingPoints(None, None, None, (32, 32), None, tuple(points)).save(folder / "front.json")
    return folder


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """``error(*arguments)``: runs the tool where Ray is not installed; returns the last line that it prints."""
    monkeypatch.delenv("MMSNNET_TOKEN", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("replica", "service"):
        monkeypatch.delitem(sys.modules, f"mmsnnet.serving.{name}", raising=False)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, arguments)])
        before = os.environ.copy()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(TOOL), run_name="__main__")
        finally:
            os.environ.clear()
            os.environ.update(before)
        printed = capsys.readouterr()
        assert ended.value.code == 2 and printed.out == ""
        return printed.err.splitlines()[-1]

    return run


def test_a_folder_without_a_model(error: Run, folder: Path, tmp_path: Path) -> None:
    assert error(tmp_path / "nowhere").endswith("has no config.py: expected a folder of publish_model.py or export.py")
    (folder / "front.json").unlink()
    assert "front.json does not exist, and a server chooses among operating points" in error(folder)
    assert "nowhere.json does not exist" in error(folder, "--points", tmp_path / "nowhere.json")


def test_operating_points_that_do_not_serve(error: Run, folder: Path, tmp_path: Path) -> None:
    assert "config.py" in error(folder, "--points", folder / "config.py")  # no JSON
    assert "mAP" in error(folder, "--metric", "mAP")
    OperatingPoints(None, None, None, (32, 32), None).save(tmp_path / "none.json")
    assert "expected operating points, found none" in error(folder, "--points", tmp_path / "none.json")


def test_points_of_stitches_that_an_export_lacks(error: Run, folder: Path) -> None:
    stitch = SPACE["S"]
    exported = ExportedStitch(stitch.id, "S", stitch.kind, "S.onnx", 1, 1)
    manifest = Manifest("segmentation", "onnx", "fp32", (32, 32), (exported,), ("logits",), {}, {})
    (folder / MANIFEST).write_text(manifest.to_json())
    (folder / "S.onnx").touch()
    assert error(folder).endswith("front.json has stitch L, which the export lacks: it has S")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("policy", "fastest", "--policy is one of look-ahead, slackfit, greedy, or a stitch, such as S; got 'fastest'"),
        ("deadline-ms", "0", "--deadline-ms is positive and finite, got 0"),
        ("deadline-ms", "nan", "--deadline-ms is positive and finite, got nan"),
        ("max-megapixels", "inf", "--max-megapixels is positive and finite, got inf"),
        ("replicas", "-1", "--replicas is positive and finite, got -1"),
        ("threads", "0", "--threads is positive and finite, got 0"),
        ("max-upload-mb", "-0.5", "--max-upload-mb is positive and finite, got -0.5"),
        ("port", "70000", "cannot serve on 127.0.0.1:70000"),
        ("host", "0.0.0.0", "--host 0.0.0.0 can be reached from other machines: set the environment variable"),
        ("host", "no.such.host.invalid", "can be reached from other machines"),
    ],
)
def test_a_wrong_setting(error: Run, folder: Path, setting: str, value: str, message: str) -> None:
    assert message in error(folder, f"--{setting}", value)


def test_a_port_that_is_taken(error: Run, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot serve on 127.0.0.1:{port}: [Errno 98] Address already in use" in error(folder, "--port", port)


def test_a_port_that_another_server_is_about_to_take(error: Run, folder: Path) -> None:
    port = free_port()
    code = f"import serve\nwith serve.port_of_one_server('127.0.0.1', {port}): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{TOOL.parent}{os.pathsep}{TOOL.parents[1]}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "\n"
        message = error(folder, "--port", port)
        other.communicate("\n")
    assert re.search(rf"127.0.0.1-{port} is in use by process {other.pid} .*: .* set another --port$", message)


def test_a_missing_package(error: Run, folder: Path) -> None:
    """Only what is right gets so far."""
    assert error(folder, "--port", free_port(), "--policy", "L").endswith(
        "ray is missing: pip install 'mmsnnet[serve]'"
    )
