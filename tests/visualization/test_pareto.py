import ast
import itertools
import math
import os
import random
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from PIL import Image

import mmsnnet.visualization.pareto as module
from mmsnnet.evaluation import OperatingPoint, OperatingPoints, pareto_front
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.visualization import plot_pareto

SVG = "{http://www.w3.org/2000/svg}"


def make_run(
    dataset: str | None = "ADE20K",
    seed: int = 0,
    scale: int = 10**9,
    depths: tuple[int, ...] = (12, 24),
    block_flops: tuple[int, ...] = (3, 15),
    **metrics: float,
) -> OperatingPoints:
    """Made-up points for the stitches of a space: the 134 of DeiT3-S and -L."""
    rng = random.Random(seed)
    points = []
    for stitch in StitchSpace.two_way(depths):
        flops = scale * sum(block_flops[segment.anchor] * len(segment) for segment in stitch.segments)
        quality = {"mIoU": 40 + 10 * (flops / scale / 360) ** 0.5 - rng.random(), **metrics}
        points.append(OperatingPoint(stitch.id, stitch.name, stitch.kind, flops, flops, quality, flops / scale / 9))
    return OperatingPoints(f"configs/run{seed}.py", None, dataset, (512, 512), None, tuple(points))


def drawn(runs: list[OperatingPoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **kwargs: object) -> Axes:
    """The axes of the figure that was rendered."""
    figures = []
    render = module.render
    monkeypatch.setattr(module, "render", lambda figure, out: figures.append(figure) or render(figure, out))
    plot_pareto(runs, kwargs.pop("metric", "mIoU"), tmp_path / "plot.png", **kwargs)
    return figures[0].axes[0]


def dots(axes: Axes) -> list[tuple[float, float]]:
    return [tuple(place) for collection in axes.collections for place in np.asarray(collection.get_offsets())]


def stars(axes: Axes) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() == "*"]


def steps(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_drawstyle() == "steps-post"]


def header(axes: Axes) -> list[str]:
    """What is said above the axes: of runs and of what is drawn beside them."""
    return [text.get_text() for text in axes.figure.legends[1].get_texts()]


def test_every_stitch_is_drawn_once_and_the_line_is_the_front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    axes = drawn([run], tmp_path, monkeypatch)
    places = {(p.flops / 1e9, p.metrics["mIoU"]) for p in run}
    assert len(dots(axes)) == 132 and len(stars(axes)) == 2
    assert {*dots(axes), *stars(axes)} == places
    front = pareto_front(run, metric="mIoU")
    (line,) = steps(axes)
    corners = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
    assert corners[:-1] == [(p.flops / 1e9, p.metrics["mIoU"]) for p in front]
    assert corners[-1] == (360, front[-1].metrics["mIoU"])
    # No stitch lies above the line: at its cost the line is at least as high.
    for x, y in places:
        assert y <= max(corner_y for corner_x, corner_y in corners if corner_x <= x)


def test_dots_are_coloured_by_kind_and_those_on_the_front_are_ringed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run()
    axes = drawn([run], tmp_path, monkeypatch)
    kinds = {(p.flops / 1e9, p.metrics["mIoU"]): p.kind for p in run}
    colours: dict[str, set[tuple[float, ...]]] = {}
    for collection in axes.collections:
        for place, colour in zip(collection.get_offsets(), collection.get_facecolors(), strict=True):
            colours.setdefault(kinds[tuple(place)], set()).add(tuple(colour[:3]))
    assert set(colours) == {"SL", "LS", "LSL", "SLS"}
    assert all(len(of_kind) == 1 for of_kind in colours.values())
    assert len(set().union(*colours.values())) == 4
    ringed = [c for c in axes.collections if len(c.get_offsets()) and tuple(c.get_edgecolors()[0][:3]) == (0, 0, 0)]
    front = [p for p in pareto_front(run, metric="mIoU") if not p.is_anchor]
    assert {tuple(place) for c in ringed for place in c.get_offsets()} == {
        (p.flops / 1e9, p.metrics["mIoU"]) for p in front
    }


