"""The figures of a comparison of fronts, from the results of benchmarks/front.py."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

BINS = 6
Entry = Mapping[str, Any]


class Point(NamedTuple):
    """A stitch: its kind, its cost in GFLOPs and its quality in points of mIoU."""

    name: str
    kind: str
    gflops: float
    quality: float


def points_of(entry: Entry) -> list[Point]:
    return [Point(**point) for point in entry["points"]]


def best_within(points: Sequence[Point], gflops: float) -> float | None:
    """The best quality that a budget buys; None if it buys no stitch."""
    affordable = [point.quality for point in points if point.gflops <= gflops * (1 + 1e-9)]
    return max(affordable, default=None)


def bins(points: Sequence[Point], low: float, high: float, number: int = BINS) -> list[float | None]:
    """The best quality within each of evenly spaced budgets from above ``low`` up to ``high``."""
    return [best_within(points, low + (high - low) * (k + 1) / number) for k in range(number)]


def area(points: Sequence[Point], low: float, high: float) -> float:
    """The mean over all budgets from ``low`` to ``high`` of the best quality within.

    A budget below the cheapest stitch gets this stitch.
    """
    cheapest = min(points, key=lambda point: point.gflops)
    steps = sorted({point.gflops for point in points if low < point.gflops < high} | {low, high})
    total = 0.0
    for left, right in pairwise(steps):
        total += (best_within(points, left) or cheapest.quality) * (right - left)
    return total / (high - low)


def distances(points: Sequence[Point]) -> dict[str, float]:
    """The median distance below the front of the stitches of each kind."""
    found: dict[str, list[float]] = {}
    for point in points:
        best = best_within(points, point.gflops)
        assert best is not None
        found.setdefault(point.kind, []).append(best - point.quality)
    return {kind: median(values) for kind, values in found.items()}


class Summary(NamedTuple):
    """The figures of a recipe over its seeds: each a mean and half the range."""

    recipe: str
    seeds: int
    iterations: int
    cost: float  # of training, over that of "published"
    bins: list[tuple[float, float]]
    area: tuple[float, float]
    anchors: dict[str, tuple[float, float]]
    kinds: dict[str, float]


def summaries(results: Mapping[str, Any]) -> list[Summary]:
    """The figures of each recipe that trains stitches, in the order of the results."""
    stitched = [entry for entry in results["runs"] if len(entry["points"]) > 1]
    if not stitched:
        return []
    costs = {point.name: point.gflops for point in points_of(stitched[0])}
    budgets = {
        entry["seed"]: entry["training_tflops_per_image"] for entry in stitched if entry["recipe"] == "published"
    }
    low, high = costs["S"], costs["L"]
    by_recipe: dict[str, list[Entry]] = {}
    for entry in stitched:
        by_recipe.setdefault(entry["recipe"], []).append(entry)
    found = []
    for recipe, entries in by_recipe.items():
        fronts = [points_of(entry) for entry in entries]
        columns = list(zip(*(bins(points, low, high) for points in fronts), strict=True))
        routes: dict[str, list[float]] = {"S": [], "L": []}
        for entry, points in zip(entries, fronts, strict=True):
            quality = {point.name: point.quality for point in points}
            for name, alone in alone_for_as_long(results, entry["seed"]).items():
                routes[name].append(quality[name] - alone)
        kinds: dict[str, list[float]] = {}
        for points in fronts:
            for kind, distance in distances(points).items():
                kinds.setdefault(kind, []).append(distance)
        found.append(
            Summary(
                recipe,
                len(entries),
                round(mean(entry["iterations"] for entry in entries)),
                mean(entry["training_tflops_per_image"] / budgets.get(entry["seed"], math.nan) for entry in entries),
                [_spread([value for value in column if value is not None]) for column in columns],
                _spread([area(points, low, high) for points in fronts]),
                {name: _spread(values) for name, values in routes.items() if values},
                {kind: mean(values) for kind, values in kinds.items()},
            )
        )
    return found


def gains(results: Mapping[str, Any], over: str = "published") -> dict[str, list[list[float]]]:
    """By recipe, for each bin and for the area, the differences to the recipe ``over`` of the same seeds."""
    fronts = {
        (entry["recipe"], entry["seed"]): points_of(entry) for entry in results["runs"] if len(entry["points"]) > 1
    }
    found: dict[str, list[list[float]]] = {}
    for (recipe, seed), points in fronts.items():
        if recipe == over or (over, seed) not in fronts:
            continue
        base = fronts[over, seed]
        costs = {point.name: point.gflops for point in base}
        low, high = costs["S"], costs["L"]
        figures = [[*bins(front, low, high), area(front, low, high)] for front in (points, base)]
        columns = found.setdefault(recipe, [[] for _ in range(BINS + 1)])
        for column, new, old in zip(columns, *figures, strict=True):
            assert new is not None and old is not None  # each bin affords S
            column.append(new - old)
    return found


def alone_for_as_long(results: Mapping[str, Any], seed: int) -> dict[str, float]:
    """The quality of each anchor trained on alone for the same cost, where it was run."""
    found = {}
    for name in ("S", "L"):
        for entry in results["runs"]:
            if (entry["recipe"], entry["seed"]) == (f"alone-{name.lower()}", seed):
                found[name] = entry["points"][0]["quality"]
    return found


def report(results: Mapping[str, Any], picture: Path | None = None) -> str:
    """Tables in Markdown; optionally a picture of the fronts."""
    rows = summaries(results)
    if picture is not None:
        draw(results, picture)
    anchors = results["anchors"]
    lines = [
        f"Machine: {results.get('machine')}. Anchors before: "
        + ", ".join(
            f"{letter.upper()} {quality:.1f}" for letter, quality in sorted(anchors.items(), key=lambda a: a[1])
        )
        + f"; L is {anchors['l'] - anchors['s']:.1f} above S.",
        "",
        f"| recipe | seeds | iterations | cost | {' | '.join(f'{k}/{BINS}' for k in range(1, BINS + 1))} | area | "
        "S - alone | L - alone |",
        "|---" * (7 + BINS) + "|",
    ]
    for row in rows:
        cells = [_shown(value) for value in (*row.bins, row.area)]
        cells += [_shown(row.anchors[name]) if name in row.anchors else "" for name in ("S", "L")]
        lines.append(f"| {row.recipe} | {row.seeds} | {row.iterations} | {row.cost:.2f} | {' | '.join(cells)} |")
    lines += ["", *differences(results), "", *by_kind(results, rows), "", *single_models(results)]
    return "\n".join(lines).rstrip()


def differences(results: Mapping[str, Any]) -> list[str]:
    """A table of the differences to the recipe "published": the mean over seeds, and their range."""
    names = " | ".join(f"{k}/{BINS}" for k in range(1, BINS + 1))
    lines = [f"| minus published, same seeds | seeds | {names} | area |", "|---" * (3 + BINS) + "|"]
    for recipe, columns in gains(results).items():
        cells = [
            f"{mean(values):+.1f}" + (f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else "")
            for values in columns
        ]
        lines.append(f"| {recipe} | {len(columns[0])} | {' | '.join(cells)} |")
    return lines


def by_kind(results: Mapping[str, Any], rows: Sequence[Summary]) -> list[str]:
    """A table of the mean quality of each kind, and of the median distance below the front."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.kinds))
    lines = [f"| mean quality (distance below the front) | {' | '.join(kinds)} |", "|---" * (1 + len(kinds)) + "|"]
    for row in rows:
        qualities: dict[str, list[float]] = {}
        for entry in results["runs"]:
            if entry["recipe"] == row.recipe:
                for point in points_of(entry):
                    qualities.setdefault(point.kind, []).append(point.quality)
        cells = [f"{mean(qualities[k]):.1f} ({row.kinds[k]:.1f})" if k in row.kinds else "" for k in kinds]
        lines.append(f"| {row.recipe} | {' | '.join(cells)} |")
    return lines


