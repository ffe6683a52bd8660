"""Metric values of any type are split into numbers and others."""

import json
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mmsnnet.engine.runner.metric_values import split_values, text_for_log, values_for_hooks


class Odd:
    def __repr__(self) -> str:
        raise RuntimeError("cannot be shown")


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.int64(7), 7),
        (np.array(0.5), 0.5),
        (np.array([[2]]), 2),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([4]), 4),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (Fraction(1, 4), 0.25),
    ],
    ids=repr,
)
def test_numbers(value: Any, number: float) -> None:
    numbers, others = split_values(dict(a=value))
    assert numbers == dict(a=number) and type(numbers["a"]) is type(number) and not others


def test_nan_and_infinity_are_numbers() -> None:
    numbers, others = split_values(dict(a=float("nan"), b=np.float64("inf"), c=torch.tensor(float("-inf"))))
    assert [str(value) for value in numbers.values()] == ["nan", "inf", "-inf"] and not others


OTHERS = [
    *(
        None,
        "bar",
        True,
        np.True_,
        torch.tensor(True),
        1j,
        10**400,
        Decimal("0.5"),
        Odd(),
        object,
        [1.0],
        (1,),
        {},
        set(),
    ),
    *(np.eye(2), np.array([]), np.array(["a"]), np.array(1j), np.array(True), torch.eye(2), torch.zeros(0)),
    *(torch.tensor(1j), torch.zeros((), device="meta"), {"a": 1.0}, [[1], [2]], lambda: 1),
]


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_values_that_are_no_numbers(value: Any) -> None:
    numbers, others = split_values(dict(a=value, b=1.0))
    assert numbers == dict(b=1.0) and others["a"] is value
    assert isinstance(text_for_log(value), str)


def test_names_are_strings() -> None:
    assert split_values({1: 2.0, None: "x"}) == ({"1": 2.0}, {"None": "x"})


def test_hooks_get_what_can_be_written() -> None:
    """JSON and the loader of checkpoints accept all values for hooks."""
    endless: list[Any] = []
    endless.append(endless)
    good = dict(text="bar", none=None, flag=True, matrix=np.eye(2), grid=torch.eye(2), nested={"a": [1, (2.5, "b")]})
    bad = dict(odd=Odd(), keys={1: 2}, complex=np.array([1j]), endless=endless, kind=int, ordered=OrderedDict(a=Odd()))
    found = values_for_hooks(good | bad)
    assert list(found) == list(good)
    assert found["matrix"] is good["matrix"] and found["nested"] == good["nested"]
    json.dumps({name: value.tolist() if hasattr(value, "tolist") else value for name, value in found.items()})


def test_texts_for_the_log() -> None:
    assert "(8, 8)" in text_for_log(np.eye(8)) and "1." in text_for_log(np.eye(8))
    assert len(text_for_log("x" * 10**6)) < 20_000
