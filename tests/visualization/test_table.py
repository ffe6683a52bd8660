import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.visualization import operating_points_table


def make_run(*points: OperatingPoint, dataset: str | None = "ADE20K") -> OperatingPoints:
    return OperatingPoints("configs/a.py", None, dataset, (512, 512), None, points)


SMALL = OperatingPoint(0, "S", "S", 32_000_000_000, 23_000_000, {"mIoU": 45.5, "abs_rel": 0.0955})
LARGE = OperatingPoint(1, "L", "L", 363_040_000_000, 307_100_000, {"mIoU": 51.456, "abs_rel": 0.0821})
WORSE = OperatingPoint(14, "L1-S1", "LS", 61_500_000_000, 46_000_000, {"mIoU": 44.0, "abs_rel": 0.08})
TIMED = OperatingPoint(57, "L5-S3-L12", "LSL", 226_892_446_208, 301_000_000, {"mIoU": 46.38}, 21.4)


def rows(table: Table) -> list[list[str]]:
    """The header and the rows as they come out without colour."""
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    lines = [line for line in out.getvalue().splitlines() if line.strip() and not set(line.strip()) <= set("─━ ")]
    table_lines = lines[1:] if table.title else lines
    return [[cell for cell in line.strip().split("  ") if cell.strip()] for line in table_lines]


def cells(table: Table) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in rows(table)]


def test_rows_ascend_in_cost_and_front_and_anchors_are_marked() -> None:
    table = operating_points_table(make_run(LARGE, TIMED, WORSE, SMALL), "mIoU")
    assert cells(table) == [
        ["id", "name", "kind", "GFLOPs", "params (M)", "latency (ms)", "mIoU", "abs_rel", "mark"],
        ["0", "S", "S", "32.00", "23.00", "-", "45.50", "0.0955", "front, anchor"],
        ["14", "L1-S1", "LS", "61.50", "46.00", "-", "44.00", "0.0800"],
        ["57", "L5-S3-L12", "LSL", "226.89", "301.00", "21.40", "46.38", "-", "front"],
        ["1", "L", "L", "363.04", "307.10", "-", "51.46", "0.0821", "front, anchor"],
    ]


def test_rows_of_the_front_are_bold() -> None:
    table = operating_points_table(make_run(LARGE, TIMED, WORSE, SMALL), "mIoU")
    assert [row.style for row in table.rows] == ["bold", None, "bold", "bold"]


def test_the_front_is_that_of_the_metric_and_its_direction() -> None:
    table = operating_points_table(make_run(LARGE, WORSE, SMALL), "abs_rel")
    assert [row[-1] for row in cells(table)[1:]] == ["front, anchor", "front", "anchor"]
    table = operating_points_table(make_run(LARGE, WORSE, SMALL), "abs_rel", higher=True)
    assert [row[-1] for row in cells(table)[1:]] == ["front, anchor", "44.00", "anchor"]


def test_cost_by_latency() -> None:
    slow = OperatingPoint(2, "S0-L2", "SL", 1_000_000_000, 1, {"mIoU": 46.0}, 30.0)
    table = operating_points_table(make_run(slow, TIMED), "mIoU", cost="latency_ms")
    assert [row[0] for row in cells(table)[1:]] == ["57", "2"]
    assert [row.style for row in table.rows] == ["bold", None]
    with pytest.raises(ValueError, match=r"0 \(S\) has no latency_ms"):
        operating_points_table(make_run(TIMED, SMALL), "mIoU", cost="latency_ms")


def test_small_models_are_in_mflops_and_latency_has_no_column_where_there_is_none() -> None:
    tiny = OperatingPoint(0, "A", "A", 12_345_678, 543_210, {"mIoU": math.nan})
    assert cells(operating_points_table(make_run(tiny, dataset=None))) == [
        ["id", "name", "kind", "MFLOPs", "params (M)", "mIoU", "mark"],
        ["0", "A", "A", "12.35", "0.54", "nan", "anchor"],
    ]


def test_names_are_not_read_as_markup() -> None:
    odd = OperatingPoint(0, "[red]S[/]", "S", 1, 1, {"[bold]m": 1.0})
    table = operating_points_table(make_run(odd, dataset="[blue]d"), None)
    out = io.StringIO()
    Console(file=out, width=200, color_system=None).print(table)
    assert all(text in out.getvalue() for text in ("[red]S[/]", "[bold]m", "[blue]d"))


def test_without_measurements_there_is_no_front_to_mark() -> None:
    table = operating_points_table(make_run(replace(SMALL, metrics={})))
    header, row = rows(table)
    assert [cell.strip() for cell in header] == ["id", "name", "kind", "GFLOPs", "params (M)", "mark"]
    assert [cell.strip() for cell in row] == ["0", "S", "S", "32.00", "23.00", "anchor"]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"57 \(L5-S3-L12\) has no metric 'abs_rel'"):
        operating_points_table(make_run(SMALL, TIMED), "abs_rel")


def test_of_many_metrics_the_one_in_question_and_the_first_others_are_shown() -> None:
    """COCO has twelve, more than a terminal is wide."""
    table = operating_points_table(
        make_run(replace(SMALL, metrics={name: 1.0 for name in "abcdefgh"} | {"mIoU": 2})), "mIoU"
    )
    assert cells(table)[0][5:-1] == ["mIoU", "a", "b", "c"]
    assert table.caption == "not shown: d, e, f, g, h"
    assert operating_points_table(make_run(SMALL), "mIoU").caption is None
