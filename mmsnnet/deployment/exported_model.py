"""Run a model of a toolbox on the graphs of an export, with its own data sets, windows, box decoding and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.deployment.graphs import IMAGES, graph_class
from mmsnnet.deployment.manifest import Manifest
from mmsnnet.deployment.sessions import open_session
from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone


class ExportedGraphs:
    """The sessions of an export; each opens when its stitch first runs.

    Args:
        folder: of the export.
        threads: as of :func:`mmsnnet.deployment.sessions.open_session`. Sessions share the file of weights in memory.

    Raises:
        MissingFileError, DataError: the folder is no export, or damaged.
        SettingError: it has no ONNX graphs.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.folder, self.threads = folder, threads
        self.manifest = Manifest.load(folder)
        if self.manifest.format != "onnx":
            raise SettingError(f"{folder} has programs of {self.manifest.format}: export with --format onnx")
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def run(self, stitch: str, images: Tensor) -> dict[str, Tensor]:
        """The outputs of a stitch for normalised images (B, C, H, W).

        Detectors' images, and windows of slide inference, that are smaller than those of a graph of fixed size are
        padded with zeros, and maps cropped.

        Raises:
            SettingError: images have another size.
        """
        size, (height, width) = self.manifest.image_size, images.shape[-2:]
        if size is not None and (height, width) != size:
            slides = self.manifest.inference.get("mode") in ("slide", "slide_flip")
            if height > size[0] or width > size[1] or not (slides or self.manifest.task == "detection"):
                raise SettingError(
                    f"an image of {height} x {width}, and the graphs of {self.folder} take {size[0]} x {size[1]}: "
                    "export with --dynamic-size, or with --size"
                )
            images = F.pad(images, (0, size[1] - width, 0, size[0] - height))
        outputs = self._run(self.manifest[stitch].file, self.manifest.outputs, images)
        if size is not None and self.manifest.task in ("segmentation", "depth"):
            outputs = {name: output[..., :height, :width] for name, output in outputs.items()}
        return outputs

    def run_head(self, name: str, outputs: Sequence[str], regions: Tensor) -> dict[str, Tensor]:
        """The outputs of a head behind RoIAlign for features of regions (R, C, h, w)."""
        return self._run(self.manifest.heads[name], outputs, regions)

    def session(self, file: str) -> onnxruntime.InferenceSession:
        """The session of a graph."""
        if file not in self._sessions:
            self._sessions[file] = open_session(self.folder / file, self.threads)
        return self._sessions[file]

    def _run(self, file: str, outputs: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        array = np.ascontiguousarray(images.detach().float().cpu().numpy())
        results = self.session(file).run(list(outputs), {IMAGES: array})
        return {name: torch.from_numpy(result) for name, result in zip(outputs, results, strict=True)}


def use_export(model: BaseModel, folder: Path, threads: int | None = None) -> ExportedGraphs:
    """Let a model compute its outputs with an export, for the stitch of evaluation mode.

    If the export lacks this stitch, its costliest one is set. What lies around the graphs stays the model's: windows,
    NMS, the RPN's proposals and RoIAlign.

    Args:
        model: of the export's config, in evaluation mode, on the CPU.
        folder: of the export.
        threads: of one operator.

    Raises:
        MissingFileError, DataError, SettingError: as :class:`ExportedGraphs`; the export is of another task, or has
            stitches that the model lacks.
    """
    exported, backbone = ExportedGraphs(folder, threads), find_stitched_backbone(model)
    task = graph_class(model).task
    if exported.manifest.task != task:
        raise SettingError(f"{folder} is an export for {exported.manifest.task}, and the config's task is {task}")
    for stitch in exported.manifest.stitches:
        if stitch.id not in backbone.space or backbone.space[stitch.id].name != stitch.name:
            raise SettingError(f"{folder} has stitch {stitch.name}, which the config's model lacks")

    if backbone.stitch.name not in [stitch.name for stitch in exported.manifest.stitches]:
        backbone.set_stitch(max(exported.manifest.stitches, key=lambda stitch: stitch.flops).name)

    def run(images: Tensor) -> dict[str, Tensor]:
        return exported.run(backbone.stitch.name, images)

    for owner, name, method in _methods(model, run, exported):
        setattr(owner, name, method)
    return exported


def _methods(
    model: BaseModel, run: Callable[[Tensor], dict[str, Tensor]], exported: ExportedGraphs
) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
    """The methods to replace: owner, name and replacement."""
    task, outputs = exported.manifest.task, exported.manifest.outputs
    if task in ("segmentation", "depth"):
        return [(model, "encode_decode", lambda inputs, batch_img_metas: run(inputs)[outputs[0]])]
    if task == "classification":
        return [(model.backbone, "forward", lambda images: run(images)["logits"])]

    def numbered(results: dict[str, Tensor], name: str) -> list[Tensor]:
        return [result for key, result in results.items() if key.rpartition("_")[0] == name]

    # The detectors' two methods get the images, and then what the first returned.
    if "boxes" in outputs:
        return [
            (model, "extract_feat", lambda inputs: run(inputs)),
            (model.bbox_head, "forward", lambda r: (numbered(r, "cls_score"), numbered(r, "bbox_pred"))),
        ]

    rpn: dict[int, dict[str, Tensor]] = {}

    def extract(inputs: Tensor) -> tuple[Tensor, ...]:
        results = run(inputs)
        rpn.clear()
        maps = tuple(numbered(results, "map"))
        rpn[id(maps[0])] = results
        return maps

    def propose(maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        results = rpn[id(maps[0])]
        return numbered(results, "rpn_cls_score"), numbered(results, "rpn_bbox_pred")

    methods: list[tuple[nn.Module, str, Callable[..., Any]]] = [
        (model, "extract_feat", extract),
        (model.rpn_head, "forward", propose),
    ]
    if "bbox_head" in exported.manifest.heads:
        names = ("cls_score", "bbox_pred")
        head = model.roi_head.bbox_head
        methods.append((head, "forward", lambda r: tuple(exported.run_head("bbox_head", names, r).values())))
    if "mask_head" in exported.manifest.heads:
        head = model.roi_head.mask_head
        methods.append((head, "forward", lambda r: exported.run_head("mask_head", ("mask_pred",), r)["mask_pred"]))
    return methods
