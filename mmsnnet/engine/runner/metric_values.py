"""Split metric values into numbers and other values."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch

# A value that is nested deeper than this may contain itself.
MOST_LEVELS = 8

SHORTENED = reprlib.Repr()
SHORTENED.maxother = SHORTENED.maxstring = 10_000
SHORTENED.maxdict = SHORTENED.maxlist = SHORTENED.maxtuple = SHORTENED.maxset = 100


def split_values(metrics: Mapping[Any, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Metrics that are numbers, converted to Python's, and all others.

    Numbers are those of Python and numpy, and tensors and arrays of one element; True and False are not.
    """
    numbers, others = {}, {}
    for name, value in metrics.items():
        number = _number(value)
        if number is None:
            others[str(name)] = value
        else:
            numbers[str(name)] = number
    return numbers, others


def values_for_hooks(others: Mapping[str, Any]) -> dict[str, Any]:
    """The values that mmengine's hooks can log, write as JSON and keep in a checkpoint.

    These are strings, arrays of numbers, None, True, False, and lists and dicts of such values. Tensors are copied to
    the CPU.
    """
    return {name: _on_cpu(value) for name, value in others.items() if _is_plain(value)}


def text_for_log(value: Any) -> str:
    """The ``repr`` of a value, shortened if it is very long."""
    if isinstance(value, np.ndarray | torch.Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)}\n{SHORTENED.repr(value)}"
    return SHORTENED.repr(value)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        is_real = value.dtype is not torch.bool and not value.is_complex() and not value.is_meta
        return value.item() if value.numel() == 1 and is_real else None
    if isinstance(value, np.ndarray):
        return value.item() if value.size == 1 and value.dtype.kind in "iuf" else None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number that is too large
        return None
    return int(value) if isinstance(value, Integral) and math.isfinite(number) else number


def _is_plain(value: Any, level: int = 0) -> bool:
    if value is None or isinstance(value, str | bool | int | float):
        return True
    if isinstance(value, torch.Tensor):
        return not (value.is_complex() or value.is_meta or value.is_sparse or value.is_quantized)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufU"
    if level == MOST_LEVELS:
        return False
    if type(value) is dict:
        return all(isinstance(key, str) and _is_plain(item, level + 1) for key, item in value.items())
    return type(value) in (list, tuple) and all(_is_plain(item, level + 1) for item in value)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return type(value)(map(_on_cpu, value)) if isinstance(value, list | tuple) else value
