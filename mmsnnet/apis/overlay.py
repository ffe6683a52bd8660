"""Drawing of predictions on their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer

from mmsnnet.apis.images import inner_dataset

OPACITY = 0.6
TOP = 5
# The shortest side on which names are legible. Smaller pictures are enlarged for a list of classes.
LEGIBLE = 224


@dataclass(frozen=True)
class Overlay:
    """Draws the predictions of a task.

    Args:
        task: ``'segmentation'``, ``'depth'``, ``'classification'`` or ``'detection'``.
        classes: the names of the data set's classes, if they are known.
        palette: the colour of each class in RGB, if they are known; else colours are derived.
    """

    task: str
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()

    def draw(self, image: np.ndarray, sample: BaseDataElement, labels: bool = True) -> np.ndarray:
        """The picture of a prediction, (H, W, 3) uint8 in RGB.

        Segmentation shows the colour of each class over the image, depth a colour map (near is bright), classification
        the most probable classes, and detection boxes and masks.

        Args:
            image: (H, W, 3) uint8 in RGB.
            sample: the data sample with the prediction.
            labels: write the names of classes; it takes most of the time.
        """
        if self.task == "segmentation":
            return self._draw_segments(image, sample.pred_sem_seg.data[0].numpy(), labels)
        if self.task == "depth":
            return _draw_depth(sample.pred_depth_map.data.squeeze().numpy())
        if self.task == "classification":
            return self._draw_classes(image, sample.logits)
        return self._draw_instances(image, sample)

    def name(self, label: int) -> str:
        """The name of a class, or its number if names are unknown."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def colors(self, number: int) -> np.ndarray:
        """Colours (number, 3) uint8 in RGB: the palette's, and derived ones for further classes."""
        hues = (np.arange(number) * 0.618034 % 1 * 179).astype(np.uint8)  # neighbours differ by the golden ratio
        hsv = np.stack([hues, np.full_like(hues, 180), np.full_like(hues, 230)], axis=-1)
        colors = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0]
        known = np.asarray(self.palette[:number], np.uint8).reshape(-1, 3)
        colors[: len(known)] = known
        return colors

    def _draw_segments(self, image: np.ndarray, segments: np.ndarray, labels: bool) -> np.ndarray:
        # mmseg's SegLocalVisualizer sorts all pixels of a class in Python to place its label: seconds for a photograph.
        colors = self.colors(256)
        picture = cv2.addWeighted(image, 1 - OPACITY, colors[segments.astype(np.uint8)], OPACITY, 0)
        if not labels or min(image.shape[:2]) < LEGIBLE:
            return picture
        texts, places = [], []
        for label in np.unique(segments):
            inside = np.pad((segments == label).astype(np.uint8), 1)
            depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            texts.append(self.name(int(label)))
            places.append((x, y))
        return _write(picture, texts, np.array(places), centered=True)

    def _draw_classes(self, image: np.ndarray, logits: torch.Tensor) -> np.ndarray:
        scale = max(1.0, LEGIBLE / min(image.shape[:2]))
        picture = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        scores, classes = logits.float().softmax(0).topk(min(TOP, len(logits)))
        lines = [
            f"{self.name(int(c))}: {score:.1%}" for score, c in zip(scores.tolist(), classes.tolist(), strict=True)
        ]
        return _write(picture, ["\n".join(lines)], np.array([(5, 5)]))

    def _draw_instances(self, image: np.ndarray, sample: BaseDataElement) -> np.ndarray:
        from mmdet.visualization import DetLocalVisualizer  # the other tasks do without mmdet

        visualizer = DetLocalVisualizer()
        number = max(len(self.classes), 1 + max([0, *sample.pred_instances.labels.tolist()]))
        visualizer.dataset_meta = dict(
            classes=[self.name(label) for label in range(number)],
            palette=[tuple(map(int, color)) for color in self.colors(number)],
        )
        visualizer.add_datasample("prediction", image, sample, draw_gt=False)
        return visualizer.get_image()


def overlay_of(config: Config, task: str) -> Overlay:
    """Classes and palette of the test data set, whose files need not exist."""
    dataset = DATASETS.build({**inner_dataset(config), "pipeline": [], "lazy_init": True})
    classes = tuple(dataset.metainfo.get("classes") or ())
    palette = dataset.metainfo.get("palette") or ()
    return Overlay(task, classes, tuple(tuple(color) for color in palette if not isinstance(palette, str)))


def _draw_depth(depth: np.ndarray) -> np.ndarray:
    low, high = float(depth.min()), float(depth.max())
    near = (255 * (high - depth) / max(high - low, 1e-6)).astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(near, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def _write(picture: np.ndarray, texts: Sequence[str], places: np.ndarray, centered: bool = False) -> np.ndarray:
    """Write texts on a picture with mmengine's visualizer."""
    settings: dict[str, Any] = dict(colors="w", bboxes=dict(facecolor="black", alpha=0.6, edgecolor="none", pad=1.5))
    if centered:
        settings |= dict(horizontal_alignments="center", vertical_alignments="center")
    size = max(6, round(min(picture.shape[:2]) / 40))
    visualizer = Visualizer()
    visualizer.set_image(picture)
    visualizer.draw_texts(list(texts), places, font_sizes=size, **settings)
    return visualizer.get_image()