@pytest.mark.parametrize("depths", [(12, 12, 24), (6, 6, 6, 6), (4,) * 5])
def test_kinds_of_many_anchors_keep_apart(
    depths: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(depths=depths, block_flops=(3, 9, 15, 30, 60))
    axes = drawn([run], tmp_path, monkeypatch)
    (legend,) = axes.figure.legends
    kinds = [kind for kind in dict.fromkeys(point.kind for point in run) if len(kind) > 1]
    assert len(kinds) == 4 * (len(depths) - 1)
    assert [text.get_text() for text in legend.get_texts()] == [*kinds, "Pareto front", "anchor"]
    colours = [to_rgb(handle.get_color()) for handle in legend.legend_handles[: len(kinds)]]
    assert min(math.dist(*pair) for pair in itertools.combinations(colours, 2)) > 0.15
    assert all(max(colour) > 0.4 for colour in colours), "black is for the front and the anchors"
    kind_at = {(p.flops / 1e9, p.metrics["mIoU"]): p.kind for p in run}
    for collection in axes.collections:
        for place, colour in zip(collection.get_offsets(), collection.get_facecolors(), strict=True):
            assert tuple(colour[:3]) == pytest.approx(colours[kinds.index(kind_at[tuple(place)])])
    assert len(stars(axes)) == len(axes.texts) == len(depths)
    boxes = [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label, *legend.get_texts()]
    extents = [text.get_window_extent() for text in boxes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= 1200 and box.y1 <= 750 for box in extents)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(extents, 2))


def test_texts_say_what_is_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    axes = drawn([run], tmp_path, monkeypatch)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("GFLOPs", "mIoU")
    front = len(pareto_front(run, metric="mIoU"))
    assert axes.get_title() == f"ADE20K: 134 stitches, {front} on the Pareto front"
    assert [text.get_text() for text in axes.texts] == ["S", "L"]
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("SL", "LS", "LSL", "SLS"),
        *("Pareto front", "anchor"),
    ]


def test_nothing_is_cut_off_and_no_names_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same anchors in both runs: stars at one place, names apart.
    axes = drawn([make_run(), make_run(seed=0)], tmp_path, monkeypatch)
    figure = axes.figure
    boxes = [text.get_window_extent() for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    boxes += [label.get_window_extent() for label in axes.get_yticklabels() if label.get_text()]
    with Image.open(tmp_path / "plot.png") as image:
        width, height = image.size
    assert width == 1200
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    # The header is above what is drawn, not on it.
    assert len(figure.legends) == 2 and figure.legends[1].get_window_extent().y0 > axes.get_window_extent().y1
    assert [text.get_text() for text in axes.texts] == ["S (1)", "L (1)", "S (2)", "L (2)"]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)


def test_runs_are_told_apart_by_marker_line_and_legend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(seed=seed) for seed in range(3)]
    axes = drawn(runs, tmp_path, monkeypatch)
    assert len(dots(axes)) == 3 * 132 and len(stars(axes)) == 6
    assert len({line.get_linestyle() for line in steps(axes)}) == 3
    markers = {tuple(map(tuple, collection.get_paths()[0].vertices.round(6))) for collection in axes.collections}
    assert len(markers) == 3
    assert header(axes) == ["1: run0", "2: run1", "3: run2"]
    assert axes.get_title() == "ADE20K"


def test_runs_of_one_config_are_named_by_their_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ("work_dirs/first/iter_8.pth", "iter_9.pth", "w" * 99 + ".pth")
    runs = [OperatingPoints("configs/a.py", file, "d", (8, 8), None, make_run().points) for file in files]
    axes = drawn(runs, tmp_path, monkeypatch)
    labels = header(axes)
    assert labels[:2] == ["1: a, first/iter_8", "2: a, iter_9"]
    assert len(labels[2]) == 59 and "..." in labels[2]


