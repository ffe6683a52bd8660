import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mmsnnet.evaluation import OperatingPoint, OperatingPoints, pareto_front
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.visualization import plot_pareto


def make_run(depths: tuple[int, ...] = (12, 24), seed: int = 0, dataset: str = "ADE20KDataset") -> OperatingPoints:
    """Made-up points for the stitches of a space, in the order of ids; quality goes up and down along them."""
    space = StitchSpace.two_way(depths) if len(depths) > 1 else StitchSpace.single(*depths)
    points = []
    for stitch in space:
        flops = 10**9 * sum((3, 9, 15)[segment.anchor] * len(segment) for segment in stitch.segments)
        quality = {"mIoU": 45 + flops / 10**11 + math.sin(7 * stitch.id + seed), "aAcc": 80.25}
        points.append(OperatingPoint(stitch.id, stitch.name, stitch.kind, flops, 2 * 10**6, quality, 12.5))
    return OperatingPoints(f"configs/run{seed}.py", None, dataset, (512, 512), None, tuple(points), depths=depths)


def page(runs: list[OperatingPoints], folder: Path, **kwargs: object) -> str:
    return plot_pareto(runs, "mIoU", folder / "plot.html", **kwargs).read_text(encoding="utf-8")


def chart(runs: list[OperatingPoints], folder: Path, **kwargs: object) -> tuple[list[dict], dict]:
    """What the page hands to plotly: traces and layout."""
    text = page(runs, folder, **kwargs)
    found = re.search(r'Plotly\.newPlot\(\s*"chart",\s*(?=\[)', text)
    assert found is not None
    traces, end = json.JSONDecoder().raw_decode(text, found.end())
    layout, _ = json.JSONDecoder().raw_decode(text, re.compile(r",\s*").match(text, end).end())
    return traces, layout


def markers(traces: list[dict]) -> list[dict]:
    """The traces of stitches: those of a kind, anchors included."""
    return [trace for trace in traces if "legendgroup" in trace]


def hovers(traces: list[dict]) -> dict[str, list[str]]:
    """The lines of what the mouse shows, by the name of the stitch; of one run."""
    found = {}
    for trace in markers(traces):
        for text in trace["hovertext"]:
            found[re.match(r"<b>(.*?)</b>", text)[1]] = text.replace("\u00a0", " ").split("<br>")
    return found


def test_every_stitch_is_drawn_once_under_its_kind(tmp_path: Path) -> None:
    run = make_run()
    traces, layout = chart([run], tmp_path)
    assert [trace["name"] for trace in markers(traces)] == ["SL", "LS", "LSL", "SLS", "anchor"]
    drawn = {
        (trace["legendgroup"], x, y) for trace in markers(traces) for x, y in zip(trace["x"], trace["y"], strict=True)
    }
    assert drawn == {("anchor" if p.is_anchor else p.kind, p.flops / 1e9, p.metrics["mIoU"]) for p in run}
    assert sum(len(trace["x"]) for trace in markers(traces)) == 134
    assert len({trace["marker"]["color"] for trace in markers(traces)}) == 5
    assert [trace["text"] for trace in markers(traces)] == [[]] * 4 + [["S", "L"]]
    assert layout["xaxis"]["title"]["text"] == "GFLOPs" and layout["yaxis"]["title"]["text"] == "mIoU"
    front = len(pareto_front(run, metric="mIoU"))
    assert layout["title"]["text"] == f"ADE20KDataset: 134 stitches, {front} on the Pareto front"


def test_the_front_is_a_line_of_steps_and_its_stitches_are_ringed(tmp_path: Path) -> None:
    run = make_run()
    traces, _ = chart([run], tmp_path)
    front = pareto_front(run, metric="mIoU")
    (line,) = (trace for trace in traces if trace["mode"] == "lines")
    assert (line["name"], line["line"]["shape"]) == ("Pareto front", "hv")
    assert line["x"] == [*(point.flops / 1e9 for point in front), max(point.flops for point in run) / 1e9]
    assert line["y"][:-1] == [point.metrics["mIoU"] for point in front] and line["y"][-1] == line["y"][-2]
    ringed = {
        (x, y)
        for trace in markers(traces)
        if trace["name"] != "anchor"
        for x, y, ring in zip(trace["x"], trace["y"], trace["marker"]["line"]["color"], strict=True)
        if ring == "black"
    }
    assert ringed == {(point.flops / 1e9, point.metrics["mIoU"]) for point in front if not point.is_anchor}
    on_front = {name for name, lines in hovers(traces).items() if "on the Pareto front" in lines}
    assert on_front == {point.name for point in front}


