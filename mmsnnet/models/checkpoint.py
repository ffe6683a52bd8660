"""Checkpoints of whole models: read without running what is in them, and held against the model before they are used.

mmengine reads a checkpoint with ``weights_only=True`` and, where that is refused, reads it again without: whatever code
it holds then runs. Importing this module puts loaders in the place of mmengine's, through its own registry of them, so
that ``load_from``, ``resume`` and ``init_cfg=dict(type='Pretrained')`` read nothing but weights and records, and take
``.safetensors`` files and folders in the Hugging Face hub's layout too.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Mapping
from inspect import getmembers, isfunction
from typing import Any

from mmengine import dist
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmsnnet.errors import DataError
from mmsnnet.files.reading import listed, misfits, not_finite, read_checkpoint, shapes, unwrapped
from mmsnnet.stitching.anchors.plain import PlainAnchor
from mmsnnet.stitching.anchors.positions import GRID

# Where the state dict of a StitchedBackbone has the number of draws so far, which training alone needs.
DRAWS = "draws"
# How mmengine's loss history names the methods that compute its statistics.
HISTORY_METHODS = {name: method for name, method in getmembers(HistoryBuffer, isfunction) if name[0] != "_"}


class _History(HistoryBuffer):
    """What a pickle gets for a HistoryBuffer, and becomes one with its numbers alone: a HistoryBuffer by itself would
    take over methods for all others of the process from it."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__class__ = HistoryBuffer
        HistoryBuffer.__init__(self, state["_log_history"], state["_count_history"], state["max_length"])


def _history_method(owner: Any, name: Any) -> Any:
    if owner is not _History or name not in HISTORY_METHODS:
        raise pickle.UnpicklingError(f"WeightsUnpickler error: Unsupported global: GLOBAL builtins.getattr of {name!r}")
    return HISTORY_METHODS[name]


# What ``torch.load(weights_only=True)`` has to know to read that history in a checkpoint of a run. Its methods are
# named by getattr, which itself would reach anything.
HISTORY_GLOBALS = (
    (_History, f"{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}"),
    (_history_method, "builtins.getattr"),
)


# How far a run is, which a runner that resumes asks the meta of a checkpoint for.
PROGRESS = ("epoch", "iter")


class _OfNoRun(dict[str, Any]):
    """The meta of a checkpoint that no run can go on from, for a runner that asks it how far it is to go on from."""

    def __init__(self, where: str, meta: Mapping[str, Any]) -> None:
        super().__init__({key: value for key, value in meta.items() if key not in PROGRESS})
        self._where = where

    def __missing__(self, key: str) -> Any:
        if key not in PROGRESS:
            raise KeyError(key)
        raise ValueError(
            f"{self._where} has weights alone, nothing of the run that they are of, and no optimizer state: leave out "
            "--resume, or load_from to go on with the latest checkpoint of the work folder"
        )


def read_model_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`mmsnnet.files.reading.read_checkpoint` reads, checkpoints of mmengine's runner with
    their loss history included. Weights that lie in the file as they are come under ``state_dict``, where hooks of
    mmengine look for them, with an empty ``meta``, which mmseg reads; a config in ``meta`` is left out. Weights without
    what a run needs to go on have a ``meta`` that says so where it is asked for ``epoch`` or ``iter``. Tensors are on
    the CPU.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file cannot be read, asks for more than weights and records, or has something else where
            mmengine looks for those.
    """
    where = f"checkpoint {os.fspath(source)!r}"
    checkpoint = read_checkpoint(source, HISTORY_GLOBALS)
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint, "meta": _OfNoRun(where, {})}
    if "state_dict" in checkpoint:
        unwrapped(checkpoint, where, ("state_dict",))
    if "meta" in checkpoint:
        meta = checkpoint["meta"]
        if not isinstance(meta, dict):
            raise ValueError(f"{where} has one {type(meta).__name__} as 'meta', which is a dict")
        # Checkpoints of mmcv's runner have their config here, which mmengine would run as a program when it resumes.
        checkpoint["meta"] = {key: value for key, value in meta.items() if key != "config"}
    meta = checkpoint.get("meta", {})
    if "state_dict" in checkpoint and ("message_hub" not in checkpoint or not set(PROGRESS) <= meta.keys()):
        checkpoint["meta"] = _OfNoRun(where, meta)
    return checkpoint


# mmengine's log names a loader by what follows "load_from_".
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file or a folder; any other kind of storage is refused. ``map_location`` is for loaders that mmengine calls
    alike: tensors stay on the CPU, where loading them into a model finds them."""
    return read_model_checkpoint(filename)


