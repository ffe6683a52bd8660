"""The figures of policies under load: tables, comparisons with fixed stitches, and a picture."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving_simulation import Outcome

# A run: an outcome with its trace, replicas and policy; ``adaptive`` is false for a fixed stitch.
Run = Mapping[str, Any]

# A policy with this attainment counts as one that meets its deadlines.
ENOUGH = 0.99
POLICY = "look-ahead"


def as_json(outcome: Outcome, **settings: Any) -> dict[str, Any]:
    """A run for the results. What has no value, such as the mean quality without an answer, is None."""
    rounded = {name: None if math.isnan(value) else round(value, 5) for name, value in asdict(outcome).items()}
    return settings | rounded


def best_of_equal_quality(runs: Sequence[Run], policy: Run, higher: bool = True) -> Run | None:
    """The fixed stitch with the highest attainment, of those with at least the policy's mean quality."""
    equal = [run for run in _fixed(runs) if _score(run, higher) >= _score(policy, higher)]
    return max(equal, key=lambda run: (run["attained"], _score(run, higher)), default=None)


def best_of_equal_attainment(runs: Sequence[Run], policy: Run, higher: bool = True) -> Run | None:
    """The best fixed stitch, of those with at least the policy's attainment, or with 99 %."""
    least = min(policy["attained"], ENOUGH)
    equal = [run for run in _fixed(runs) if run["attained"] >= least]
    return max(equal, key=lambda run: (_score(run, higher), run["attained"]), default=None)


def _fixed(runs: Sequence[Run]) -> list[Run]:
    """The runs of fixed stitches that answered anything."""
    return [run for run in runs if not run["adaptive"] and run["quality"] is not None]


def _score(run: Run, higher: bool) -> float:
    """The mean quality, so that more is better."""
    if run["quality"] is None:
        return -math.inf
    return run["quality"] if higher else -run["quality"]


def cases(results: Mapping[str, Any]) -> dict[tuple[str, int], list[Run]]:
    """The runs by trace and number of replicas."""
    by_case: dict[tuple[str, int], list[Run]] = {}
    for run in results["runs"]:
        by_case.setdefault((run["trace"], run["replicas"]), []).append(run)
    return by_case


def report(results: Mapping[str, Any]) -> str:
    """For each trace and number of replicas a table in Markdown, and what look-ahead gains over fixed stitches."""
    lines = []
    for (trace, replicas), runs in cases(results).items():
        lines += [
            f"**{trace}**, {replicas} replica{'s' * (replicas > 1)}: {runs[0]['requests']} requests in "
            f"{results['seconds']:g} s, deadline {results['deadline_ms']:g} ms",
            "",
            f"| policy | attained (%) | mean {results['metric']} | rejected (%) | late (%) | p50 (ms) | p99 (ms) |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in runs:
            shares = {name: _number(run[name], 100) for name in ("attained", "rejected", "late")}
            times = [_number(run[name], digits=1) for name in ("p50", "p99")]
            cells = [shares["attained"], _number(run["quality"]), shares["rejected"], shares["late"], *times]
            lines.append(f"| {run['policy']} | {' | '.join(cells)} |")
        lines += ["", *comparison(runs, results["higher_is_better"]), ""]
    return "\n".join(lines)


def comparison(runs: Sequence[Run], higher: bool = True) -> list[str]:
    """Look-ahead beside the best fixed stitches of equal quality and of equal attainment, in words."""
    policy = next((run for run in runs if run["policy"] == POLICY), None)
    if policy is None:
        return []
    equal_quality = best_of_equal_quality(runs, policy, higher)
    equal_attainment = best_of_equal_attainment(runs, policy, higher)
    return [
        f"{POLICY}: {_summary(policy)}. Best fixed stitch with at least this quality: {_named(equal_quality)}. "
        f"With at least this attainment, or {100 * ENOUGH:.0f} %: {_named(equal_attainment)}."
    ]


def _named(run: Run | None) -> str:
    return "none" if run is None else f"{run['policy']}, {_summary(run)}"


def _summary(run: Run) -> str:
    return f"{_number(run['attained'], 100)} % attained at {_number(run['quality'])}"


def _number(value: float | None, factor: float = 1, digits: int = 2) -> str:
    return "" if value is None else f"{factor * value:.{digits}f}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw attainment against mean quality: a column for each trace, a row for each number of replicas."""
    from matplotlib.figure import Figure

    by_case = cases(results)
    traces = list(dict.fromkeys(trace for trace, _ in by_case))
    replicas = list(dict.fromkeys(number for _, number in by_case))
    figure = Figure(figsize=(3.2 * len(traces) + 0.5, 2.6 * len(replicas) + 0.8), layout="constrained")
    grid = figure.subplots(len(replicas), len(traces), squeeze=False, sharex=True, sharey=True)
    for (trace, number), runs in by_case.items():
        axes = grid[replicas.index(number)][traces.index(trace)]
        axes.set_title(f"{trace}, {number} replica{'s' * (number > 1)}", fontsize="medium")
        answered = [run for run in runs if run["quality"] is not None]
        fixed = [run for run in answered if not run["adaptive"]]
        axes.plot(*_coordinates(fixed), ".-", color="grey", label="fixed stitches")
        for run, marker in zip((run for run in answered if run["adaptive"]), "*sD^v", strict=False):
            axes.plot(*_coordinates([run]), marker, markersize=11 if marker == "*" else 7, label=run["policy"])
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel(f"mean {results['metric']} of the answers")
    for row in grid:
        row[0].set_ylabel("deadlines met (%)")
    figure.legend(
        *grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(traces), fontsize="small"
    )
    figure.savefig(path, dpi=150)


def _coordinates(runs: Sequence[Run]) -> tuple[list[float], list[float]]:
    return [run["quality"] for run in runs], [100 * run["attained"] for run in runs]