def test_the_mouse_shows_what_is_known_of_a_stitch(tmp_path: Path) -> None:
    run = make_run()
    run = run.add(replace(run.points[45], metrics={"mIoU": 46.38, "aAcc": 80.25}, throughput=80.0, peak_memory=2**30))
    assert run.points[45].name == "L5-S3-L12"
    found = hovers(chart([run], tmp_path)[0])
    # 18 blocks of the large anchor at 9 G, 3 of the small one at 3 G.
    assert [line for line in found["L5-S3-L12"] if line != "on the Pareto front"] == [
        "<b>L5-S3-L12</b>  id 46, LSL",
        "171.00 GFLOPs, 2.00 M parameters",
        "12.5 ms, 80 images/s, 1024 MiB",
        "mIoU 46.38, aAcc 80.25",
        "",
        "S · · · ■ ■ ■ · · · · · ·",
        "L ■■■■■■······■■■■■■■■■■■■",
    ]
    assert found["L"][0] == "<b>L</b>  id 1, L, an anchor alone"
    assert found["L"][-2:] == ["S · · · · · · · · · · · ·", "L " + "■" * 24]
    assert len(found) == 134


def test_routes_of_three_anchors_and_of_one(tmp_path: Path) -> None:
    assert hovers(chart([make_run((4, 4, 8))], tmp_path)[0])["L1-M1-L6"][-3:] == [
        "S · · · ·",
        "M · ■ ■ ·",
        "L ■■····■■",
    ]
    assert hovers(chart([make_run((5,))], tmp_path)[0])["A"][-1] == "A ■■■■■"


def test_a_file_that_does_not_know_the_depths_has_no_routes(tmp_path: Path) -> None:
    text = page([replace(make_run(), depths=None)], tmp_path)
    assert "L5-S3-L12" in text and "■" not in text and "\\u25a0" not in text


def test_several_runs_share_the_legend_of_kinds(tmp_path: Path) -> None:
    runs = [make_run(), replace(make_run(seed=1), input_shape=(518, 518))]
    traces, layout = chart(runs, tmp_path)
    assert [trace["name"] for trace in traces if trace["mode"] == "lines"] == [
        "1: run0, 512 x 512",
        "2: run1, 518 x 518",
    ]
    shown = [trace["name"] for trace in markers(traces) if trace["showlegend"]]
    assert shown == ["SL", "LS", "LSL", "SLS", "anchor"] and len(markers(traces)) == 10
    assert layout["xaxis"]["title"]["text"] == "GFLOPs at the input size of each"
    dotted = [trace["marker"]["symbol"] for trace in markers(traces) if trace["name"] == "SL"]
    assert len(set(dotted)) == 2
    assert markers(traces)[-1]["hovertext"][0].split("<br>")[1] == "2: run1, 518 x 518"


def test_the_table_of_the_paper(tmp_path: Path) -> None:
    traces, _ = chart([make_run()], tmp_path, reference="ade20k")
    reported = [trace for trace in traces if "arXiv 2307.00154, Table 1" in trace["name"]]
    assert [(min(t["x"]), max(t["x"]), min(t["y"]), max(t["y"])) for t in reported] == [
        (34, 363, 45.6, 51.4),
        (110, 363, 48.5, 52.2),
        (32, 363, 45.5, 52.3),
    ]
    assert reported[0]["hovertext"] == (
        "<b>SN-Netv2 S-L</b> range<br>34 - 363 GFLOPs<br>mIoU 45.6 - 51.4<br>reported by arXiv 2307.00154, Table 1"
    )
    assert reported[2]["hovertext"][1].startswith("<b>DeiT3-B</b> alone<br>108 GFLOPs<br>mIoU 48.6<br>")


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    text = page([make_run()], tmp_path)
    assert not re.search(r"<(script|link|img)[^>]*\b(src|href)=", text)
    assert "Plotly.newPlot" in text and len(text) > 10**6
    assert '"showSendToCloud": false' in text


@pytest.mark.parametrize("odd", ["<b>", "</script><script>alert(1)</script>", "a & b", "%{x}"])
def test_names_are_text(tmp_path: Path, odd: str) -> None:
    point = OperatingPoint(0, odd, "A", 5, 7, {"mIoU": 3.0})
    run = OperatingPoints(None, None, odd, (8, 8), None, (point,))
    traces, layout = chart([run], tmp_path)
    assert "<script>alert" not in page([run], tmp_path)
    (texts,) = (trace["hovertext"] for trace in markers(traces))
    escaped = odd.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert texts[0].startswith(f"<b>{escaped}</b>  id 0") and layout["title"]["text"].startswith(escaped)
    assert "hovertemplate" not in markers(traces)[0]


def test_points_without_a_value_are_left_out(tmp_path: Path) -> None:
    run = make_run()
    lost = replace(run.points[60], metrics={"mIoU": math.nan, "aAcc": 1.0})
    traces, layout = chart([run.add(lost)], tmp_path)
    assert sum(len(trace["x"]) for trace in markers(traces)) == 133
    assert layout["title"]["text"].endswith("(1 without a value not shown)")