def test_runs_of_other_input_sizes_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(), replace(make_run(seed=1), input_shape=(518, 600))]
    axes = drawn(runs, tmp_path, monkeypatch)
    assert header(axes) == ["1: run0, 512 x 512", "2: run1, 518 x 600"]
    assert axes.get_xlabel() == "GFLOPs at the input size of each"


def test_runs_timed_otherwise_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"device": "Toaster 3", "batch_size": 1, "precision": "fp16", "date": "1"}
    runs = [replace(make_run(), benchmark=settings), replace(make_run(), benchmark=settings | {"date": "2"})]
    axes = drawn(runs, tmp_path, monkeypatch, cost="latency_ms")
    assert header(axes) == ["1: run0", "2: run0"]
    assert axes.get_xlabel() == "latency (ms) on Toaster 3"
    runs[1] = replace(make_run(), benchmark=settings | {"device": "cpu", "batch_size": 8})
    axes = drawn(runs, tmp_path, monkeypatch, cost="latency_ms")
    assert header(axes) == ["1: run0, device Toaster 3, batch_size 1", "2: run0, device cpu, batch_size 8"]
    assert axes.get_xlabel() == "latency (ms)"
    # The latencies are those of `batch_size`; the other sizes of one run are not drawn.
    runs[1] = replace(runs[0], benchmark=settings | {"batch_sizes": "1,4"})
    assert header(drawn(runs, tmp_path, monkeypatch, cost="latency_ms")) == ["1: run0", "2: run0"]
    # FLOPs do not depend on it.
    assert header(drawn(runs, tmp_path, monkeypatch)) == ["1: run0", "2: run0"]


@pytest.mark.parametrize(
    ("name", "dataset", "alone", "ranges"),
    [
        (
            "ade20k",
            "ADE20KDataset",
            [(32, 45.5), (108, 48.6), (363, 52.3)],
            {"SN-Netv2 S-L": (34, 45.6, 363, 51.4), "SN-Netv2 B-L": (110, 48.5, 363, 52.2)},
        ),
        (
            "coco_stuff10k",
            "COCOStuffDataset",
            [(32, 39.6), (108, 42.7), (363, 47.8)],
            {"SN-Netv2 S-L": (34, 40.1, 363, 48.2), "SN-Netv2 B-L": (110, 42.7, 363, 48.1)},
        ),
    ],
)
def test_the_table_of_the_paper_is_drawn_beside_the_runs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    dataset: str,
    alone: list[tuple[float, float]],
    ranges: dict[str, tuple[float, float, float, float]],
) -> None:
    axes = drawn([make_run(dataset)], tmp_path, monkeypatch, reference=name)
    diamonds = [line for line in axes.lines if line.get_marker() == "D"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in diamonds] == alone
    frames = [tuple(patch.get_bbox().extents) for patch in axes.patches]
    assert [pytest.approx(frame) for frame in frames] == list(ranges.values())
    assert len({patch.get_linestyle() for patch in axes.patches}) == 2
    assert header(axes) == [
        "run0",
        "DeiT3-S, DeiT3-B, DeiT3-L alone, arXiv 2307.00154, Table 1",
        *(f"range of {of}, arXiv 2307.00154, Table 1" for of in ranges),
    ]
    assert len(dots(axes)) == 132 and len(steps(axes)) == 1
    left, right = axes.get_xlim()
    assert left < 32 and right > 363


def test_a_reference_says_its_input_size_where_it_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = replace(make_run("ADE20KDataset"), input_shape=(518, 518))
    labels = header(drawn([run], tmp_path, monkeypatch, reference="ade20k"))
    assert labels[0] == "run0, 518 x 518" and all(label.endswith("Table 1, 512 x 512") for label in labels[1:])


