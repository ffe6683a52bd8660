"""Drawing of predictions on their images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement, InstanceData
from mmengine.visualization import Visualizer

from mmsnnet.apis.images import inner_dataset
from mmsnnet.datasets.folders import dataset_class
from mmsnnet.errors import MissingFileError
from mmsnnet.models.checkpoint_reading import read_classes

OPACITY = 0.6
TOP = 5
# Boxes of lower scores are not drawn: mmdet's default.
LEAST_SCORE = 0.3
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
        the most probable classes, and detection the boxes and masks with a score above ``LEAST_SCORE``.

        Args:
            image: (H, W, 3) uint8 in RGB.
            sample: the data sample with the prediction.
            labels: write the names of classes, which takes most of the time. Without them, classification shows the
                image alone.
        """
        if self.task == "segmentation":
            return self._draw_segments(image, sample.pred_sem_seg.data[0].numpy(), labels)
        if self.task == "depth":
            return _draw_depth(sample.pred_depth_map.data.squeeze().numpy())
        if self.task == "classification":
            return self._draw_classes(image, sample.logits, labels)
        return self._draw_instances(image, sample) if labels else self._draw_boxes(image, sample.pred_instances)

    def name(self, label: int) -> str:
        """The name of a class, or its number if names are unknown."""
        return self.classes[label] if label < len(self.classes) else f"class {label}"

    def colors(self, number: int) -> np.ndarray:
        """Colours (number, 3) uint8 in RGB: the palette's, and derived ones for further classes."""
        hues = (np.arange(number) * 0.618034 % 1 * 179).astype(np.uint8)  # neighbours differ by the golden ratio
        hsv = np.stack([hues, np.full_like(hues, 180), np.full_like(hues, 230)], axis=-1)
        colors = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] if number else hsv  # OpenCV takes no empty images
        known = np.asarray(self.palette[:number], np.uint8).reshape(-1, 3)
        colors[: len(known)] = known
        return colors

    def _draw_segments(self, image: np.ndarray, segments: np.ndarray, labels: bool) -> np.ndarray:
        # mmseg's SegLocalVisualizer sorts all pixels of a class in Python to place its label: seconds for a photograph.
        colors = self.colors(int(segments.max()) + 1)
        picture = cv2.addWeighted(image, 1 - OPACITY, colors[segments], OPACITY, 0)
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

    def _draw_classes(self, image: np.ndarray, logits: torch.Tensor, labels: bool) -> np.ndarray:
        scale = max(1.0, LEGIBLE / min(image.shape[:2]))
        picture = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        if not labels:
            return picture
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
        visualizer.add_datasample("prediction", image, sample, draw_gt=False, pred_score_thr=LEAST_SCORE)
        return visualizer.get_image()

    def _draw_boxes(self, image: np.ndarray, instances: InstanceData) -> np.ndarray:
        """Boxes and masks by OpenCV, which is fast enough for videos; mmdet draws by matplotlib."""
        picture, instances = image.copy(), instances[instances.scores > LEAST_SCORE]
        labels = instances.labels.tolist()
        colors = self.colors(1 + max([0, *labels]))[labels]
        if "masks" in instances:
            for color, mask in zip(colors, np.asarray(instances.masks, bool), strict=True):
                picture[mask] = np.rint((1 - OPACITY) * picture[mask] + OPACITY * color)
        width = max(1, round(min(image.shape[:2]) / 250))
        for color, box in zip(colors.tolist(), instances.bboxes.round().int().tolist(), strict=True):
            cv2.rectangle(picture, box[:2], box[2:], color, width)
        return picture


def overlay_of(config: Config, task: str) -> Overlay:
    """Classes and palette of the model's data set, which need not exist: its class is not instantiated.

    They come from ``classes.json`` beside the config, as in a published folder, else from ``metainfo`` of the test data
    set and from its class's ``METAINFO``.

    Raises:
        MissingFileError: ``metainfo`` names a file of classes that does not exist.
        DataError: ``classes.json`` is damaged.
    """
    known = read_classes(Path(config.filename).parent) if config.filename else None
    if known is None:
        known = _stated_classes(inner_dataset(config))
    return Overlay(task, tuple(known["classes"] or ()), tuple(tuple(color) for color in known["palette"] or ()))


def _stated_classes(dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Classes and palette of a data set's setting and class, merged as mmengine's ``BaseDataset`` merges them.

    Names that the setting chooses from those of the class keep their colours.
    """
    cls, setting = dataset_class(dataset), dataset.get("metainfo") or {}
    own = getattr(cls, "METAINFO", {})
    merge = getattr(cls, "_load_metainfo", lambda setting: {**own, **setting})  # it reads files of names too
    merged = merge(setting)
    classes, palette = merged.get("classes") or (), merged.get("palette") or ()
    if isinstance(classes, str):
        raise MissingFileError(
            f"no file {classes!r} (working folder {Path.cwd()}), from test_dataloader.dataset.metainfo.classes: "
            "expected a list of names, or a file with a name in each line"
        )
    if isinstance(palette, str):  # one of mmdet's names for palettes
        palette = ()
    if "palette" not in setting and list(classes) != list(own.get("classes") or ()):
        colors = dict(zip(own.get("classes") or (), palette, strict=False))
        derived = Overlay("").colors(len(classes)).tolist()
        palette = [colors.get(name, color) for name, color in zip(classes, derived, strict=True)] if colors else ()
    return dict(classes=classes, palette=palette)


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
