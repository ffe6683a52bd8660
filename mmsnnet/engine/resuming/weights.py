from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mmsnnet.engine.resuming.difference import Difference, refused
from mmsnnet.engine.sharding import named_modules, state_shapes
from mmsnnet.errors import SettingError
from mmsnnet.files.reading import describe_mismatch, join_names, tensor_shapes
from mmsnnet.models.model_weights import DRAWS, model_weights
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID, recorded_grid

Shapes = dict[str, object]

# The most tensors that a message lists.
FEW = 3


def compare_weights(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Iterator[Difference]:
    """Compare a checkpoint's weights with a model: all names and shapes.

    Another ``img_size`` is refused: loading would resample the position embeddings, but not their optimizer state.
    """
    weights = model_weights(checkpoint, source)
    saved, expected = _without_records(tensor_shapes(weights)), weight_shapes(model)
    modules = named_modules(model)
    explained: set[str] = set()  # tensors whose difference a setting explains
    by_setting: dict[str, str] = {}
    for name, anchor in _anchors(modules).items():
        recorded = recorded_grid(weights.get(f"{name}.{GRID}"))
        if recorded is None or not anchor.positions.grids() or recorded == anchor.positions.grid:
            continue
        explained |= {f"{name}.model.{table}" for table in anchor.positions.grids()}
        by_setting.setdefault(
            f"{_backbone(name)}.img_size",
            f"the checkpoint's position embeddings are for {_times(recorded)} patches, the config's for "
            f"{_times(anchor.positions.grid)}",
        )
    by_owner: dict[tuple[str, int], dict[str, int | None]] = {}
    for name, shape in expected.items():
        if name in saved and name not in explained and saved[name] != shape and (owner := _classifier(modules, name)):
            by_owner.setdefault(owner, {})[name] = _number_of_classes(saved[name], shape, owner[1])
    for (owner_name, configured), numbers in by_owner.items():
        number = next(iter(numbers.values()))
        if number is None or set(numbers.values()) != {number}:
            continue  # the number of classes does not explain all: widths differ too
        explained |= numbers.keys()
        layer = next(iter(numbers)).rpartition(".")[0]
        by_setting.setdefault(
            f"{_backbone(owner_name) if '.network.' in owner_name else f'model.{owner_name}'}.num_classes",
            f"the checkpoint's {layer} is for {number} classes, the config's for {configured}",
        )
    for setting, text in by_setting.items():
        yield refused(f"{setting}: {text}")
    rest, expected_rest = ({n: s for n, s in one.items() if n not in explained} for one in (saved, expected))
    if mismatch := describe_mismatch(rest, expected_rest, most=FEW):
        yield refused(f"model: the checkpoint's weights are of another model ({mismatch})")


def compare_averages(model: nn.Module, averaged: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the state of ``EMAHook`` in a checkpoint with a model."""
    saved = {name.removeprefix("module."): value for name, value in averaged.items() if name.startswith("module.")}
    if mismatch := describe_mismatch(_without_records(tensor_shapes(saved)), weight_shapes(model), most=FEW):
        yield refused(f"EMAHook: the checkpoint's averaged weights are of another model ({mismatch})")


def summarize_partial_load(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> str | None:
    """List the tensors that ``load_from`` does not load, if any.

    Raises:
        SettingError: nothing fits by name and shape, or tensors have numbers of another kind.
    """
    weights = model_weights(checkpoint, source)
    saved, expected = _without_records(tensor_shapes(weights)), weight_shapes(model)
    for name, anchor in _anchors(named_modules(model)).items():
        if recorded_grid(weights.get(f"{name}.{GRID}")) is not None:  # loading resamples its tables
            tables = {f"{name}.model.{table}" for table in anchor.positions.grids()}
            saved |= {table: expected[table] for table in tables & saved.keys() & expected.keys()}
    # Averages of several models have a float as the count of batches.
    compared = {name: shape for name, shape in expected.items() if not name.endswith("num_batches_tracked")}
    if kinds := {name: shape for name, shape in compared.items() if type(saved.get(name, shape)) is not type(shape)}:
        wrong = describe_mismatch({name: saved[name] for name in kinds}, kinds)  # mmengine would convert their numbers
        raise SettingError(f"load_from: checkpoint {source!r} has tensors {wrong}")
    fitting = [name for name, shape in expected.items() if saved.get(name) == shape]
    if not fitting:
        raise SettingError(
            f"load_from: nothing of checkpoint {source!r} fits the model by name and shape. The file begins with "
            f"{join_names(list(saved), FEW)}; the model with {join_names(list(expected), FEW)}. Weights of one ViT "
            "under other names belong in pretrained=... of an anchor (model.backbone.anchors); a part of a model with "
            "a prefix, in init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...) of that part"
        )
    # Checkpoints of older versions of torch have no count of batches.
    required = {name: shape for name, shape in expected.items() if name in saved or "num_batches_tracked" not in name}
    if mismatch := describe_mismatch(saved, required, most=FEW):
        return f"load_from: {len(fitting)} of {len(expected)} tensors are loaded from {source}; {mismatch}"
    return None


def weight_shapes(model: nn.Module) -> Shapes:
    """The whole shape of each tensor in a state dict but records."""
    return _without_records(state_shapes(model))


def _without_records(named: Mapping[str, object]) -> Shapes:
    return {name: shape for name, shape in named.items() if name.rpartition(".")[2] not in (DRAWS, GRID)}


def _anchors(modules: Mapping[str, nn.Module]) -> dict[str, PlainAnchor]:
    return {name: module for name, module in modules.items() if isinstance(module, PlainAnchor)}


def _backbone(name: str) -> str:
    """The setting of the backbone around a module of this name."""
    return f"model.{name.split('.network.')[0]}"


def _classifier(modules: Mapping[str, nn.Module], name: str) -> tuple[str, int] | None:
    """The innermost module around a tensor that has classes, and their number."""
    owner = name
    while owner := owner.rpartition(".")[0]:
        number = getattr(modules.get(owner), "num_classes", None)
        if isinstance(number, int) and number > 0:
            return owner, number
    return None


def _number_of_classes(saved: object, expected: object, number: int) -> int | None:
    """The number of classes that explains a saved shape, if one does."""
    if not isinstance(saved, tuple) or not isinstance(expected, tuple) or not saved or saved[1:] != expected[1:]:
        return None
    if expected[0] == number + 1 and saved[0] > 1:  # a softmax has a class for the background
        return saved[0] - 1
    each, rest = divmod(expected[0], number)  # box regression has several outputs for each class
    return saved[0] // each if each and not rest and not saved[0] % each else None


def _times(grid: tuple[int, int]) -> str:
    return " x ".join(map(str, grid))
