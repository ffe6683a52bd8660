import itertools
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

import mmsnnet.visualization.routes as module
from mmsnnet.stitching.space import StitchSpace
from mmsnnet.visualization import draw_route, plot_routes
from mmsnnet.visualization.routes import route_lines

TWO = StitchSpace.two_way((12, 24))
THREE = StitchSpace.two_way((4, 4, 8))
ONE = StitchSpace.single(6)
RUN, LAYER = "#0072b2", "#d55e00"


def blocks(axes: Axes) -> dict[str, list[tuple[float, float, bool]]]:
    """The blocks of each anchor, by its letter beside the row: left and right edge, and whether filled."""
    letters = {text.get_position()[1]: text.get_text() for text in axes.texts if text.get_text().isalpha()}
    rows: dict[str, list[tuple[float, float, bool]]] = {letter: [] for letter in letters.values()}
    for patch in axes.patches:
        box = patch.get_bbox()
        row = letters[round((box.y0 + box.y1) / 2, 6)]
        rows[row].append((box.x0, box.x1, to_hex(patch.get_facecolor()) == RUN))
    return {letter: sorted(row) for letter, row in rows.items()}


def filled(axes: Axes) -> dict[str, set[int]]:
    return {row: {block for block, (*_, runs) in enumerate(found) if runs} for row, found in blocks(axes).items()}


def lines(axes: Axes, label: str) -> list[list[tuple[float, float]]]:
    return [list(zip(*line.get_data(), strict=True)) for line in axes.lines if line.get_label() == label]


def test_the_blocks_of_the_route_are_filled_and_no_others() -> None:
    # L [0, 6), S [3, 6), L [12, 24)
    axes = draw_route(TWO, TWO["L5-S3-L12"])
    assert filled(axes) == {"S": {3, 4, 5}, "L": {*range(6), *range(12, 24)}}
    assert {row: len(found) for row, found in blocks(axes).items()} == {"S": 12, "L": 24}
    assert axes.get_title(loc="left") == "L5-S3-L12  (id 46)"


@pytest.mark.slow
@pytest.mark.parametrize("space", [StitchSpace.two_way((3, 6)), StitchSpace.two_way((4, 6)), THREE, ONE])
def test_of_every_stitch_the_segments_are_filled(space: StitchSpace) -> None:
    for stitch in space:
        found = list(filled(draw_route(space, stitch)).values())
        for anchor in range(len(space.depths)):
            own = [range(s.start, s.stop) for s in stitch.segments if s.anchor == anchor]
            assert found[anchor] == set(itertools.chain(*own)), stitch


def test_corresponding_blocks_stand_one_above_the_other() -> None:
    rows = blocks(draw_route(TWO, TWO["S"]))
    for block, (left, right, _) in enumerate(rows["S"]):
        assert left == pytest.approx(rows["L"][2 * block][0]) and right == pytest.approx(rows["L"][2 * block + 1][1])


def test_the_ends_of_segments_are_numbered_in_their_blocks() -> None:
    axes = draw_route(TWO, TWO["L5-S3-L12"])
    numbers = {(text.get_text(), text.get_position()) for text in axes.texts if text.get_text().isdigit()}
    large = {(str(block), (block + 0.5, 1)) for block in (0, 5, 12, 23)}
    assert numbers == large | {("3", (7, 0)), ("5", (11, 0))}


def test_stitching_layers_join_the_segments_where_they_meet() -> None:
    axes = draw_route(TWO, TWO["L5-S3-L12"])
    # The large anchor's block 6 would begin at 6, its block 12 at 12; the rows are 0 and 1.
    assert lines(axes, "stitching layer") == [[(6, 1), (6, 0)], [(12, 0), (12, 1)]]
    arrows = [(line.get_marker(), line.get_xdata()[0]) for line in axes.lines if line.get_marker() in ("^", "v")]
    assert arrows == [("v", 6), ("^", 12)]
    assert lines(draw_route(TWO, TWO["L"]), "stitching layer") == []


def test_taps_are_where_tokens_leave_and_go_through_stitching_layers_to_the_largest_width() -> None:
    # At (12, 24), taps 9, 14, 19, 23 are blocks 4, 7, 9, 11 of the small anchor; the route is in it from 3 to 5.
    axes = draw_route(TWO, TWO["L5-S3-L12"], (9, 14, 19, 23))
    assert [x for ((x, _),) in lines(axes, "tap")] == [10, 15, 20, 24]
    assert lines(axes, "stitching layer of a tap") == [[(10, 0), (10, 1)]]
    small = draw_route(TWO, TWO["S"], (9, 14, 19, 23))
    assert [x for ((x, _),) in lines(small, "tap")] == [10, 16, 20, 24]
    assert len(lines(small, "stitching layer of a tap")) == 4
    assert lines(draw_route(TWO, TWO["L"]), "tap") == []


def test_taps_of_the_smallest_of_three_anchors_pass_through_the_middle_one() -> None:
    axes = draw_route(THREE, THREE["S"], (3, 7))
    assert lines(axes, "stitching layer of a tap") == [[(4, 0), (4, 1), (4, 2)], [(8, 0), (8, 1), (8, 2)]]
    assert len({y for ((_, y),) in lines(axes, "tap")}) == 1


def test_an_index_beyond_the_largest_anchor_is_no_tap() -> None:
    with pytest.raises(ValueError, match="0 to 23; got 24"):
        draw_route(TWO, TWO["S"], (24,))


