"""A trained front on its way into a product: exported, evaluated, timed, and run without torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from mmsnnet.apis import Predictor, build_model, load_config
from mmsnnet.errors import MissingFileError, SettingError
from mmsnnet.evaluation import OperatingPoints
from tests.conftest import Tool
from tests.deployment.families import REPOSITORY, segmentor

Options = Callable[..., list[str]]
# Torch and the toolboxes look as if they were not installed.
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "mmsnnet", "mmengine", "mmseg", "mmcv", "cv2"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


STITCHES = "S,L,S0-L2"


class Exported(NamedTuple):
    """A published model, its operating points by PyTorch, and its exported front."""

    published: Path
    points: Path
    folder: Path


@pytest.fixture(scope="module")
def exported(tool: Tool, quickstart: Options, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exported")
    config, run = folder / "tiny.py", folder / "run"
    settings = segmentor(data)
    settings.optim_wrapper.optimizer.lr = 3e-3
    settings.optim_wrapper.paramwise_cfg = dict(anchor_lr_mult=1.0)
    settings.param_scheduler = None
    settings.dump(config)
    tool("train", config, "--work-dir", run, *quickstart(150, train_cfg__val_begin=999, train_dataloader__batch_size=8))
    checkpoint, points = run / "iter_150.pth", folder / "points.json"
    tool("test", config, checkpoint, "--out", points, "--work-dir", run, *quickstart(1))
    tool("misc/publish_model", config, checkpoint, folder / "published", "--points", points)
    published = folder / "published"
    # With the points of all stitches: which of them are on the published front depends on the training.
    arguments = (published / "config.py", published, STITCHES, "--points", points, "--out", folder / "onnx")
    done = tool("deployment/export", *arguments, *quickstart(1))
    assert f"{folder / 'onnx'}: " in done.stdout and ".onnx: difference" in done.stderr
    return Exported(published, points, folder / "onnx")


def ort_predict(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ort_predict.py where neither torch nor the toolboxes can be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, REPOSITORY / "tools/deployment/ort_predict.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)


def test_the_metrics_of_an_export_are_pytorchs(
    tool: Tool, quickstart: Options, exported: Exported, tmp_path: Path
) -> None:
    arguments = (exported.published / "config.py", exported.published, "--backend", "onnx", exported.folder)
    outputs = ("--out", tmp_path / "onnx.json", "--work-dir", tmp_path)
    tool("test", *arguments, *outputs, *quickstart(1))
    expected = {point.name: point.metric("mIoU") for point in OperatingPoints.load(exported.points)}
    found = {point.name: point.metric("mIoU") for point in OperatingPoints.load(tmp_path / "onnx.json")}
    assert found and max(found.values()) > 5  # it has learned something
    assert all(abs(value - expected[name]) <= 0.05 for name, value in found.items())
    another = tmp_path / "another.pth"
    weights = torch.load(exported.published.parent / "run/iter_150.pth", weights_only=False)["state_dict"]
    weights["decode_head.conv_seg.bias"] += 1
    torch.save(dict(state_dict=weights), another)
    error = tool.error("test", arguments[0], another, *arguments[2:], *outputs, *quickstart(1))
    assert "was exported from another checkpoint than" in error
    # The file is of the export: PyTorch's run does not go on with it.
    error = tool.error("test", *arguments[:2], "--resume", *outputs, *quickstart(1))
    assert "export" in error
    missing = tool.error("test", *arguments, "--stitches", "L1-S1", *outputs, *quickstart(1))
    assert "the export has no stitch 'L1-S1'" in missing


def test_latencies_of_an_export_do_not_mix_with_pytorchs(
    tool: Tool, exported: Exported, data: Path, tmp_path: Path
) -> None:
    config, front = exported.published / "config.py", exported.folder / "front.json"
    quick = ("--batch-sizes", "1,2", "--warmup", 1, "--repeats", 2)
    tool("analysis_tools/benchmark", config, "--backend", "onnx", exported.folder, "--out", front, *quick)
    points = OperatingPoints.load(front)
    assert points.benchmark["backend"] == "onnxruntime"
    assert all(point.latency_ms and list(point.latencies_ms) == [1, 2] for point in points)
    first = next(iter(points)).name
    error = tool.error("analysis_tools/benchmark", config, "--stitches", first, "--out", front, *quick)
    assert "backend onnxruntime instead of torch" in error
    budget = max(point.latency_ms or 0 for point in points)
    done = tool("analysis_tools/select_stitch", front, "--max-latency-ms", budget)
    assert "latencies of onnxruntime" in done.stdout
    out = tmp_path / "picture.png"
    image = sorted((data / "images/validation").iterdir())[0]
    assert ort_predict(image, exported.folder, "--out", out, "--max-latency-ms", budget).returncode == 0
    error = ort_predict(image, exported.folder, "--out", out, "--max-latency-ms", 1e-9).stderr
    assert error.startswith("error: a budget of 1e-09 ms is below the cheapest stitch")


def test_a_picture_without_torch_is_pytorchs(exported: Exported, data: Path, tmp_path: Path) -> None:
    manifest = json.loads((exported.folder / "manifest.json").read_text())
    model = build_model(load_config(exported.published / "config.py"), exported.published)
    path = sorted((data / "images/validation").iterdir())[0]
    image = np.asarray(Image.open(path).convert("RGB"))
    for stitch in manifest["stitches"]:
        done = ort_predict(path, exported.folder, "--out", tmp_path / "picture.png", "--stitch", stitch["name"])
        assert done.returncode == 0 and f"stitch {stitch['name']}," in done.stdout, done.stderr
        model.backbone.set_stitch(stitch["name"])
        inputs = torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1)
        batch = model.data_preprocessor(dict(inputs=[inputs], data_samples=None))
        with torch.no_grad():
            labels = model.predict(batch["inputs"])[0].pred_sem_seg.data[0].numpy()
        expected = np.rint(0.4 * image + 0.6 * np.float32(manifest["palette"])[labels])
        picture = np.asarray(Image.open(tmp_path / "picture.png"), np.float32)
        equal = (np.abs(picture - expected) <= 1).all(axis=-1).mean()
        assert equal >= 0.999 and len(np.unique(labels)) > 1
    cheapest = min(manifest["stitches"], key=lambda stitch: stitch["flops"])
    done = ort_predict(
        path, exported.folder, "--out", tmp_path / "p.png", "--max-gflops", 1.001 * cheapest["flops"] / 1e9
    )
    assert f"stitch {cheapest['name']}," in done.stdout


def test_a_predictor_runs_an_export(exported: Exported, data: Path, tmp_path: Path) -> None:
    """With the same classes as PyTorch, for each stitch."""
    image = sorted((data / "images/validation").iterdir())[0]
    whole, export = Predictor(exported.published), Predictor(exported.folder)
    assert (whole.backend, export.backend) == ("torch", "onnxruntime")
    assert sum(parameter.numel() for parameter in export.model.parameters()) == 0
    assert export.points is not None and [point.name for point in export.points] == STITCHES.split(",")
    for point in export.points:
        expected, given = (one(image, stitch=point.name).data_sample.pred_sem_seg.data for one in (whole, export))
        assert (expected == given).double().mean() >= 0.9999
    assert export(image, max_gflops=1e3).stitch == max(export.points or (), key=lambda p: p.metric("mIoU")).name
    points, timed = OperatingPoints.load(exported.points), tmp_path / "timed.json"
    replace(points, points=tuple(replace(point, latency_ms=1.0) for point in points)).save(timed)
    with pytest.raises(SettingError, match="of the operating points are of torch, and this model runs in onnxruntime"):
        Predictor(exported.folder, points=timed).set_budget(max_latency_ms=5.0)
    with pytest.raises(MissingFileError, match="the export has no stitch 'L1-S1'"):
        export(image, stitch="L1-S1")


def test_bad_input_is_one_line(exported: Exported, data: Path, tmp_path: Path) -> None:
    folder, out, good = exported.folder, tmp_path / "out.png", tmp_path / "good.png"
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    Image.new("I;16", (64, 64)).save(tmp_path / "deep.png")
    Image.new("1", (20000, 20000)).save(tmp_path / "huge.png")
    Image.new("RGBA", (64, 64)).save(good)
    for name, message in {
        "none.png": "there is no image",
        "empty.png": "no image that can be decoded",
        "text.png": "no image that can be decoded",
        "deep.png": "more than 8 bits",
        "huge.png": "20000 x 20000 pixels",
        "good.png": "",
    }.items():
        done = ort_predict(tmp_path / name, folder, "--out", out)
        lines = done.stderr.splitlines()
        if message:
            assert done.returncode == 2 and len(lines) == 1 and message in lines[0], done.stderr
            assert not out.exists()
        else:
            assert done.returncode == 0, done.stderr
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "weights.bin"
    weights.write_bytes(weights.read_bytes()[:5000])
    done = ort_predict(good, damaged, "--out", out)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "export again" in done.stderr
    assert "no " in ort_predict(good, tmp_path, "--out", out).stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    for wrong in (
        [],
        {},
        manifest | dict(schema=2),
        {key: value for key, value in manifest.items() if key != "metric"},
        manifest | dict(stitches=[dict(manifest["stitches"][0], file="/x")]),
    ):
        (damaged / "manifest.json").write_text(json.dumps(wrong))
        done = ort_predict(good, damaged, "--out", out)
        assert done.returncode == 2 and "is no manifest of an export" in done.stderr
    for budget in ("nan", "-1", "0"):
        assert "a budget is a positive number" in ort_predict(good, folder, "--out", out, "--max-gflops", budget).stderr
    done = ort_predict(good, folder, "--out", out, "--stitch", "L9")
    assert done.stderr.startswith("error: the export has no stitch 'L9'; it has ")
