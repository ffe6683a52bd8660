"""Export stitches: each a graph of its own, and all ONNX graphs share one file of weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import nn

from mmsnnet.apis.model import build_model, deployed
from mmsnnet.apis.overlay import overlay_of
from mmsnnet.apis.preprocessing import comparison_images, preprocessing
from mmsnnet.apis.publish import CONFIG, FRONT, published_config, write_classes
from mmsnnet.deployment.exporter import WEIGHTS, Exporter, ExportSettings
from mmsnnet.deployment.graphs import graph_class, roi_graphs, stitch_graph
from mmsnnet.deployment.manifest import MANIFEST, ExportedStitch, Manifest, file_digest
from mmsnnet.errors import SettingError, needs_extra
from mmsnnet.evaluation import OperatingPoints, compact_front, default_metric
from mmsnnet.evaluation.metric_names import higher_is_better
from mmsnnet.files.writing import new_folder, write_atomically
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.models.backbones.budget import check_points
from mmsnnet.models.model_weights import weights_digest
from mmsnnet.stitching import Cost, Stitch
from mmsnnet.version import __version__


def export_stitches(
    config: Config,
    checkpoint: str | os.PathLike[str],
    stitches: str | Sequence[int | str],
    out: str | os.PathLike[str],
    settings: ExportSettings | None = None,
    *,
    points: str | os.PathLike[str] | OperatingPoints | None = None,
    images: str | os.PathLike[str] | None = None,
    done: Callable[[ExportedStitch], object] = lambda stitch: None,
) -> Manifest:
    """Write a folder with a graph for each stitch, one file of weights, a manifest and the model's config.

    Each export runs at once, in ONNX Runtime or as a loaded program, on real images, alone and as a batch, and is
    compared with PyTorch. If one differs by more than the tolerance, nothing is written.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: of the model, as for :func:`mmsnnet.apis.build_model`.
        stitches: as for :meth:`mmsnnet.stitching.StitchSpace.select`, or ``'front'``: those of the Pareto front of
            ``points``.
        out: the folder; it must not exist, or be empty.
        settings: default: ``ExportSettings()``.
        points: the model's operating points, for ``'front'`` and the manifest. Those of the exported stitches go into
            the folder.
        images: a folder of images for the comparison; default: those of the test set.
        done: called after each stitch.

    Raises:
        ExportError: the model cannot be exported, or an export differs from PyTorch.
        SettingError, MissingFileError, DataError, OutputError: an argument is wrong, or a file.
        MissingPackageError: an export needs packages of the extra ``onnx``.
    """
    settings, out = settings or ExportSettings(), Path(out).absolute()
    with needs_extra("onnx"):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    with new_folder(out, "--out") as folder, torch.no_grad():
        model = build_model(config, checkpoint)
        digest = weights_digest(model.state_dict())
        model = _let_sizes_vary(deployed(model))
        backbone = find_stitched_backbone(model)
        costs = model_costs(model)
        measured = None if points is None else _read_points(points, model, costs)
        chosen = _choose(stitches, measured, model)
        size = settings.image_size or _window(config) or backbone.img_size
        overlay = overlay_of(config, graph_class(model).task)
        manifest = Manifest(
            task=overlay.task,
            format=settings.format,
            precision=settings.precision,
            image_size=None if settings.dynamic_size else size,
            stitches=(),
            outputs=(),
            preprocessing=preprocessing(config),
            inference=_inference(config),
            classes=overlay.classes,
            palette=tuple(map(tuple, overlay.colors(len(overlay.classes)).tolist())),
            weights=WEIGHTS if settings.format == "onnx" else None,
            checkpoint=digest,
            versions={"mmsnnet": __version__}
            | {name: version(name) for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
            **_quality(measured),
        )
        number = max(settings.num_images, settings.calibration_images or 0)
        compared = comparison_images(config, model, images, number, size)
        if settings.calibration_images is not None and len(compared) < settings.calibration_images:
            raise SettingError(
                f"there are {len(compared)} images to calibrate on, and calibration_images is "
                f"{settings.calibration_images}: set images to a folder with more"
            )
        exporter = Exporter(settings, compared, folder)
        exported = []
        try:
            heads = {name: exporter.export_head(name, *graph) for name, graph in roi_graphs(model).items()}
            for stitch in chosen:
                backbone.set_stitch(stitch)
                file, difference = exporter.export(stitch_graph(model), stitch.name)
                metrics = next((point.metrics for point in measured or () if point.id == stitch.id), {})
                cost = costs[stitch.id]
                exported.append(
                    ExportedStitch(
                        stitch.id,
                        stitch.name,
                        stitch.kind,
                        file,
                        cost.flops,
                        cost.params,
                        {name: value if value == value else None for name, value in metrics.items()},
                        *difference,
                    )
                )
                done(exported[-1])
        finally:
            exporter.close()
        digest = "" if manifest.weights is None else file_digest(folder / manifest.weights)
        manifest = replace(
            manifest, weights_digest=digest, stitches=tuple(exported), outputs=exporter.outputs, heads=heads
        )
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
        published_config(config).dump(str(folder / CONFIG))
        if overlay.classes:
            write_classes(folder, overlay)
        if measured is not None:
            ids = {stitch.id for stitch in exported}
            kept = tuple(point for point in measured if point.id in ids)
            replace(measured, points=kept, config=CONFIG, checkpoint=None).save(folder / FRONT)
        return manifest


def _let_sizes_vary(model: BaseModel) -> BaseModel:
    """Replace mmseg's upsampling, which computes sizes in Python: an export would keep those of its example."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            scale = getattr(child, "scale_factor", None)
            if type(child).__module__.startswith("mmseg.") and type(child).__name__ == "Upsample" and scale:
                setattr(module, name, nn.Upsample(None, scale, child.mode, child.align_corners))
    return model