def test_the_legend_has_what_is_drawn() -> None:
    def legend(axes: Axes) -> list[str]:
        (found,) = axes.figure.legends
        return [text.get_text() for text in found.get_texts()]

    layers = ["stitching layer", "stitching layer of a tap", "tap"]
    assert legend(draw_route(TWO, TWO["L5-S3-L12"], (9,))) == ["block that runs", "block that does not", *layers]
    assert legend(draw_route(TWO, TWO["S0-L2"])) == ["block that runs", "block that does not", "stitching layer"]
    assert legend(draw_route(ONE, ONE["A"], (2,))) == ["block that runs", "tap"]


@pytest.mark.parametrize("name", ["png", "SVG"])
def test_a_picture_of_several_routes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    figures = []
    render = module.render
    monkeypatch.setattr(module, "render", lambda figure, out: figures.append(figure) or render(figure, out))
    out = plot_routes(TWO, ["L7-S4-L20", 0, "80"], tmp_path / "new" / f"routes.{name}", (9, 23))
    (figure,) = figures
    drawn = [axes for axes in figure.axes if axes.patches]
    assert [axes.get_title(loc="left") for axes in drawn] == ["S  (id 0)", "L7-S4-L20  (id 57)", "S0-L2-S2  (id 80)"]
    assert filled(drawn[1]) == {"S": set(range(4, 10)), "L": {*range(8), *range(20, 24)}}
    assert os.listdir(out.parent) == [out.name]
    if name == "png":
        with Image.open(out) as image:
            image.load()
            assert image.size == tuple(round(side * 150) for side in figure.get_size_inches())
    else:
        assert ElementTree.parse(out).getroot().tag.endswith("svg")


@pytest.mark.parametrize("depths", [(12, 24), (12, 12, 24), (24, 40)])
def test_nothing_is_cut_off_and_numbers_fit_their_blocks(depths: tuple[int, ...]) -> None:
    space = StitchSpace.two_way(depths)
    stitch = max(space, key=lambda stitch: len(stitch.segments))
    axes = draw_route(space, stitch, (depths[-1] - 1,))
    figure = axes.figure
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    texts = [*axes.texts, *figure.legends[0].get_texts(), axes._left_title]
    for box in (text.get_window_extent() for text in texts if text.get_text()):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    slots = [patch.get_window_extent() for patch in axes.patches]
    for number in (text.get_window_extent() for text in axes.texts if text.get_text().isdigit()):
        assert any(slot.x0 <= number.x0 and number.x1 <= slot.x1 and slot.y0 <= number.y0 for slot in slots)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_routes_give_the_same_file(tmp_path: Path, suffix: str) -> None:
    files = [plot_routes(TWO, "57,80", tmp_path / f"{name}{suffix}", (9, 23)) for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("stitches", "out", "message"),
    [
        ("57,13", "plot.png", "stitch id 13 is not in the space"),
        ("S4-L9", "plot.png", "no stitch 'S4-L9'"),
        ("57", "plot.html", "ends in .png or .svg, found '.html'"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, stitches: str, out: str, message: str) -> None:
    (tmp_path / out).write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        plot_routes(TWO, stitches, tmp_path / out)
    assert (tmp_path / out).read_bytes() == b"old" and os.listdir(tmp_path) == [out]


def test_routes_in_characters() -> None:
    assert route_lines(TWO, TWO["L5-S3-L12"]) == ["S · · · ■ ■ ■ · · · · · ·", "L ■■■■■■······■■■■■■■■■■■■"]
    assert route_lines(THREE, THREE["M"]) == ["S · · · ·", "M ■ ■ ■ ■", "L ········"]
    assert route_lines(ONE, ONE["A"]) == ["A ■■■■■■"]
    # Blocks 0, 1, 2 of the small anchor correspond to 0-1, 2-3 and 4 of the large one.
    staged = StitchSpace.two_way([(2, 2), (2, 4)])
    assert route_lines(staged, staged["S0.1-L1.0"]) == ["S ■■ · ·", "L ·· ■■■■"]
    assert route_lines(staged, staged["L1.1-S1.1"]) == ["S ·· · ■", "L ■■ ■■··"]
    uneven = StitchSpace.two_way((3, 5))
    assert route_lines(uneven, uneven["S0-L2"]) == ["S ■ · ·", "L ··■■■"]


@pytest.mark.slow
@pytest.mark.parametrize("space", [TWO, THREE, StitchSpace.two_way((4, 6))])
def test_characters_and_blocks_say_the_same(space: StitchSpace) -> None:
    for stitch in list(space)[::7]:
        rows = route_lines(space, stitch)
        for row, depth, runs in zip(rows, space.depths, filled(draw_route(space, stitch)).values(), strict=True):
            characters = row[2:].replace(" ", "")
            assert len(characters) == depth
            assert {block for block, character in enumerate(characters) if character == "■"} == runs


def test_a_space_cut_down_to_one_stitch_is_drawn_as_the_whole_one() -> None:
    stitch = TWO["S4-L10"]
    only = replace(TWO, stitches=(stitch,), layers=stitch.layers)
    axes, whole = (draw_route(space, stitch, (9, 23)) for space in (only, TWO))
    assert blocks(axes) == blocks(whole) and lines(axes, "tap") == lines(whole, "tap")
