"""The programs that an export holds: a whole model at one stitch, from images to its outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone

IMAGES = "images"
# mmdet's heads whose boxes follow from priors and two tensors for each map alone. Others scale, refine or rate boxes.
ONE_STAGE_HEADS = ("RTMDetHead", "RTMDetSepBNHead", "RetinaHead", "RetinaSepBNHead", "SSDHead")


class Graph(nn.Module, ABC):
    """A model at its present stitch: normalised images (B, C, H, W) give a dict of tensors by name.

    Weights have ``precision``, while images and outputs are always float32.

    Args:
        model: with merged stitching layers, in evaluation mode.
    """

    task: str

    def __init__(self, model: BaseModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        weight = next(self.model.parameters())
        outputs = self.run(images.to(weight.dtype))
        return {name: output.float() for name, output in outputs.items()}

    @abstractmethod
    def run(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs, of the weights' type."""


class SegmentorGraph(Graph):
    """A segmentor of mmseg on a whole image, or on one window: logits (B, K, H, W)."""

    task, output = "segmentation", "logits"

    def run(self, images: Tensor) -> dict[str, Tensor]:
        meta = _meta(images)
        return {self.output: self.model.encode_decode(images, [meta])}


class DepthGraph(SegmentorGraph):
    """A depth estimator of mmseg: depths (B, 1, H, W), in the unit of its head."""

    task, output = "depth", "depth"


class ClassifierGraph(Graph):
    """A classifier: logits (B, K)."""

    task = "classification"

    def run(self, images: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model.backbone(images)}


class OneStageGraph(Graph):
    """A one-stage detector of mmdet up to NMS.

    For each of its maps, the outputs of the head: ``cls_score_0`` (B, A * K, h, w), ``bbox_pred_0`` (B, A * 4, h, w)
    and so on. From these, ``boxes`` (B, N, 4) as left, top, right, bottom in pixels, and ``scores`` (B, N, K).
    """

    task = "detection"

    def run(self, images: Tensor) -> dict[str, Tensor]:
        head = self.model.bbox_head
        scores, boxes = head(self.model.extract_feat(images))
        outputs = dict(_numbered("cls_score", scores)) | dict(_numbered("bbox_pred", boxes))
        grids = [score.shape[-2:] for score in scores]
        # In float32: halves of large coordinates are whole pixels.
        priors = torch.cat(head.prior_generator.grid_priors(grids, dtype=torch.float32, device=images.device))
        flat = torch.cat([_flat(box, 4) for box in boxes], dim=1).float()
        decoded = head.bbox_coder.decode(priors.expand(images.shape[0], -1, -1), flat)
        probabilities = torch.cat([_flat(score, head.cls_out_channels) for score in scores], dim=1).float()
        probabilities = probabilities.sigmoid() if head.use_sigmoid_cls else probabilities.softmax(-1)[..., :-1]
        return outputs | dict(boxes=decoded, scores=probabilities)


class TwoStageGraph(Graph):
    """A two-stage detector of mmdet up to its proposals.

    The maps of its neck, ``map_0`` (B, C, h, w) and so on, and the outputs of the RPN's head for each,
    ``rpn_cls_score_0`` and ``rpn_bbox_pred_0``. Proposals, RoIAlign and NMS are left to the program that runs it; the
    heads behind RoIAlign are graphs of their own (:class:`RoIHeadGraph`).
    """

    task = "detection"

    def run(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.model.extract_feat(images)
        scores, boxes = self.model.rpn_head(maps)
        return (
            dict(_numbered("map", maps))
            | dict(_numbered("rpn_cls_score", scores))
            | dict(_numbered("rpn_bbox_pred", boxes))
        )


class RoIHeadGraph(Graph):
    """A head behind RoIAlign: features of regions (R, C, h, w) give ``cls_score`` and ``bbox_pred``, or ``mask_pred``.

    Args:
        model: the head, which all stitches share.
        outputs: the names of its outputs.
    """

    task = "detection"

    def __init__(self, model: nn.Module, outputs: Sequence[str]) -> None:
        super().__init__(model)
        self.outputs = tuple(outputs)

    def run(self, images: Tensor) -> dict[str, Tensor]:
        outputs = self.model(images)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return dict(zip(self.outputs, outputs, strict=True))


def stitch_graph(model: BaseModel) -> Graph:
    """The graph of a whole model, by its task.

    Raises:
        SettingError: the model is none of those that can be exported.
    """
    return graph_class(model)(model).eval()


def graph_class(model: BaseModel) -> type[Graph]:
    """The class of a model's graph; it tells the task."""
    if hasattr(model, "roi_head") and hasattr(model, "rpn_head"):
        return TwoStageGraph
    if hasattr(model, "bbox_head"):
        if type(model.bbox_head).__name__ in ONE_STAGE_HEADS:
            return OneStageGraph
        raise SettingError(
            f"a detector with a {type(model.bbox_head).__name__} cannot be exported: the graph decodes the boxes of "
            f"{', '.join(ONE_STAGE_HEADS)}"
        )
    if hasattr(model, "encode_decode"):
        is_depth = any(base.__name__ == "DepthEstimator" for base in type(model).__mro__)
        return DepthGraph if is_depth else SegmentorGraph
    if find_stitched_backbone(model).num_classes is not None:
        return ClassifierGraph
    raise SettingError(
        f"a {type(model).__name__} cannot be exported: there are exports of mmseg's segmentors and depth estimators, "
        "mmsnnet.StitchedClassifier, and mmdet's Faster and Mask R-CNN and one-stage detectors"
    )


def roi_graphs(model: BaseModel) -> dict[str, tuple[RoIHeadGraph, tuple[int, ...]]]:
    """The graphs of the heads behind RoIAlign by file name, each with the shape (C, h, w) of a region's features."""
    if graph_class(model) is not TwoStageGraph:
        return {}
    roi_head, graphs = model.roi_head, {}
    for name, outputs in (("bbox", ("cls_score", "bbox_pred")), ("mask", ("mask_pred",))):
        head, extractor = getattr(roi_head, f"{name}_head", None), getattr(roi_head, f"{name}_roi_extractor", None)
        if isinstance(head, nn.ModuleList):
            raise SettingError("a cascade of RoI heads cannot be exported: export Faster R-CNN or Mask R-CNN")
        if head is not None:
            extractor = extractor or roi_head.bbox_roi_extractor  # shared by both heads
            size = extractor.roi_layers[0].output_size
            graphs[f"{name}_head"] = RoIHeadGraph(head, outputs).eval(), (extractor.out_channels, *size)
    return graphs


def _meta(images: Tensor) -> dict[str, Any]:
    shape = images.shape[-2:]
    return dict(img_shape=shape, ori_shape=shape, pad_shape=shape)


def _numbered(name: str, tensors: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [(f"{name}_{index}", tensor) for index, tensor in enumerate(tensors)]


def _flat(maps: Tensor, channels: int) -> Tensor:
    """Maps (B, A * channels, h, w) as rows (B, h * w * A, channels)."""
    return maps.permute(0, 2, 3, 1).reshape(maps.shape[0], -1, channels)
