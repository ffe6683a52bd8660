"""Self-contained HTML page of quality over cost, which shows details of the stitch under the mouse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mmsnnet.evaluation.operating_points import OperatingPoint, OperatingPoints
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.visualization.chart import Chart, flops_unit
from mmsnnet.visualization.references import SOURCE, Reference, Reported
from mmsnnet.visualization.routes import route_lines

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RUN_SYMBOLS = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "pentagon")
RUN_DASHES = ("solid", "dash", "dot", "dashdot")
# Routes are drawn in characters, so the font must be monospaced.
ROUTE_FONT = "Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
METRICS_PER_LINE = 4
RING_COLOURS = ("#D81B60", "#1E88E5")
REPORTED_COLOUR = "#777777"
REPORTED_DASHES = ("dash", "dot")


def render_page(chart: Chart) -> bytes:
    """Render a page that needs no network; the same chart gives the same bytes."""
    # showSendToCloud=False removes plotly's button that uploads the data.
    config = {"displaylogo": False, "responsive": True, "showSendToCloud": False}
    page = plotly_figure(chart).to_html(config, include_plotlyjs=True, div_id="chart", default_height="93vh")
    return page.encode()


def _escape(text: str) -> str:
    """Escape text for plotly, which interprets a few HTML tags."""
    return escape(text, quote=False)


def plotly_figure(chart: Chart, marked: Mapping[str, OperatingPoint] | None = None) -> Figure:
    """The figure of a page, with a ring around each marked point, whose key is its name in the legend."""
    from plotly.graph_objects import Figure

    figure = Figure()
    if chart.reference:
        for trace in _reference_traces(chart.reference, chart.size_note(chart.reference)):
            figure.add_scatter(**trace)
    several = len(chart.runs) > 1 or chart.reference is not None
    for index, (run, name) in enumerate(zip(chart.runs, chart.run_names, strict=True)):
        figure.add_scatter(**_front_trace(chart, index, _escape(name) if several else "Pareto front"))
        hovers = {point.id: hover for point, hover in zip(run, _hovers(chart, index), strict=True)}
        for kind in (*chart.colours, None):
            points = [point for point in chart.drawn(run) if (None if point.is_anchor else point.kind) == kind]
            if points:
                texts = [hovers[point.id] for point in points]
                figure.add_scatter(**_stitch_trace(chart, index, kind, points, texts))
    for number, (name, point) in enumerate((marked or {}).items()):
        figure.add_scatter(**_ring_trace(chart, number, name, point))
    _show_once(figure)
    axis: dict[str, Any] = {"zeroline": False, "showline": True, "linecolor": "black", "ticks": "outside"}
    figure.update_layout(
        template="plotly_white",
        title={"text": _escape(chart.title), "x": 0.5},
        xaxis={"title": {"text": _escape(chart.x_label)}, **axis},
        yaxis={"title": {"text": _escape(chart.y_label)}, **axis},
        hovermode="closest",
        hoverlabel={"font": {"family": ROUTE_FONT, "size": 13, "color": "black"}, "bgcolor": "white", "align": "left"},
        # Long names of runs fit only below the axes.
        legend={"orientation": "h", "yanchor": "top", "y": -0.12},
    )
    return figure


def _stitch_trace(
    chart: Chart, index: int, kind: str | None, points: Sequence[OperatingPoint], texts: Sequence[str]
) -> dict[str, Any]:
    """Trace of the stitches of one kind of a run; None for its anchors."""
    on_front = [point.id in {other.id for other in chart.fronts[index]} for point in points]
    marker: dict[str, Any] = {
        "symbol": RUN_SYMBOLS[index],
        "color": chart.colours.get(kind or ""),
        "size": [11 if ringed else 8 for ringed in on_front],
        "opacity": [1.0 if ringed else 0.75 for ringed in on_front],
        "line": {
            "color": ["black" if ringed else "white" for ringed in on_front],
            "width": [1.5 if ringed else 0.5 for ringed in on_front],
        },
    }
    if kind is None:
        marker = {"symbol": "star", "color": "black", "size": 16, "line": {"color": "white", "width": 1}}
    xs, ys = zip(*map(chart.place, points), strict=True)
    return {
        "x": xs,
        "y": ys,
        "mode": "markers" if kind else "markers+text",
        "text": [] if kind else [_escape(point.name) for point in points],
        "textposition": "top center",
        "marker": marker,
        "name": _escape(kind or "anchor"),
        "legendgroup": kind or "anchor",
        "hovertext": texts,
        "hoverinfo": "text",
    }


def _ring_trace(chart: Chart, number: int, name: str, point: OperatingPoint) -> dict[str, Any]:
    x, y = chart.place(point)
    colour = RING_COLOURS[number % len(RING_COLOURS)]
    marker = {"symbol": "circle-open", "size": 24 + 8 * number, "color": colour, "line": {"width": 4}}
    name = _escape(f"{name}: {point.name}")
    return {"x": [x], "y": [y], "mode": "markers", "marker": marker, "name": name, "hoverinfo": "skip"}


def _front_trace(chart: Chart, index: int, name: str) -> dict[str, Any]:
    xs, ys = zip(*chart.steps(index), strict=True) if chart.steps(index) else ((), ())
    line = {"shape": "hv", "color": "#262626", "width": 1.5, "dash": RUN_DASHES[index % len(RUN_DASHES)]}
    return {"x": xs, "y": ys, "mode": "lines", "line": line, "name": name, "hoverinfo": "skip"}


def _reference_traces(reference: Reference, note: str) -> list[dict[str, Any]]:
    def hover(result: Reported) -> str:
        gflops, quality = (
            f"{low:g}" if low == high else f"{low:g} - {high:g}" for low, high in (result.gflops, result.quality)
        )
        title = f"<b>{result.name}</b> {'range' if result.is_range else 'alone'}"
        return f"{title}<br>{gflops} GFLOPs{note}<br>{reference.metric} {quality}<br>reported by {SOURCE}"

    traces = []
    ranges = [result for result in reference.results if result.is_range]
    for result, dash in zip(ranges, REPORTED_DASHES, strict=True):
        (left, right), (bottom, top) = result.gflops, result.quality
        traces.append(
            {
                "x": (left, right, right, left, left),
                "y": (bottom, bottom, top, top, bottom),
                "mode": "lines",
                "line": {"color": REPORTED_COLOUR, "width": 1, "dash": dash},
                "name": f"range of {result.name},<br>{SOURCE}{note}",
                "hovertext": hover(result),
                "hoverinfo": "text",
            }
        )
    alone = [result for result in reference.results if not result.is_range]
    traces.append(
        {
            "x": [result.gflops[0] for result in alone],
            "y": [result.quality[0] for result in alone],
            "mode": "markers",
            "marker": {"symbol": "diamond-open", "size": 9, "color": REPORTED_COLOUR},
            "name": f"{', '.join(result.name for result in alone)} alone,<br>{SOURCE}{note}",
            "hovertext": [hover(result) for result in alone],
            "hoverinfo": "text",
        }
    )
    return traces


def _show_once(figure: Figure) -> None:
    """Keep one entry of the legend for each kind, over all runs."""
    seen = set()
    for trace in figure.data:
        if trace.legendgroup is not None:
            trace.showlegend = trace.legendgroup not in seen
            seen.add(trace.legendgroup)


def _hovers(chart: Chart, index: int) -> list[str]:
    """Hover text of each point of a run, in plotly's HTML tags."""
    run = chart.runs[index]
    on_front = {point.id for point in chart.fronts[index]}
    space = None if run.depths is None else StitchSpace.of("two_way", run.depths)
    texts = []
    for point in run:
        lines = [f"<b>{_escape(point.name)}</b>  id {point.id}, {_escape(point.kind)}"]
        if point.is_anchor:
            lines[0] += ", an anchor alone"
        if len(chart.runs) > 1:
            lines.append(_escape(chart.run_names[index]))
        lines += _costs(run, point)
        metrics = [f"{_escape(name)} {value:.4g}" for name, value in point.metrics.items()]
        lines += [
            ", ".join(metrics[start : start + METRICS_PER_LINE]) for start in range(0, len(metrics), METRICS_PER_LINE)
        ]
        if point.id in on_front:
            lines.append("on the Pareto front")
        if space is not None and point.name in space:
            # A browser would collapse ordinary spaces.
            lines += ["", *(line.replace(" ", "\u00a0") for line in route_lines(space, space[point.name]))]
        texts.append("<br>".join(lines))
    return texts


def _costs(run: OperatingPoints, point: OperatingPoint) -> list[str]:
    unit, unit_name = flops_unit(run)
    lines = [f"{point.flops / unit:.2f} {unit_name}, {point.params / 1e6:.2f} M parameters"]
    measured = []
    if point.latency_ms is not None:
        measured.append(f"{point.latency_ms:.4g} ms")
    if point.throughput is not None:
        measured.append(f"{point.throughput:.4g} images/s")
    if point.peak_memory is not None:
        measured.append(f"{point.peak_memory / 2**20:.4g} MiB")
    return [*lines, *([", ".join(measured)] if measured else [])]
