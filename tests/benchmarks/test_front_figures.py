"""The figures of a comparison of fronts."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from front_figures import Point, area, best_within, bins, distances, gains, report, summaries

POINTS = [
    Point("S", "S", 1.0, 40.0),
    Point("S0-L2", "SL", 2.0, 38.0),
    Point("L1-S1", "LS", 2.0, 44.0),
    Point("L1-S1-L4", "LSL", 3.0, 41.0),
    Point("L", "L", 5.0, 46.0),
]


def test_a_budget_buys_the_best_that_it_affords() -> None:
    assert best_within(POINTS, 0.5) is None
    assert [best_within(POINTS, cost) for cost in (1.0, 1.9, 2.0, 4.9, 5.0)] == [40.0, 40.0, 44.0, 44.0, 46.0]
    assert bins(POINTS, 1.0, 5.0, number=4) == [44.0, 44.0, 44.0, 46.0]


def test_the_area_is_the_mean_over_budgets() -> None:
    """40 over a quarter of the budgets, 44 over the rest; a worse stitch changes nothing, a better one adds."""
    assert area(POINTS, 1.0, 5.0) == pytest.approx((40 * 1 + 44 * 3) / 4)
    assert area([*POINTS, Point("bad", "SLS", 1.5, 10.0)], 1.0, 5.0) == area(POINTS, 1.0, 5.0)
    assert area([*POINTS, Point("good", "SLS", 3.0, 45.0)], 1.0, 5.0) == pytest.approx((40 + 44 + 45 * 2) / 4)


def test_the_distance_to_the_front_is_a_median_by_kind() -> None:
    found = distances([*POINTS, Point("S2-L4", "SL", 3.0, 44.0), Point("S3-L6", "SL", 4.0, 43.0)])
    assert found == {"S": 0.0, "SL": 1.0, "LS": 0.0, "LSL": 3.0, "L": 0.0}


def entry(recipe: str, seed: int, shift: float = 0.0, points: list[Point] = POINTS) -> dict[str, Any]:
    moved = [point._replace(quality=point.quality + shift)._asdict() for point in points]
    return dict(recipe=recipe, seed=seed, iterations=100, training_tflops_per_image=2.0, points=moved)


def test_seeds_are_averaged_and_anchors_held_against_those_trained_alone() -> None:
    results = dict(
        anchors=dict(s=39.25, l=45.25),
        runs=[
            entry("published", 0),
            entry("published", 1, shift=2.0),
            entry("alone-s", 0, points=[Point("A", "A", 1.0, 41.0)]),
            entry("alone-s", 1, points=[Point("A", "A", 1.0, 41.5)]),
        ],
    )
    [summary] = summaries(results)
    assert summary.seeds == 2 and summary.area == (pytest.approx(44.0), pytest.approx(1.0))
    assert summary.anchors == {"S": (pytest.approx(-0.25), pytest.approx(0.75))}
    text = report(results)
    assert "| published | 2 | 100 | 1.00 |" in text and "L is 6.0 above S" in text
    assert "| alone-s | 2 | 100 | 1.00 | 1.0000 | 41.2 ± 0.2 |" in text
    assert "| published | 41.0 (0.0) | 39.0 (6.0) | 45.0 (0.0) | 42.0 (3.0) | 47.0 (0.0) |" in text


def test_a_recipe_is_compared_with_published_of_the_same_seed() -> None:
    better = [*POINTS, Point("S2-L4", "SL", 2.0, 45.0)]  # in the second of four bins of 1 GFLOPs, and after it
    runs = [entry("published", 0), entry("published", 1, 3.0), entry("teacher", 1, 4.0, better), entry("teacher", 2)]
    found = gains(dict(runs=runs))
    assert set(found) == {"teacher"}
    # Bins end at 1.67, 2.33, 3, 3.67, 4.33 and 5 GFLOPs.
    assert found["teacher"] == [[1.0], [2.0], [2.0], [2.0], [2.0], [1.0], [pytest.approx((1.0 * 1 + 2.0 * 3) / 4)]]
    text = report(dict(anchors=dict(s=1.0, l=2.0), runs=[*runs, entry("teacher", 0, -1.0)]))
    assert "| teacher | 2 | +0.0 (-1.0 to +1.0) | +0.5 (-1.0 to +2.0) |" in text


def test_budgets_below_the_cheapest_stitch_get_this_stitch() -> None:
    assert area(POINTS[2:4], 1.0, 3.0) == 44.0


def test_the_picture(tmp_path: Path) -> None:
    results = dict(anchors=dict(s=40.0, l=46.0), runs=[entry("published", 0), entry("teacher", 0, 1.0)])
    report(results, tmp_path / "fronts.png")
    assert (tmp_path / "fronts.png").stat().st_size > 10_000