def single_models(results: Mapping[str, Any]) -> list[str]:
    """A table of models of one stitch: anchors trained alone, polished stitches; empty if there are none."""
    found: dict[str, list[Entry]] = {}
    for entry in results["runs"]:
        if len(entry["points"]) == 1:
            found.setdefault(entry["recipe"], []).append(entry)
    budgets = [entry["training_tflops_per_image"] for entry in results["runs"] if entry["recipe"] == "published"]
    lines = [] if not found else ["| one model | seeds | iterations | cost | GFLOPs | quality |", "|---" * 6 + "|"]
    for recipe, entries in found.items():
        points = [points_of(entry)[0] for entry in entries]
        quality = _shown(_spread([point.quality for point in points]))
        iterations = round(mean(entry["iterations"] for entry in entries))
        cost = mean(entry["training_tflops_per_image"] for entry in entries) / mean(budgets or [math.nan])
        lines.append(f"| {recipe} | {len(entries)} | {iterations} | {cost:.2f} | {points[0].gflops:.4f} | {quality} |")
    return lines


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw the fronts of all recipes: the mean over seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    by_recipe: dict[str, list[list[Point]]] = {}
    for entry in results["runs"]:
        if len(entry["points"]) > 1:
            by_recipe.setdefault(entry["recipe"], []).append(points_of(entry))
    for recipe, fronts in by_recipe.items():
        costs = sorted({point.gflops for points in fronts for point in points})
        qualities = [[best_within(points, cost) or 0.0 for points in fronts] for cost in costs]
        (line,) = axes.step(costs, [mean(values) for values in qualities], where="post", label=recipe)
        low, high = ([choose(values) for values in qualities] for choose in (min, max))
        axes.fill_between(costs, low, high, step="post", alpha=0.15, color=line.get_color())
    axes.set_xlabel("GFLOPs of an image")
    axes.set_ylabel("best mIoU within the budget")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the range; NaN if there is one value."""
    return mean(values), (max(values) - min(values)) / 2 if len(values) > 1 else math.nan


def _shown(value: tuple[float, float]) -> str:
    return f"{value[0]:.1f}" + ("" if math.isnan(value[1]) else f" ± {value[1]:.1f}")