def load_from_remote(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A URL or ``hf-hub:owner/name``: fetched by the first process, then found by the others where it was put."""
    try:
        if dist.is_main_process():
            return read_model_checkpoint(filename)
    finally:
        dist.barrier()
    return read_model_checkpoint(filename)


# All that mmengine has loaders for, most of which read without care.
OTHER_STORAGE = (
    *("pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://"),
    *("torchvision://", "modelzoo://", "open-mmlab://", "openmmlab://", "mmcls://"),
)
CheckpointLoader.register_scheme(["", *OTHER_STORAGE], load_from_local, force=True)
CheckpointLoader.register_scheme(["http://", "https://", "hf-hub:"], load_from_remote, force=True)


def read_weights(model: nn.Module, source: str | os.PathLike[str]) -> dict[str, Any]:
    """All the weights of a model, from wherever :func:`read_model_checkpoint` reads a checkpoint of it.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: it cannot be read, or does not fit the model: see :func:`check_weights`.
    """
    checkpoint = read_model_checkpoint(source)
    check_weights(model, checkpoint, source)
    return model_weights(checkpoint, source)


def model_weights(checkpoint: Mapping[str, Any], source: str | os.PathLike[str]) -> dict[str, Any]:
    """The weights in a checkpoint, under the names that mmengine's runner would load them by.

    Raises:
        ValueError: there are none where it looks for them.
    """
    where = f"checkpoint {os.fspath(source)!r}"
    weights = unwrapped(checkpoint, where, ("state_dict",))
    if nested := [name for name, value in weights.items() if isinstance(value, dict)]:
        raise ValueError(
            f"{where} should have its weights under 'state_dict', where mmengine looks for them, or bare; it has "
            f"{listed(nested)}. Re-save them: torch.save({{'state_dict': ...}}, ...)"
        )
    return {re.sub(r"^module\.", "", name): value for name, value in weights.items()}


def unwrapped_model(model: nn.Module) -> nn.Module:
    """The model itself, whose weights a checkpoint has, inside wrappers for distributed training and for test-time
    augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Holds the weights in a checkpoint against a model, by name and shape. The number of draws, which training alone
    needs, may be there or not; so may the grid of an anchor, with which its positions may be of another image size.

    Raises:
        DataError: a tensor is missing, is not of the model, has another shape, or has NaN or infinity in it; the
            message lists them.
    """
    model = unwrapped_model(model)
    weights, own = model_weights(checkpoint, source), model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, PlainAnchor):
            prefix = f"{name}." if name else ""
            module.positions.take_grid(weights, prefix)
            own.pop(prefix + GRID, None)
    given, wanted = (
        shapes({name: value for name, value in tensors.items() if name.rpartition(".")[2] != DRAWS})
        for tensors in (weights, own)
    )
    if wrong := misfits(given, wanted):
        raise DataError(f"checkpoint {os.fspath(source)!r} is not one of the model that the config describes. {wrong}")
    # A model may keep infinity on purpose, in a mask: there, its own has it too.
    if bad := [name for name in not_finite(weights) if name not in not_finite({name: own.get(name)})]:
        raise DataError(
            f"checkpoint {os.fspath(source)!r} has NaN or infinity in {listed(bad, 5)}. The run that wrote it has "
            "diverged, or the file is damaged: take an earlier checkpoint"
        )