def _read_points(
    points: str | os.PathLike[str] | OperatingPoints, model: BaseModel, costs: Mapping[int, Cost]
) -> OperatingPoints:
    """Operating points of a model, without latencies: those of PyTorch are not the export's."""
    read = points if isinstance(points, OperatingPoints) else OperatingPoints.load(points)
    check_points(read, find_stitched_backbone(model).space)
    for point in read:
        cost = costs[point.id]
        if (point.flops, point.params) != (cost.flops, cost.params):
            raise SettingError(
                f"the operating points are of another model: stitch {point} has {point.flops} FLOPs and {point.params} "
                f"parameters there, and {cost.flops} and {cost.params} here; set --points to this model's"
            )
    untimed = (replace(point, latency_ms=None, throughput=None, peak_memory=None, latencies_ms={}) for point in read)
    return replace(read, points=tuple(untimed), benchmark={}, fingerprint={})


def _quality(measured: OperatingPoints | None) -> dict[str, Any]:
    """The metric that compares stitches, and its direction, as the manifest has them."""
    points = [point for point in measured or () if point.metrics]
    metric = default_metric(points) if points else None
    return dict(metric=metric, higher=metric is None or higher_is_better(metric))


def _choose(
    stitches: str | Sequence[int | str], measured: OperatingPoints | None, model: BaseModel
) -> tuple[Stitch, ...]:
    space = find_stitched_backbone(model).space
    if stitches != "front":
        return space.select(stitches)
    if measured is None:
        raise SettingError(
            "'front' needs the operating points of the model: set --points to a file that tools/test.py --out wrote, "
            "or publish the model with them"
        )
    return space.select([point.id for point in compact_front(measured)])


def _window(config: Config) -> tuple[int, int] | None:
    inference = _inference(config)
    if inference.get("mode") not in ("slide", "slide_flip"):
        return None
    height, width = inference["crop_size"]
    return height, width


def _inference(config: Config) -> dict[str, Any]:
    """What the toolbox does around a graph: windows, resizing, the threshold of two classes, NMS."""
    settings, head = config.model.get("test_cfg") or {}, config.model.get("decode_head") or {}
    head = head[-1] if isinstance(head, list | tuple) else head
    inference = {key: settings[key] for key in ("mode", "crop_size", "stride") if key in settings}
    if settings.get("mode") == "slide" and "DepthEstimator" in str(config.model.type):
        inference = dict(mode="whole")  # mmseg's depth estimators run whole images then
    if head:
        inference["align_corners"] = bool(head.get("align_corners", False))
        if head.get("out_channels") == 1:
            inference["threshold"] = head.get("threshold") or 0.3  # mmseg's default
    if "nms" in settings:
        inference |= dict(iou_threshold=settings["nms"]["iou_threshold"], most_boxes=settings.get("max_per_img", 100))
    return inference
