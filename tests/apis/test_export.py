"""Exports compute what PyTorch computes, for every family and task, and store each weight once."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from torch import Tensor

from mmsnnet.apis import ExportSettings, build_model, export_stitches
from mmsnnet.datasets import write_shapes
from mmsnnet.deployment.comparison import Difference, compare
from mmsnnet.deployment.exporter import ExportError
from mmsnnet.deployment.manifest import Manifest
from mmsnnet.errors import DataError, MissingFileError, SettingError
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import find_stitched_backbone, model_costs
from tests.deployment.families import (
    REPOSITORY,
    classifier,
    depth_estimator,
    detector,
    random_checkpoint,
    segmentor,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", "shapes", 1, 3, (64, 64))


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[..., tuple[Path, Path]]:
    """``export(config, stitches, **settings)``: a folder of exports, and the checkpoint."""

    def run(config: Config, stitches: Any = "anchors", **settings: Any) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("export")
        checkpoint = random_checkpoint(config, folder / "model.pth")
        images = data / "images/validation"
        export_stitches(config, checkpoint, stitches, folder / "out", ExportSettings(**settings), images=images)
        return folder / "out", checkpoint

    return run


def outputs_of(path: Path, images: Tensor) -> dict[str, Tensor]:
    """The outputs of a graph, by ONNX Runtime alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()})), strict=True))


def images_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def expected_of(config: Config, checkpoint: Path, stitch: str, images: Tensor) -> dict[str, Tensor]:
    """A task's outputs by the toolbox's own code."""
    model = build_model(config, checkpoint)
    find_stitched_backbone(model).set_stitch(stitch)
    meta = dict(img_shape=images.shape[-2:], ori_shape=images.shape[-2:], pad_shape=images.shape[-2:])
    with torch.no_grad():
        if hasattr(model, "encode_decode"):
            [name] = ["depth" if "Depth" in type(model).__name__ else "logits"]
            return {name: model.encode_decode(images, [meta])}
        if hasattr(model, "roi_head"):
            maps = model.extract_feat(images)
            scores, boxes = model.rpn_head(maps)
            return {
                f"{name}_{index}": tensor
                for name, tensors in (("map", maps), ("rpn_cls_score", scores), ("rpn_bbox_pred", boxes))
                for index, tensor in enumerate(tensors)
            }
        return {"logits": model(images, mode="tensor")}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bias", "rotary"])
def test_a_segmentor_of_each_plain_family(family: str, data: Path, export: Callable[..., Any]) -> None:
    """With learned relative positions, padded windows and rotary positions; for every batch size."""
    config = segmentor(data, family)
    folder, checkpoint = export(config, ["S0-L2"])
    for batch in (1, 3):
        images = images_of(batch, 3, 64, 64)
        expected = expected_of(config, checkpoint, "S0-L2", images)
        found = compare(outputs_of(folder / "S0-L2.onnx", images), expected)
        assert found.difference <= 1e-4 and found.agreement is not None and found.agreement >= 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixed", "levit"])
def test_a_classifier_of_each_family(family: str, export: Callable[..., Any]) -> None:
    """With shifted windows, batch norms and a change of the layout at the stitch."""
    config = classifier(family)
    space = find_stitched_backbone(build_model(config)).space
    stitch = next(stitch for stitch in space if len(stitch.segments) == 2)
    folder, checkpoint = export(config, [stitch.id])
    images = images_of(3, 3, 64, 64)
    given = outputs_of(folder / Manifest.load(folder)[stitch.id].file, images)
    assert compare(given, expected_of(config, checkpoint, stitch.name, images)).difference <= 1e-4


@pytest.mark.slow
def test_a_depth_estimator(export: Callable[..., Any]) -> None:
    config = depth_estimator()
    folder, checkpoint = export(config, ["S0-L2"])
    images = images_of(1, 3, 64, 96)
    given = outputs_of(folder / "S0-L2.onnx", images)
    assert given["depth"].shape == (1, 1, 64, 96)
    assert compare(given, expected_of(config, checkpoint, "S0-L2", images)).difference <= 1e-4


