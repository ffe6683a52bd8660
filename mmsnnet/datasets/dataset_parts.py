"""Parts of a built data set: the sets inside wrappers, the transforms of its pipeline, entries spread evenly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def unwrapped_datasets(dataset: Any, setting: str = "dataset") -> Iterator[tuple[str, Any]]:
    """The data sets inside wrappers that repeat or concatenate them, each with the name of its setting.

    Args:
        dataset: with or without wrappers.
        setting: the name of its setting in a config, ``'train_dataloader.dataset'`` say.
    """
    if (inner := getattr(dataset, "dataset", None)) is not None:
        yield from unwrapped_datasets(inner, f"{setting}.dataset")
    elif (members := getattr(dataset, "datasets", None)) is not None:
        for index, member in enumerate(members):
            yield from unwrapped_datasets(member, f"{setting}.datasets.{index}")
    else:
        yield setting, dataset


def transforms_of(dataset: Any) -> Sequence[Any]:
    """The transforms of a data set's pipeline; none for data sets without a pipeline of mmengine's kind."""
    return getattr(getattr(dataset, "pipeline", None), "transforms", ())


def is_instance(value: object, *class_names: str) -> bool:
    """Whether an object's class or a base class has one of these names; the class need not be imported."""
    return any(cls.__name__ in class_names for cls in type(value).__mro__)


def evenly_spaced(length: int, most: int) -> Iterator[int]:
    """Up to ``most`` indices below ``length``, evenly spaced; the first and the last are among them."""
    number = min(length, most)
    return (index * (length - 1) // max(number - 1, 1) for index in range(number))
