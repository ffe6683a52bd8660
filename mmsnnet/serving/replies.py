"""Predictions as JSON, with masks as PNG on request."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np
import torch

from mmsnnet.apis.overlay import TOP
from mmsnnet.apis.prediction import Prediction


def describe(prediction: Prediction, masks: bool = False) -> dict[str, Any]:
    """Describe a prediction by values that JSON has.

    Segmentation has the share of each class in the image; depth its range in metres; classification the most probable
    classes; detection the instances with boxes (x1, y1, x2, y2) in pixels.

    Args:
        prediction: of one image.
        masks: add pictures, as PNG in base64: of segmentation the class of each pixel (8 bits; 16 from class 256 on),
            of depth millimetres (16 bits), of detection the mask of each instance (0 and 255).

    Raises:
        ArithmeticError: the model predicts NaN or infinity, which JSON lacks.
    """
    overlay, sample = prediction.overlay, prediction.data_sample
    height, width = prediction.image.shape[:2]
    described: dict[str, Any] = dict(task=overlay.task, stitch=prediction.stitch, image_size=[height, width])
    if overlay.task == "segmentation":
        segments = sample.pred_sem_seg.data[0].numpy()
        labels, counts = np.unique(segments, return_counts=True)
        described["classes"] = [
            dict(label=label, name=overlay.name(label), share=round(count / segments.size, 6))
            for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
        ]
        if masks:
            described["mask_png"] = _png(segments.astype(np.uint8 if segments.max() < 256 else np.uint16))
    elif overlay.task == "depth":
        depth = sample.pred_depth_map.data.squeeze().numpy()
        _check_finite(depth)
        described["depth_m"] = {name: float(getattr(depth, name)()) for name in ("min", "mean", "max")}
        if masks:
            described["depth_mm_png"] = _png(np.rint(1000 * depth).clip(0, 65535).astype(np.uint16))
    elif overlay.task == "classification":
        scores, labels = sample.logits.float().softmax(0).topk(min(TOP, len(sample.logits)))
        _check_finite(scores)
        described["classes"] = [
            dict(label=label, name=overlay.name(label), score=score)
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
    else:
        instances = sample.pred_instances
        _check_finite(instances.scores)
        _check_finite(instances.bboxes)
        described["instances"] = [
            dict(label=label, name=overlay.name(label), score=score, box=box)
            for label, score, box in zip(
                instances.labels.tolist(), instances.scores.tolist(), instances.bboxes.tolist(), strict=True
            )
        ]
        if masks and "masks" in instances:
            for instance, mask in zip(described["instances"], np.asarray(instances.masks, np.uint8), strict=True):
                instance["mask_png"] = _png(255 * mask)
    return described


def _check_finite(values: np.ndarray | torch.Tensor) -> None:
    if not np.isfinite(values).all():
        raise ArithmeticError("the model predicts NaN or infinity")


def _png(picture: np.ndarray) -> str:
    _, encoded = cv2.imencode(".png", picture)
    return base64.b64encode(encoded.tobytes()).decode()
