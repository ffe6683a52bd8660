"""The page: an image, a slider over the front, the result, the Pareto plot and the route."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmsnnet.apis import Predictor
from mmsnnet.demo.budget import BudgetScale, scales
from mmsnnet.demo.results import Results, figures, legend, plot, route
from mmsnnet.errors import SettingError, UserError, needs_extra
from mmsnnet.evaluation import default_metric

if TYPE_CHECKING:
    from gradio import Blocks

CSS = """
.gradio-container { max-width: 1200px !important; }
#image img { width: 100%; height: 100%; object-fit: contain; }
#message:not(:has(.message)) { display: none; }
.message { margin: 0; padding: 0.6em 0.8em; border-left: 4px solid #c62828; background: #fdecea; color: #7f1d1d; }
.route { overflow-x: auto; padding-top: 0.8em; }
.route svg { display: block; width: 100%; min-width: 340px; height: auto; background: white; }
.classes { list-style: none; margin: 0.6em 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2em 1em; }
.classes i { display: inline-block; width: 0.9em; height: 0.9em; margin-right: 0.4em; border: 1px solid #888; }
.figures { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
.figures th, .figures td { padding: 0.2em 0.6em; text-align: right; white-space: nowrap; }
.figures th[scope=row] { text-align: left; font-weight: normal; }
"""
HALF = 50  # percent: where the wipe begins


@needs_extra("demo")
def build_page(predictor: Predictor, title: str, metric: str | None = None, examples: Sequence[str] = ()) -> Blocks:
    """Build the page of a model.

    Args:
        predictor: the model, with operating points.
        title: heads the page.
        metric: compares stitches; None for the main metric of the task.
        examples: paths of images to pick from; the page begins with the first.

    Raises:
        SettingError: the model has no operating points, or none with the metric.
        MissingPackageError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    if predictor.points is None:
        raise SettingError(
            "the model has no operating points, over which the slider moves: publish it with "
            "publish_model.py --points FILE.json, or name the file with --points"
        )
    try:
        metric = default_metric(predictor.points) if metric is None else metric
        by_unit = scales(predictor.points, metric)
    except ValueError as error:
        raise SettingError(str(error)) from error
    scale = next(iter(by_unit.values()))
    answers = Answers(predictor, by_unit)
    framed: dict[str, Any] = dict(container=True, show_label=True, padding=True)

    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as page:
        count = f"{len(predictor.space)} stitches" if len(predictor.space) > 1 else "one stitch"
        gr.Markdown(f"# {escape(title)}\nOne backbone for {predictor.task}, {count}: choose how much it may cost.")
        message = gr.HTML(elem_id="message", padding=False)
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                image = gr.Image(
                    label="Image",
                    type="filepath",
                    sources=["upload", "webcam", "clipboard"],
                    value=examples[0] if examples else None,
                    height=400,
                    buttons=["fullscreen"],
                    alt_text="The image that the model sees",
                    elem_id="image",
                )
            with gr.Column(min_width=300):
                result = gr.Image(
                    label="Result",
                    interactive=False,
                    height=400,
                    buttons=["download", "fullscreen"],
                    alt_text="The prediction, drawn on the image",
                    elem_id="result",
                )
                wipe = gr.ImageSlider(
                    label="Left and right stitch",
                    interactive=False,
                    height=400,
                    visible=False,
                    buttons=["fullscreen"],
                    elem_id="wipe",
                )
        unit = gr.Radio(list(by_unit), value=scale.unit, label="Budget in", visible=len(by_unit) > 1, elem_id="unit")
        # Each unit has sliders of its own: one that changed its unit would for a moment hold a budget of the other.
        budgets = [slider(each, "Budget", each.maximum, each is scale) for each in by_unit.values()]
        with gr.Row():
            compare = gr.Checkbox(label="Compare two stitches with a wipe", value=False, elem_id="compare")
        with gr.Column(visible=False) as comparison:
            label = "Budget of the right stitch"
            seconds = [slider(each, label, each.minimum, each is scale) for each in by_unit.values()]
            position = gr.Slider(0, 100, HALF, step=1, label="Place of the wipe in percent", elem_id="position")
        with gr.Row(equal_height=False):
            with gr.Column(min_width=300):
                chart = gr.Plot(label="Quality over cost, the shown stitch ringed", elem_id="chart")
            with gr.Column(min_width=300):
                table = gr.HTML(label="Figures of the shown stitch", elem_id="figures", **framed)
                drawing = gr.HTML(label="Route through the blocks of the anchors", elem_id="route", **framed)
        if len(examples) > 1:
            gr.Examples([[path] for path in examples], [image], label="Examples", cache_examples=False)

        inputs = [image, unit, compare, *budgets, *seconds]
        outputs = [message, result, wipe, table, chart, drawing]
        # Without preprocessing gradio would open images with its own limits and errors before the model sees them.
        settings: dict[str, Any] = dict(preprocess=False, api_visibility="private", show_progress="minimal")
        gr.on(
            [page.load, *(control.change for control in inputs)],
            answers,
            inputs,
            outputs,
            trigger_mode="always_last",
            concurrency_limit=1,
            **settings,
        )
        unit.change(
            lambda chosen: [gr.update(visible=each == chosen) for each in (*by_unit, *by_unit)],
            unit,
            [*budgets, *seconds],
            **settings,
        )
        compare.change(
            lambda both: [gr.update(visible=both), gr.update(visible=not both), gr.update(visible=both)],
            compare,
            [comparison, result, wipe],
            **settings,
        )
        position.change(lambda share: gr.update(slider_position=share), position, wipe, **settings)
    return page


def slider(scale: BudgetScale, label: str, value: float, visible: bool) -> Any:
    """A slider over the budgets of a scale."""
    import gradio as gr

    return gr.Slider(
        scale.minimum,
        scale.maximum,
        value,
        step=scale.step,
        label=f"{label} in {scale.unit}",
        visible=visible,
        interactive=True,
        elem_classes="budget",
    )


class Answers:
    """What the page shows for its inputs.

    Args:
        predictor: the model.
        by_unit: the scale of each unit.
    """

    def __init__(self, predictor: Predictor, by_unit: Mapping[str, BudgetScale]) -> None:
        self.space = predictor.space
        self.by_unit = by_unit
        self.results = Results(predictor)

    def __call__(self, image: Mapping[str, Any] | None, unit: str, compare: bool, *budgets: float) -> tuple[Any, ...]:
        """The message, the result, the pictures of the wipe, the table, the plot and the route.

        The budgets are those of the shown or left stitch in every unit, then those of the right one.

        An error empties the pictures and is the message, in one line: what is shown always belongs to the inputs.
        """
        units = list(self.by_unit)
        index = units.index(unit) if unit in units else 0
        scale = self.by_unit[units[index]]
        path = None if image is None else str(image["path"])
        try:
            points = {"shown": scale.best(budgets[index])}
            if compare:
                points = {"left": points["shown"], "right": scale.best(budgets[index + len(units)])}
        except (TypeError, ValueError) as error:
            return as_message(str(error)), None, None, "", None, ""
        text, results = "", {}
        try:
            results = {} if path is None else {name: self.results.of(path, p.name) for name, p in points.items()}
        except UserError as error:
            name = (image or {}).get("orig_name") or Path(str(path)).name
            text = as_message(str(error).replace(str(path), str(name)))
        pictures = [result.picture for result in results.values()]
        table = figures({name: (point, results.get(name)) for name, point in points.items()}, scale)
        routes = "".join(route(self.space, self.space[point.id]) for point in points.values())
        return (
            text,
            pictures[0] if pictures else None,
            (pictures[0], pictures[1]) if compare and pictures else None,
            f'<div aria-live="polite">{table}{legend(results.values())}</div>',
            plot(scale, points),
            routes,
        )


def as_message(text: str) -> str:
    """An error as HTML in one line."""
    return f'<p class="message" role="alert">{escape(" ".join(text.split()))}</p>'
