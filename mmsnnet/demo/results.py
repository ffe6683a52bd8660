"""What the page shows for an image and a stitch: pictures, figures and the route, without the page itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mmsnnet.apis import Prediction, Predictor
from mmsnnet.demo.budget import BudgetScale
from mmsnnet.evaluation import OperatingPoint
from mmsnnet.stitching import Stitch, StitchSpace
from mmsnnet.visualization import draw_route, pareto_figure
from mmsnnet.visualization.chart import flops_unit
from mmsnnet.visualization.figures import render

# Pictures on the page, in pixels: larger ones are shrunk, and small ones enlarged without smoothing.
LONGEST_SIDE, SHORTEST_SIDE = 2048, 384
# Smaller pictures have no room for the names of classes.
LEGIBLE = 224
MOST_RESULTS = 16


@dataclass(frozen=True)
class Result:
    """What a stitch predicts for an image.

    Attributes:
        picture: (H, W, 3) uint8 in RGB, in a size for the page.
        ms: the time of the model.
        classes: of segmentation, the classes in the picture with their colours in RGB.
    """

    picture: np.ndarray
    ms: float
    classes: Mapping[str, tuple[int, ...]]


class Results:
    """Predictions of a model by image and stitch. The last ones are kept, so that moving a slider back is instant.

    Args:
        predictor: the model.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._kept: OrderedDict[tuple[str, str], Result] = OrderedDict()

    def of(self, path: str, stitch: str) -> Result:
        """The result for the image at a path, which must name its content, as the upload folder's paths do.

        Raises:
            UserError: the image cannot be read; the message names it.
        """
        key = path, stitch
        if key not in self._kept:
            prediction = self.predictor(path, stitch=stitch)
            labels = min(prediction.image.shape[:2]) >= LEGIBLE
            self._kept[key] = Result(fitted(prediction.picture(labels)), prediction.ms, classes(prediction))
            if len(self._kept) > MOST_RESULTS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


def classes(prediction: Prediction) -> dict[str, tuple[int, ...]]:
    """The classes that a segmentation found, with their colours; of other tasks none."""
    overlay = prediction.overlay
    if overlay.task != "segmentation":
        return {}
    found = np.unique(prediction.data_sample.pred_sem_seg.data.numpy()).tolist()
    colours = overlay.colors(max(found) + 1)
    return {overlay.name(label): tuple(colours[label].tolist()) for label in found}


def legend(results: Iterable[Result]) -> str:
    """The classes in the shown pictures and their colours, as HTML; empty if there are none."""
    shown: dict[str, tuple[int, ...]] = {}
    for result in results:
        shown |= result.classes
    entries = [
        f"<li><i style='background: rgb{colour}'></i>{escape(name)}</li>" for name, colour in sorted(shown.items())
    ]
    return f"<ul class='classes' aria-label='Classes and their colours'>{''.join(entries)}</ul>" if entries else ""


def fitted(picture: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) in a size for the page."""
    height, width = picture.shape[:2]
    if max(height, width) > LONGEST_SIDE:
        scale = LONGEST_SIDE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    times = min(-(-SHORTEST_SIDE // min(height, width)), LONGEST_SIDE // max(height, width))
    return picture if times <= 1 else np.repeat(np.repeat(picture, times, axis=0), times, axis=1)


def plot(scale: BudgetScale, marked: Mapping[str, OperatingPoint]) -> Any:
    """The Pareto plot with rings around marked points, by what the legend calls them; a figure of plotly."""
    figure = pareto_figure([scale.points], scale.metric, scale.cost, marked=marked)
    figure.update_layout(title=None, margin=dict(l=10, r=10, t=36, b=10), height=480, font=dict(size=13))
    figure.update_layout(legend=dict(y=-0.24), modebar=dict(remove=["lasso2d", "select2d", "toImage"]))
    return figure


def route(space: StitchSpace, stitch: Stitch) -> str:
    """The route of a stitch as HTML: a drawing, with a description for screen readers."""
    figure = draw_route(space, stitch).get_figure(root=True)
    assert figure is not None
    drawing = render(figure, Path("route.svg")).decode()
    drawing = drawing[drawing.index("<svg") :]  # without the XML declaration, which HTML does not have
    names = [anchor.name for anchor in StitchSpace.of("two_way", space.stages).anchors]
    parts = [
        f"blocks {segment.start} to {segment.stop - 1} of anchor {names[segment.anchor]}" for segment in stitch.segments
    ]
    described = escape(f"Route {stitch.name}: {', then '.join(parts)}")
    return f'<div class="route" role="img" aria-label="{described}">{drawing}</div>'


def figures(columns: Mapping[str, tuple[OperatingPoint, Result | None]], scale: BudgetScale) -> str:
    """A table in HTML with a column for each shown stitch: name, cost, quality, and the time of the model."""
    unit_cost, unit = flops_unit(scale.points)
    points = [point for point, _ in columns.values()]
    rows = {
        "stitch": [point.name for point in points],
        unit: [f"{point.flops / unit_cost:.4g}" for point in points],
        "parameters": [f"{point.params / 1e6:.3g} M" for point in points],
        scale.metric: [f"{point.metric(scale.metric):.4g}" for point in points],
        "benchmark": ["" if point.latency_ms is None else f"{point.latency_ms:.3g} ms" for point in points],
        "time for this image": ["" if result is None else f"{result.ms:.3g} ms" for _, result in columns.values()],
    }
    head = "".join(f"<th scope='col'>{escape(name)}</th>" for name in columns)
    lines = [
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, cells in rows.items()
        if any(cells)
    ]
    return f"<table class='figures'><thead><tr><td></td>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
