from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from mmsnnet.engine.resuming.difference import Difference, refused
from mmsnnet.engine.sharding import clean_tensor_name, state_shapes
from mmsnnet.errors import SettingError
from mmsnnet.files.reading import listed, misfits, shapes
from mmsnnet.models.checkpoint import DRAWS, model_weights, unwrapped_model
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID, recorded_grid

Shapes = dict[str, object]

# How many tensors a message names.
FEW = 3


def compare_weights(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Iterator[Difference]:
    """Compare the weights in a checkpoint with a model: all tensors must be there, in the same shapes.

    Loading would resample position embeddings to another ``img_size``, but not the optimizer's state of them. So
    another ``img_size`` is refused.
    """
    weights = model_weights(checkpoint, source)
    given, wanted = _without_records(shapes(weights)), weight_shapes(model)
    explained: set[str] = set()
    by_setting: dict[str, str] = {}
    for name, anchor in _anchors(model).items():
        recorded = recorded_grid(weights.get(f"{name}.{GRID}"))
        if recorded is None or not anchor.positions.grids() or recorded == anchor.positions.grid:
            continue
        explained |= {f"{name}.model.{table}" for table in anchor.positions.grids()}
        by_setting.setdefault(
            f"{_backbone(name)}.img_size",
            f"the checkpoint's position embeddings are for {_times(recorded)} patches, the config's for "
            f"{_times(anchor.positions.grid)}",
        )
    modules = {clean_tensor_name(name): module for name, module in unwrapped_model(model).named_modules()}
    by_owner: dict[str, dict[str, int | None]] = {}
    for name, shape in wanted.items():
        if name in given and name not in explained and given[name] != shape and (owner := _classifier(modules, name)):
            recorded_number = _number_of_classes(given[name], shape, modules[owner].num_classes)
            by_owner.setdefault(owner, {})[name] = recorded_number
    for owner, numbers in by_owner.items():
        number = next(iter(numbers.values()))
        if number is None or set(numbers.values()) != {number}:
            continue  # widths differ, too
        explained |= numbers.keys()
        layer = next(iter(numbers)).rpartition(".")[0]
        by_setting.setdefault(
            f"{_backbone(owner) if '.network.' in owner else f'model.{owner}'}.num_classes",
            f"the checkpoint's {layer} is for {number} classes, the config's for {modules[owner].num_classes}",
        )
    for setting, text in by_setting.items():
        yield refused(f"{setting}: {text}")
    given, wanted = ({n: s for n, s in one.items() if n not in explained} for one in (given, wanted))
    if wrong := misfits(given, wanted, most=FEW):
        yield refused(f"model: the checkpoint's weights are of another model ({wrong})")


def compare_averages(model: nn.Module, averaged: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare the state of ``EMAHook`` in a checkpoint with a model."""
    given = {name.removeprefix("module."): value for name, value in averaged.items() if name.startswith("module.")}
    if wrong := misfits(_without_records(shapes(given)), weight_shapes(model), most=FEW):
        yield refused(f"EMAHook: the checkpoint's averaged weights are of another model ({wrong})")


def summarize_partial_load(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> str | None:
    """Say in one line what ``load_from`` does not load, or return None where all tensors fit.

    Raises:
        SettingError: nothing fits by name and shape.
    """
    weights = model_weights(checkpoint, source)
    given, wanted = _without_records(shapes(weights)), weight_shapes(model)
    for name, anchor in _anchors(model).items():
        if recorded_grid(weights.get(f"{name}.{GRID}")) is not None:  # loading resamples them
            for table in anchor.positions.grids():
                key = f"{name}.model.{table}"
                if key in given and key in wanted:
                    given[key] = wanted[key]
    fitting = [name for name, shape in wanted.items() if given.get(name) == shape]
    if not fitting:
        raise SettingError(
            f"load_from: nothing of checkpoint {source!r} fits the model by name and shape. The file begins with "
            f"{listed(list(given), FEW)}; the model with {listed(list(wanted), FEW)}. Weights of one ViT under other "
            "names belong in pretrained=... of an anchor (model.backbone.anchors); a part of a model with a prefix, in "
            "init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...) of that part"
        )
    wanted_to_load = {
        name: shape for name, shape in wanted.items() if name in given or "num_batches_tracked" not in name
    }
    if wrong := misfits(given, wanted_to_load, most=FEW):
        return f"load_from: {len(fitting)} of {len(wanted)} tensors are loaded from {source}; {wrong}"
    return None


def weight_shapes(model: nn.Module) -> Shapes:
    """The shape of each tensor in a model's state dict, without what only records the state of training.

    Of a sharded model, the shapes of the whole tensors, without communication.
    """
    return _without_records(state_shapes(model))


def _without_records(named: Mapping[str, object]) -> Shapes:
    return {name: shape for name, shape in named.items() if name.rpartition(".")[2] not in (DRAWS, GRID)}


def _anchors(model: nn.Module) -> dict[str, PlainAnchor]:
    """The anchors by their names in the state dict."""
    modules = unwrapped_model(model).named_modules()
    return {clean_tensor_name(name): module for name, module in modules if isinstance(module, PlainAnchor)}


def _backbone(name: str) -> str:
    """The setting of the backbone that a module with this name belongs to."""
    return f"model.{name.split('.network.')[0]}"


def _classifier(modules: Mapping[str, nn.Module], name: str) -> str | None:
    """The innermost module around a tensor that has a number of classes."""
    owner = name
    while owner := owner.rpartition(".")[0]:
        number = getattr(modules.get(owner), "num_classes", None)
        if isinstance(number, int) and number > 0:
            return owner
    return None


def _number_of_classes(given: object, wanted: object, number: int) -> int | None:
    """The number of classes for which a tensor has its shape, if its shape for ``number`` classes is ``wanted``."""
    if not isinstance(given, tuple) or not isinstance(wanted, tuple) or not given or given[1:] != wanted[1:]:
        return None
    if wanted[0] == number + 1 and given[0] > 1:  # softmax with a class for the background
        return given[0] - 1
    each, rest = divmod(wanted[0], number)  # box regression has several outputs for each class
    return given[0] // each if each and not rest and not given[0] % each else None


def _times(grid: tuple[int, int]) -> str:
    return " x ".join(map(str, grid))
