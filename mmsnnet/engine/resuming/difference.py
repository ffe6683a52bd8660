from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

from torch import Tensor


class Verdict(Enum):
    """The effect of a difference on the run."""

    REFUSED = "the run cannot go on"
    KEPT = "the run goes on with the checkpoint's value"
    REPLACED = "the run goes on with the config's value"
    NOTED = "the run goes on, and the user should know"


@dataclass(frozen=True)
class Difference:
    """A difference between a checkpoint and the run that resumes from it.

    Args:
        verdict: the effect on the run.
        text: one line that names the setting, both values, and the value that the run uses.
    """

    verdict: Verdict
    text: str


def refused(text: str) -> Difference:
    return Difference(Verdict.REFUSED, text)


def kept(setting: str, recorded: object, configured: object) -> Difference:
    text = f"{setting}: the checkpoint's {recorded} is kept, the config's {configured} is not"
    return Difference(Verdict.KEPT, text)


def replaced(setting: str, recorded: object, configured: object, consequence: str = "") -> Difference:
    text = f"{setting}: goes on with the config's {configured}, the checkpoint's was {recorded}{consequence}"
    return Difference(Verdict.REPLACED, text)


def noted(text: str) -> Difference:
    return Difference(Verdict.NOTED, text)


def is_number(value: Any) -> bool:
    """Whether a record is a number that a float holds, infinity included; a bool and NaN are none."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and float(value) == value
    except OverflowError:
        return False