def test_a_reference_is_in_gflops_however_small_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn([make_run("ADE20KDataset", scale=10**6)], tmp_path, monkeypatch, reference="ade20k")
    assert axes.get_xlabel() == "GFLOPs" and max(x for x, _ in stars(axes)) == pytest.approx(0.36)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reference": "coco_stuff10k"}, "reference coco_stuff10k is for COCOStuffDataset, but .* for ADE20KDataset"),
        ({"reference": "cityscapes"}, "expected ade20k or coco_stuff10k, got 'cityscapes'"),
        ({"reference": "ade20k", "cost": "latency_ms"}, "is mIoU over flops, but the plot is mIoU over latency_ms"),
        ({"reference": "ade20k", "metric": "aAcc"}, "is mIoU over flops, but the plot is aAcc over flops"),
    ],
)
def test_a_reference_of_something_else(tmp_path: Path, kwargs: dict, message: str) -> None:
    metric = kwargs.pop("metric", "mIoU")
    with pytest.raises(ValueError, match=message):
        plot_pareto([make_run("ADE20KDataset", aAcc=1.0)], metric, tmp_path / "plot.png", **kwargs)
    assert os.listdir(tmp_path) == []


def test_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = make_run(scale=10**6)
    assert drawn([small], tmp_path, monkeypatch).get_xlabel() == "MFLOPs"
    assert max(x for x, _ in stars(drawn([small], tmp_path, monkeypatch))) == 360
    axes = drawn([small], tmp_path, monkeypatch, cost="latency_ms")
    assert axes.get_xlabel() == "latency (ms)"
    assert max(x for x, _ in stars(axes)) == 40


def test_lower_is_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = drawn([make_run()], tmp_path, monkeypatch, higher=False)
    assert axes.get_ylabel() == "mIoU (lower is better)"
    (line,) = steps(axes)
    assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True)


def test_an_error_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    errors = [replace(point, metrics={"d1": 0.5, "abs_rel": 1 / point.metrics["mIoU"]}) for point in run]
    axes = drawn([replace(run, points=tuple(errors))], tmp_path, monkeypatch, metric=None)
    assert axes.get_ylabel() == "abs_rel (lower is better)"
    (line,) = steps(axes)
    assert list(line.get_ydata()) == sorted(line.get_ydata(), reverse=True) and len(set(line.get_ydata())) > 3


def test_points_without_a_value_are_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    lost = OperatingPoint(50, "x", "LSL", 10**12, 1, {"mIoU": math.nan})
    axes = drawn([run.add(lost)], tmp_path, monkeypatch)
    assert len(dots(axes)) == 131
    assert axes.get_title().endswith("on the Pareto front (1 without a value not shown)")
    assert max(steps(axes)[0].get_xdata()) == 360


def test_one_stitch_without_a_data_set_and_names_that_look_like_formulas(tmp_path: Path) -> None:
    one = OperatingPoint(0, "$A_", "A", 5, 7, {"m_$": 3.0})
    for dataset in (None, "a $b_$ c"):
        run = OperatingPoints(None, None, dataset, (8, 8), None, (one,))
        plot_pareto([run], None, tmp_path / "plot.png", higher=True)


def test_png(tmp_path: Path) -> None:
    out = tmp_path / "new" / "plot.PNG"
    assert plot_pareto([make_run()], None, out) == out
    with Image.open(out) as image:
        image.load()
        assert image.format == "PNG" and image.size == (1200, 750)
        assert len(image.convert("RGB").getcolors(2**20)) > 50
    assert os.listdir(out.parent) == ["plot.PNG"]


def test_svg(tmp_path: Path) -> None:
    root = ElementTree.parse(plot_pareto([make_run()], "mIoU", tmp_path / "plot.svg")).getroot()
    assert root.tag == f"{SVG}svg"
    assert (float(root.get("width")[:-2]), float(root.get("height")[:-2])) == (8 * 72, 5 * 72)
    assert len(list(root.iter(f"{SVG}use"))) >= 134


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".png", ".svg", ".html"])
def test_the_same_runs_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    first, second = (
        plot_pareto([make_run("ADE20KDataset")], "mIoU", tmp_path / f"{name}{suffix}", reference="ade20k")
        for name in ("first", "second")
    )
    assert first.read_bytes() == second.read_bytes()


