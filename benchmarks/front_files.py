"""The file of results of benchmarks/front.py."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmsnnet.files.writing import write_atomically

NUMBER = (int, float)
ENTRY = dict(recipe=str, seed=int, settings=str, iterations=int, training_tflops_per_image=NUMBER, points=list)
POINT = dict(name=str, kind=str, gflops=NUMBER, quality=NUMBER)
CURE = "repair or delete this file, or name another with --out"


def load(path: Path) -> dict[str, Any]:
    """The results of a regime, or an empty table.

    Raises:
        SystemExit: the file is not readable, or is not a file of results.
    """
    if not path.exists():
        return dict(anchors={}, runs=[])
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: not readable as JSON ({error}): {CURE}") from None
    if fault := _fault(results):
        raise SystemExit(f"{path}: not a file of results, {fault}: {CURE}")
    return results


def store(path: Path, results: Mapping[str, Any]) -> None:
    """Write results atomically, a run a line."""
    runs = ",\n    ".join(json.dumps(run) for run in results["runs"])
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in results.items() if key != "runs"}, indent=2)[:-2]
    write_atomically(path, f'{head},\n  "runs": [\n    {runs}\n  ]\n}}\n'.encode())


def _fault(results: Any) -> str | None:
    """The first fault in the content of a file of results, or None."""
    if fault := _fault_in_fields(results, dict(anchors=dict, runs=list)):
        return fault
    required = dict.fromkeys("sl", NUMBER) if results["runs"] else {}
    if fault := _fault_in_fields(results["anchors"], dict.fromkeys(results["anchors"], NUMBER) | required):
        return f"{fault} in 'anchors'"
    for number, entry in enumerate(results["runs"], 1):
        fault = _fault_in_fields(entry, ENTRY) or _fault_in_points(entry["points"])
        if fault:
            return f"{fault} in run {number}"
    return None


def _fault_in_fields(value: Any, fields: Mapping[str, type | tuple[type, ...]]) -> str | None:
    """The first field that ``value`` lacks, or that has another type; None without a fault."""
    if not isinstance(value, dict):
        return f"{type(value).__name__} instead of an object"
    for name, types in fields.items():
        if not isinstance(value.get(name), types):
            return f"wrong {name!r}" if name in value else f"no {name!r}"
    return None


def _fault_in_points(points: list[Any]) -> str | None:
    """The first fault in the points of a run: one model, or stitches between S and L."""
    for point in points:
        if fault := _fault_in_fields(point, POINT):
            return f"{fault} in 'points'"
        if unknown := set(point) - set(POINT):
            return f"unknown {min(unknown)!r} in 'points'"
    costs = {point["name"]: point["gflops"] for point in points}
    if not points or (len(points) > 1 and not ("S" in costs and "L" in costs and costs["S"] < costs["L"])):
        return "wrong 'points'"
    return None