@pytest.mark.slow
@pytest.mark.detection
def test_a_two_stage_detector_up_to_proposals_and_its_heads_behind_them(export: Callable[..., Any]) -> None:
    config = detector("mask-rcnn")
    folder, checkpoint = export(config, ["S0-L2"])
    images = images_of(1, 3, 64, 64)
    given = outputs_of(folder / "S0-L2.onnx", images)
    assert compare(given, expected_of(config, checkpoint, "S0-L2", images)).difference <= 1e-4
    model, regions = build_model(config, checkpoint), images_of(5, model_channels(config), 7, 7)
    with torch.no_grad():
        scores, boxes = model.roi_head.bbox_head(regions)
        masks = model.roi_head.mask_head(images_of(2, model_channels(config), 14, 14))
    heads = outputs_of(folder / "bbox_head.onnx", regions)
    assert compare(heads, dict(cls_score=scores, bbox_pred=boxes)).difference <= 1e-4
    found = outputs_of(folder / "mask_head.onnx", images_of(2, model_channels(config), 14, 14))
    assert compare(found, dict(mask_pred=masks)).difference <= 1e-4


def model_channels(config: Config) -> int:
    return config.model.neck.out_channels


@pytest.mark.slow
@pytest.mark.detection
@pytest.mark.parametrize("name", ["rtmdet", "retinanet"])
def test_a_one_stage_detector_up_to_nms(name: str, export: Callable[..., Any]) -> None:
    """mmdet's own decoding, without its thresholds, gives the boxes and scores."""
    config = detector(name)
    folder, checkpoint = export(config, ["L"])
    images = images_of(2, 3, 64, 64)
    given = outputs_of(folder / "L.onnx", images)
    model = build_model(config, checkpoint)
    model.backbone.set_stitch("L")
    metas = [dict(img_shape=(9999, 9999), scale_factor=(1.0, 1.0))] * 2  # boxes are clipped at 0 alone
    settings = model.test_cfg.copy()
    settings.update(score_thr=-1.0, nms_pre=-1)
    with torch.no_grad():
        scores, boxes = model.bbox_head(model.extract_feat(images))
        results = model.bbox_head.predict_by_feat(scores, boxes, batch_img_metas=metas, cfg=settings, with_nms=False)
    for index, result in enumerate(results):
        # mmdet gives a row for each box and class.
        order = torch.argsort(result.scores, descending=True)[:50]
        best = torch.argsort(given["scores"][index].flatten(), descending=True)[:50]
        assert torch.allclose(given["scores"][index].flatten()[best], result.scores[order], atol=1e-4)
        # Many scores are equal, so each of mmdet's boxes is looked up among all; mmdet clips them to the image.
        boxes = given["boxes"][index].clamp(min=0).double()
        distances = torch.cdist(result.bboxes[order].double(), boxes)
        assert distances.min(dim=1).values.max() <= 0.05 and len(result.bboxes[order].unique(dim=0)) > 5
    raw = {name: value for name, value in given.items() if name.startswith("cls_score_")}
    assert compare(raw, {f"cls_score_{i}": s for i, s in enumerate(scores)}).difference <= 1e-4