def test_an_interrupted_write_leaves_the_old_picture_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "plot.png"
    out.write_bytes(b"old")

    def interrupt(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(OSError, match="disk full"):
        plot_pareto([make_run()], "mIoU", out)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == ["plot.png"]


@pytest.mark.slow
def test_settings_of_matplotlib_neither_change_nor_are_changed(tmp_path: Path) -> None:
    import matplotlib

    pyplot = sys.modules.get("matplotlib.pyplot")
    figures = pyplot.get_fignums() if pyplot else []
    with matplotlib.rc_context({"savefig.bbox": "tight", "savefig.dpi": 40, "figure.dpi": 30}):
        before = dict(matplotlib.rcParams)
        with Image.open(plot_pareto([make_run()], "mIoU", tmp_path / "plot.png")) as image:
            assert image.size == (1200, 750)
        assert dict(matplotlib.rcParams) == before
    assert (pyplot.get_fignums() if pyplot else []) == figures


EMPTY = OperatingPoints("configs/none.py", None, "ADE20K", (8, 8), None)
NO_VALUE = OperatingPoints(None, None, "d", (8, 8), None, (OperatingPoint(0, "S", "S", 1, 1, {"mIoU": math.nan}),))
NO_LATENCY = OperatingPoints(None, None, "d", (8, 8), None, (OperatingPoint(0, "S", "S", 1, 1, {"mIoU": 1.0}),))


@pytest.mark.parametrize(
    ("runs", "kwargs", "message"),
    [
        ([], {}, "expected 1 to 8 runs on one plot, found 0"),
        ([make_run()] * 9, {}, "expected 1 to 8 runs on one plot, found 9"),
        ([make_run(), EMPTY], {}, r"run 2 \(configs/none.py\) has no stitches"),
        ([make_run(), make_run("NYUv2")], {}, "different data sets cannot share a plot, found ADE20K, NYUv2"),
        ([make_run(), make_run(None)], {}, "found ADE20K, an unnamed one"),
        ([make_run()], {"metric": "rmse"}, "has no metric 'rmse'; it has mIoU"),
        ([make_run(), make_run(aAcc=1.0)], {"metric": "aAcc"}, "has no metric 'aAcc'"),
        ([make_run(aAcc=1.0, quality=1.0)], {"metric": "quality"}, "'quality' is not known.*--better"),
        ([NO_VALUE], {}, "'mIoU' is NaN for every stitch"),
        ([NO_LATENCY], {"cost": "latency_ms"}, "has no latency_ms"),
        ([make_run()], {"out": "plot.pdf"}, "ends in .png, .svg or .html, found '.pdf'"),
        ([make_run()], {"out": "plot"}, "ends in .png, .svg or .html, found 'no suffix'"),
        ([make_run(), make_run("NYUv2")], {"out": "plot.html"}, "different data sets cannot share a plot"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, runs: list[OperatingPoints], kwargs: dict, message: str) -> None:
    out = tmp_path / kwargs.get("out", "plot.png")
    out.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        plot_pareto(runs, kwargs.get("metric", "mIoU"), out, kwargs.get("cost", "flops"))
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == [out.name]


FILES = sorted(path.name for path in Path(module.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_what_draws_is_imported_where_it_draws_only(file: str) -> None:
    tree = ast.parse((Path(module.__file__).parent / file).read_text(encoding="utf-8"))
    at_import = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    at_import |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(name.startswith(("matplotlib", "plotly", "torch", "mmengine")) for name in at_import)
    anywhere = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    anywhere |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "matplotlib.pyplot" not in anywhere
