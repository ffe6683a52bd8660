"""The file of operating points: data only, no tensors.

An operating point is a stitch with its cost and its measured quality. Tools that measure write a file of them; tools
that choose or draw read it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmsnnet.files.writing import write_atomically

CostName = Literal["flops", "latency_ms"]
MEASURED_COSTS = ("latency_ms", "throughput", "peak_memory")


@dataclass(frozen=True)
class OperatingPoint:
    """A stitch with its cost and its measured quality.

    ``flops`` are multiply-accumulates for one input of the run's input shape, ``params`` the number of weights that
    the stitch uses, ``latency_ms`` the milliseconds for one batch, ``throughput`` images per second, ``peak_memory``
    bytes; the last three are None if they were not measured. A metric without a finite result is NaN.

    If several batch sizes were measured, ``latencies_ms`` has the milliseconds for a batch by its number of images,
    ascending; ``latency_ms`` and ``throughput`` are those of the smallest batch, ``peak_memory`` that of the largest.
    :func:`mmsnnet.evaluation.latencies.batch_latencies` reads files with one size and with several.

    Raises:
        TypeError: a value has a wrong type.
        ValueError: a cost is negative or not finite, a batch has no images, or the name or kind is empty.
    """

    id: int
    name: str
    kind: str
    flops: int
    params: int
    metrics: Mapping[str, float] = field(default_factory=dict, hash=False)
    latency_ms: float | None = None
    throughput: float | None = None
    peak_memory: int | None = None
    latencies_ms: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        values: dict[str, Any] = {key: _whole_number(key, getattr(self, key)) for key in ("id", "flops", "params")}
        for key in ("name", "kind"):
            if not _of_type(key, getattr(self, key), str, "a string"):
                raise ValueError(f"{key}: expected a string that is not empty, found ''")
        for key, unit in (("latency_ms", "a time in ms"), ("throughput", "images per second")):
            if getattr(self, key) is not None:
                values[key] = _finite(key, getattr(self, key), unit)
        if self.peak_memory is not None:
            values["peak_memory"] = _whole_number("peak_memory", self.peak_memory)
        values["latencies_ms"] = {}
        latencies = _of_type("latencies_ms", self.latencies_ms, Mapping, "a mapping of batch sizes to times in ms")
        for size in latencies:
            if _of_type("latencies_ms", size, Integral, "batch sizes, which are positive whole numbers") < 1:
                raise ValueError(f"latencies_ms: expected batch sizes, which are positive whole numbers, found {size}")
        for size in sorted(latencies):
            values["latencies_ms"][int(size)] = _finite(f"latencies_ms: {size}", latencies[size], "a time in ms")
        values["metrics"] = {}
        for name, value in _of_type("metrics", self.metrics, Mapping, "a mapping of names to numbers").items():
            _of_type("metrics", name, str, "names that are strings")
            number = _number(f"metrics: {name}", value)
            # JSON has no infinity: a point should equal the one that its saved file gives back.
            values["metrics"][name] = number if math.isfinite(number) else math.nan
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def __str__(self) -> str:
        return f"{self.id} ({self.name})"

    @property
    def is_anchor(self) -> bool:
        """Whether the stitch is an anchor, whose kind is a single letter."""
        return len(self.kind) == 1

    def cost(self, name: CostName = "flops") -> float:
        """The cost of this name: ``flops`` (multiply-accumulates) or ``latency_ms`` (milliseconds).

        Raises:
            ValueError: no cost has this name, or the point was not measured for it.
        """
        if name not in ("flops", "latency_ms"):
            raise ValueError(f"the cost must be 'flops' or 'latency_ms', got {name!r}")
        value = self.flops if name == "flops" else self.latency_ms
        if value is None:
            raise ValueError(
                f"stitch {self} has no latency_ms: tools/analysis_tools/benchmark.py CONFIG --out FILE.json measures it"
            )
        return value

    def metric(self, name: str) -> float:
        """The measured value of metric ``name``; NaN if the measurement gave no finite number.

        Raises:
            ValueError: the point was not measured for this metric.
        """
        if name not in self.metrics:
            raise ValueError(f"stitch {self} has no metric {name!r}; it has {', '.join(self.metrics) or 'none'}")
        return self.metrics[name]

    def to_json(self) -> dict[str, Any]:
        """The point as the file stores it: NaN as None, without costs that were not measured."""
        entry: dict[str, Any] = {
            "id": self.id,
            "name": self.name,
            "kind": self.kind,
            "flops": self.flops,
            "params": self.params,
            "metrics": {name: None if math.isnan(value) else value for name, value in self.metrics.items()},
        }
        measured = {key: getattr(self, key) for key in MEASURED_COSTS}
        entry |= {key: value for key, value in measured.items() if value is not None}
        if self.latencies_ms:
            entry["latencies_ms"] = {str(size): latency for size, latency in self.latencies_ms.items()}
        return entry

    @classmethod
    def from_json(cls, entry: Any) -> OperatingPoint:
        """The point of an entry that :meth:`to_json` made. Keys outside the schema are ignored.

        Raises:
            TypeError: the entry is no mapping.
            ValueError: a key is missing, or a value is wrong; the message names the stitch.
        """
        if not isinstance(entry, Mapping):
            raise TypeError(f"expected an object, found {_shortened(entry)}")
        keys = ("id", "name", "kind", "flops", "params")
        _require(entry, (*keys, "metrics"))
        metrics = entry["metrics"]
        if isinstance(metrics, Mapping):
            metrics = {name: math.nan if value is None else value for name, value in metrics.items()}
        latencies = entry.get("latencies_ms")
        if latencies is None:
            latencies = {}
        elif isinstance(latencies, Mapping):
            latencies = {_batch_size(size): latency for size, latency in latencies.items()}
        values: dict[str, Any] = {key: entry.get(key) for key in keys + MEASURED_COSTS}
        try:
            return cls(metrics=metrics, latencies_ms=latencies, **values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{error}, in stitch {_shortened(entry['name'])}") from None


@dataclass(frozen=True)
class OperatingPoints:
    """The operating points of one run: one file.

    ``input_shape`` is (height, width). ``config``, ``checkpoint``, ``dataset`` and ``device`` are None if the run had
    none. ``fingerprint`` has digests of all that metrics depend on, by name, so that a resumed run can tell whether it
    measures the same; it is empty if the run measured no metrics. ``benchmark`` has the settings of the measurement of
    latencies, by name. ``depths`` are the anchors' numbers of blocks, smallest anchor first; for each stage, if there
    are several; or None. ``recalibrated`` is the number of training images over which batch norms were recalibrated for
    each stitch; None if metrics are those of the checkpoint's own statistics. Iterating gives the points in the order
    in which they were added.

    Raises:
        TypeError: a value has a wrong type.
        ValueError: the input shape is no height and width, an anchor has no blocks, or two points have one id.
    """

    config: str | None
    checkpoint: str | None
    dataset: str | None
    input_shape: tuple[int, int]
    device: str | None
    points: tuple[OperatingPoint, ...] = ()
    fingerprint: Mapping[str, str] = field(default_factory=dict, hash=False)
    benchmark: Mapping[str, str | int | bool | None] = field(default_factory=dict, hash=False)
    depths: tuple[int | tuple[int, ...], ...] | None = None
    recalibrated: int | None = None

    schema: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for key in ("config", "checkpoint", "dataset", "device"):
            _of_type(key, getattr(self, key), str | None, "a string or nothing")
        _of_type("fingerprint", self.fingerprint, Mapping, "a mapping of names to digests")
        _of_type("benchmark", self.benchmark, Mapping, "a mapping of settings to values")
        sides = _of_type("input_shape", self.input_shape, list | tuple, "[height, width]")
        shape = tuple(_whole_number("input_shape", side) for side in sides)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_shape: expected [height, width], both positive, found {list(shape)}")
        object.__setattr__(self, "input_shape", shape)
        if self.depths is not None:
            depths = _of_type("depths", self.depths, list | tuple, "the anchors' numbers of blocks")
            depths = tuple(tuple(one) if isinstance(one, list | tuple) else one for one in depths)
            numbers = [number for one in depths for number in (one if isinstance(one, tuple) else (one,))]
            if not numbers or () in depths or 0 in [_whole_number("depths", number) for number in numbers]:
                raise ValueError(f"depths: expected the anchors' numbers of blocks, found {list(depths)}")
            object.__setattr__(self, "depths", depths)
        if self.recalibrated is not None:
            object.__setattr__(self, "recalibrated", _whole_number("recalibrated", self.recalibrated))
        object.__setattr__(self, "points", tuple(self.points))
        seen: dict[int, OperatingPoint] = {}
        for point in self.points:
            _of_type("points", point, OperatingPoint, "operating points")
            if point.id in seen:
                names = f"{seen[point.id].name} and {point.name}"
                raise ValueError(f"expected each id once, found id {point.id} twice, for {names}")
            seen[point.id] = point

    def __len__(self) -> int:
        return len(self.points)

    def __iter__(self) -> Iterator[OperatingPoint]:
        return iter(self.points)

    def add(self, point: OperatingPoint) -> OperatingPoints:
        """These points and ``point``, which replaces the one with the same id or else follows at the end."""
        if any(known.id == point.id for known in self.points):
            return replace(self, points=tuple(point if known.id == point.id else known for known in self.points))
        return replace(self, points=(*self.points, point))

    def merged_with(self, stored: OperatingPoints) -> OperatingPoints:
        """These points and their metrics, with the points and latencies of a file of the same model."""
        merged = {point.id: point for point in stored}
        for point in self:
            other = merged.get(point.id, point)
            merged[point.id] = replace(other, metrics=point.metrics or other.metrics)
        ordered = tuple(merged[id_] for id_ in sorted(merged))
        return replace(self, points=ordered, benchmark=stored.benchmark or self.benchmark)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> OperatingPoints:
        """Read and check a file that :meth:`save` wrote. Keys outside the schema are ignored.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not JSON (or cut short), of another schema, or a key is missing or has a wrong value.
        """
        path = Path(path)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file; tools/test.py CONFIG CHECKPOINT --out writes one") from None
        try:
            document = json.loads(text, parse_int=_parse, parse_float=_parse, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: expected operating points in JSON, found no valid JSON: {error}") from None
        try:
            return cls._from_json(document)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file atomically, and create its folders. NaN is written as null."""
        header: dict[str, Any] = {
            "schema": self.schema,
            "config": self.config,
            "checkpoint": self.checkpoint,
            "dataset": self.dataset,
            "input_shape": self.input_shape,
            "device": self.device,
        }
        if self.fingerprint:
            header["fingerprint"] = dict(self.fingerprint)
        if self.benchmark:
            header["benchmark"] = dict(self.benchmark)
        if self.depths:
            header["depths"] = self.depths
        if self.recalibrated is not None:
            header["recalibrated"] = self.recalibrated
        # With one line for each stitch, a diff of two runs shows which stitches changed.
        stitches = ",\n  ".join(json.dumps(point.to_json(), allow_nan=False) for point in self.points)
        text = f'{json.dumps(header, allow_nan=False)[:-1]},\n "stitches": [\n  {stitches}\n]}}\n'
        write_atomically(path, text.encode())

    @classmethod
    def _from_json(cls, document: Any) -> OperatingPoints:
        if not isinstance(document, dict):
            raise TypeError(f"expected a JSON object with schema {cls.schema}, found {_shortened(document)}")
        schema = document.get("schema")
        if isinstance(schema, bool) or schema != cls.schema:
            found = repr(schema) if "schema" in document else f"none among the keys {_shortened(list(document))}"
            raise ValueError(f"schema: expected {cls.schema}, found {found}")
        keys = ("config", "checkpoint", "dataset", "input_shape", "device")
        _require(document, (*keys, "stitches"))
        stitches = document["stitches"]
        _of_type("stitches", stitches, list, "a list")
        points = []
        for index, stitch in enumerate(stitches):
            try:
                points.append(OperatingPoint.from_json(stitch))
            except (TypeError, ValueError) as error:
                raise ValueError(f"stitches[{index}]: {error}") from None
        header = {key: document[key] for key in keys}
        header |= {key: document.get(key) or {} for key in ("fingerprint", "benchmark")}
        header |= {key: document.get(key) for key in ("depths", "recalibrated")}
        return cls(**header, points=tuple(points))