@pytest.fixture(scope="module")
def front(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """The folder of an exported front, and what the export returned."""
    folder, config = tmp_path_factory.mktemp("front"), segmentor(data)
    checkpoint = random_checkpoint(config, folder / "model.pth")
    model = build_model(config)
    space, costs = find_stitched_backbone(model).space, model_costs(model)
    points = OperatingPoints(str(config.filename), None, None, (64, 64), None, benchmark={"backend": "torch"})
    # One is worse than S, which is cheaper.
    for name, quality in (("S", 30.0), ("L1-S1", 20.0), ("S0-L2", 35.0), ("L", 40.0)):
        stitch, cost = space[name], costs[space[name].id]
        point = OperatingPoint(stitch.id, stitch.name, stitch.kind, cost.flops, cost.params, {"mIoU": quality}, 7.0)
        points = points.add(replace(point, latencies_ms={1: 7.0, 4: 20.0}))
    points.save(folder / "points.json")
    return folder, export_stitches(config, checkpoint, "front", folder / "out", points=folder / "points.json")


@pytest.mark.slow
def test_each_weight_is_stored_once(front: tuple[Path, Manifest]) -> None:
    """Of all stitches together, little more than the checkpoint; and nothing of this machine."""
    folder, checkpoint = front[0] / "out", front[0] / "model.pth"
    manifest = Manifest.load(folder)
    assert [stitch.name for stitch in manifest.stitches] == ["S", "L", "S0-L2"]
    weights = sum(tensor.nbytes for tensor in torch.load(checkpoint)["state_dict"].values())
    alignment = 4096 * 60  # tiny weights fill few pages
    assert (folder / manifest.weights).stat().st_size <= 1.1 * weights + alignment
    for stitch in manifest.stitches:
        onnx.checker.check_model(folder / stitch.file)
        assert (folder / stitch.file).stat().st_size < 200_000
    assert nothing_of_this_machine(folder)


def nothing_of_this_machine(folder: Path) -> bool:
    """Whether no file of an export names a path of this machine."""
    contents = [file.read_bytes() for file in folder.iterdir()]
    with ExitStack() as stack:
        for file in folder.glob("*.pt2"):
            archive = stack.enter_context(ZipFile(file))
            contents += [archive.read(name) for name in archive.namelist()]
    marks = (b"site-packages", str(folder.parent).encode(), str(REPOSITORY / "mmsnnet").encode())
    return not any(mark in content for mark in marks for content in contents)


@pytest.mark.slow
def test_images_of_any_size(data: Path, export: Callable[..., Any]) -> None:
    """Sides that are no multiples of the patch, too."""
    config = segmentor(data)
    folder, checkpoint = export(config, ["S0-L2"], dynamic_size=True)
    assert Manifest.load(folder).image_size is None
    for size in ((64, 64), (40, 104), (75, 61)):
        images = images_of(1, 3, *size)
        given = outputs_of(folder / "S0-L2.onnx", images)
        assert compare(given, expected_of(config, checkpoint, "S0-L2", images)).difference <= 1e-4


@pytest.mark.slow
def test_half_precision_halves_the_weights(data: Path, export: Callable[..., Any]) -> None:
    config = segmentor(data)
    folder, checkpoint = export(config, ["S"], precision="fp16")
    graph = onnx.load(folder / "S.onnx", load_external_data=False).graph
    weights = {one.name: one.data_type for one in graph.initializer if np.prod(one.dims) > 100}
    assert weights and onnx.TensorProto.FLOAT not in weights.values()
    images = images_of(2, 3, 64, 64)
    given = outputs_of(folder / "S.onnx", images)
    assert given["logits"].dtype == torch.float32
    assert 1e-6 < compare(given, expected_of(config, checkpoint, "S", images)).difference <= 2e-2
    assert Manifest.load(folder)["S"].difference > 1e-5  # from the weights before they were rounded


@pytest.mark.slow
@pytest.mark.parametrize("calibration", [None, 2])
def test_weights_of_8_bits(calibration: int | None, data: Path, export: Callable[..., Any]) -> None:
    """Ranges of activations are computed in each run, or fixed on images."""
    config = segmentor(data)
    folder, checkpoint = export(config, ["S"], precision="int8", calibration_images=calibration, tolerance=1.0)
    graph = onnx.load(folder / "S.onnx", load_external_data=False).graph
    bits = {one.name: one.data_type for one in graph.initializer}
    kinds = {node.op_type for node in graph.node}
    assert onnx.TensorProto.INT8 in bits.values()
    assert ("DynamicQuantizeLinear" in kinds) is (calibration is None)
    images = images_of(2, 3, 64, 64)
    given = outputs_of(folder / "S.onnx", images)
    assert 1e-6 < compare(given, expected_of(config, checkpoint, "S", images)).difference <= 0.5


@pytest.mark.slow
def test_a_program_of_torch_export(data: Path, export: Callable[..., Any]) -> None:
    config = segmentor(data)
    folder, checkpoint = export(config, ["S0-L2"], format="torch-export")
    images = images_of(3, 3, 64, 64)
    given = torch.export.load(folder / "S0-L2.pt2").module()(images)
    assert compare(given, expected_of(config, checkpoint, "S0-L2", images)).difference <= 1e-4
    assert not (folder / "weights.bin").exists() and nothing_of_this_machine(folder)


@pytest.mark.slow
def test_an_export_that_differs_leaves_nothing_behind(data: Path, tmp_path: Path) -> None:
    config = segmentor(data)
    checkpoint = random_checkpoint(config, tmp_path / "model.pth")
    settings = ExportSettings(tolerance=0.0)
    with pytest.raises(ExportError, match=r"the export of S differs from PyTorch by .* nothing is written"):
        export_stitches(config, checkpoint, ["S"], tmp_path / "out", settings)
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.slow
def test_the_front_and_its_figures(front: tuple[Path, Manifest], tmp_path: Path) -> None:
    """They go into the manifest; latencies of PyTorch, and stitches that are not exported, do not go along."""
    folder, manifest = front
    shutil.copytree(folder / "out", tmp_path / "out")
    assert [(stitch.name, stitch.metrics) for stitch in manifest.stitches] == [
        ("S", {"mIoU": 30.0}),
        ("L", {"mIoU": 40.0}),
        ("S0-L2", {"mIoU": 35.0}),
    ]
    front_of_export = OperatingPoints.load(tmp_path / "out/front.json")
    assert [(p.latency_ms, p.latencies_ms) for p in front_of_export] == [(None, {})] * 3
    assert not front_of_export.benchmark
    assert [point.name for point in front_of_export] == ["S", "S0-L2", "L"]  # by their costs
    assert (manifest.metric, manifest.higher) == ("mIoU", True)
    assert Manifest.load(tmp_path / "out") == manifest
    weights = tmp_path / "out/weights.bin"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(DataError, match=r"weights\.bin is not the file that was exported"):
        Manifest.load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(MissingFileError, match=r"lacks weights\.bin, which its manifest\.json names"):
        Manifest.load(tmp_path / "out")
    document = json.loads((tmp_path / "out/manifest.json").read_text())
    for wrong in (
        [],
        {},
        document | dict(schema=99),
        document | dict(stitches=[]),
        document | dict(weights="../w.bin"),
    ):
        (tmp_path / "out/manifest.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=r"manifest\.json is no manifest of an export"):
            Manifest.load(tmp_path / "out")
    assert document["classes"][0] == "background" and len(document["palette"]) == len(document["classes"])


def test_mistakes_are_named_before_any_work(data: Path, tmp_path: Path) -> None:
    config = segmentor(data)
    checkpoint = random_checkpoint(config, tmp_path / "model.pth")
    with pytest.raises(SettingError, match="'front' needs the operating points"):
        export_stitches(config, checkpoint, "front", tmp_path / "out")
    with pytest.raises(MissingFileError, match=r"folder .* has no pictures"):
        export_stitches(config, checkpoint, ["S"], tmp_path / "out", images=tmp_path)
    with pytest.raises(SettingError, match="there are 3 images to calibrate on, and calibration_images is 9"):
        settings = ExportSettings(precision="int8", calibration_images=9)
        export_stitches(config, checkpoint, ["S"], tmp_path / "out", settings)
    S = find_stitched_backbone(build_model(config)).space["S"]
    points = OperatingPoints("a.py", None, None, (64, 64), None, (OperatingPoint(S.id, "S", "S", 1, 2, {"mIoU": 3.0}),))
    with pytest.raises(SettingError, match=r"operating points are of another model: stitch 0 \(S\) has 1 FLOPs"):
        export_stitches(config, checkpoint, ["S"], tmp_path / "out", points=points)
    for wrong, message in (
        (dict(image_size=(0, 8)), "positive height and width"),
        (dict(tolerance=-1.0), "at least 0"),
        (dict(tolerance=float("nan")), "at least 0"),
    ):
        with pytest.raises(SettingError, match=message):
            ExportSettings(**wrong)
    with pytest.raises(SettingError, match="format is one of onnx, torch-export; got 'tflite'"):
        ExportSettings(format="tflite")
    with pytest.raises(MissingFileError, match=r"is no export: it has no manifest\.json"):
        Manifest.load(tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_counts_as_a_difference() -> None:
    logits = torch.tensor([[[1.0, 0.0], [0.0, 4.0]]])  # two classes, two pixels
    assert compare({"logits": logits}, {"logits": logits}) == Difference(0.0, 1.0)
    other = logits.clone()
    other[0, 0, 1] = 6.0  # the second pixel changes its class
    assert compare({"logits": other}, {"logits": logits}) == Difference(6.0 / 4.0, 0.5)
    assert compare({"logits": logits * float("nan")}, {"logits": logits}).difference == float("inf")
    boxes = torch.tensor([[[900.0, 900.0, 950.0, 910.0], [0.0, 0.0, 500.0, 20.0]]])  # of 50 and of 500 pixels
    for moved, difference in ((0, 0.05), (1, 0.01)):
        other = boxes.clone()
        other[0, moved] += 5.0
        assert compare({"boxes": other}, {"boxes": boxes}).difference == pytest.approx(difference)
    assert compare({"depth": torch.tensor([0.5])}, {"depth": torch.tensor([0.25])}) == Difference(0.25, None)