def _require(entry: Mapping[str, Any], keys: Iterable[str]) -> None:
    missing = [key for key in keys if key not in entry]
    if missing:
        raise ValueError(f"expected the keys {', '.join(keys)}, found no {', '.join(missing)}")


def _of_type(key: str, value: Any, types: Any, expected: str) -> Any:
    """The value, if it is of one of some types, which neither a bool is nor a number that no float holds."""
    too_large = isinstance(value, types) and types in (Integral, Real) and 1.7e308 < abs(value) < math.inf
    if isinstance(value, bool) or too_large or not isinstance(value, types):
        raise TypeError(f"{key}: expected {expected}, found {_shortened(value)}")
    if isinstance(value, str):
        value.encode()  # what no file or picture can hold is a ValueError here
    return value


def _whole_number(key: str, value: Any) -> int:
    if _of_type(key, value, Integral, "a whole number") < 0:
        raise ValueError(f"{key}: expected a whole number that is not negative, found {value}")
    return int(value)


def _number(key: str, value: Any) -> float:
    return float(_of_type(key, value, Real, "a number"))


def _finite(key: str, value: Any, unit: str) -> float:
    number = _number(key, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{key}: expected {unit}, finite and not negative, found {number}")
    return number


def _batch_size(key: Any) -> Any:
    """The number that a key in JSON stands for; any other key stays, and the check of batch sizes refuses it."""
    return int(key) if isinstance(key, str) and re.fullmatch("[1-9][0-9]{0,8}", key) else key


def _parse(text: str) -> int | float | str:
    """A number in JSON; if no float holds it, its text, which every check of a number refuses."""
    return text if math.isinf(float(text)) else float(text) if set(text) & set(".eE") else int(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON, null stands for it")


def _shortened(value: Any) -> str:
    text = hex(value) if isinstance(value, int) and value.bit_length() > 10_000 else repr(value)  # 4300 digits at most
    return text if len(text) <= 80 else f"{text[:77]}..."
