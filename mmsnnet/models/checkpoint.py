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
from mmengine.model import is_model_wrapper
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from mmsnnet.stitching.checkpoint import read_checkpoint

# Where the state dict of a StitchedViT has the number of draws so far, which training alone needs.
DRAWS = "draws"
# How many names a list of what does not fit has at most.
MOST_LISTED = 20
# How mmengine's loss history names the methods that compute its statistics.
HISTORY_METHODS = {name: method for name, method in getmembers(HistoryBuffer, isfunction) if name[0] != "_"}


def _history_method(owner: Any, name: Any) -> Any:
    if owner is not HistoryBuffer or name not in HISTORY_METHODS:
        raise pickle.UnpicklingError(f"WeightsUnpickler error: Unsupported global: GLOBAL builtins.getattr of {name!r}")
    return HISTORY_METHODS[name]


# What ``torch.load(weights_only=True)`` has to know to read that history in a checkpoint of a run. Its methods are
# named by getattr, which itself would reach anything.
HISTORY_GLOBALS = (HistoryBuffer, (_history_method, "builtins.getattr"))


def read_model_checkpoint(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what :func:`mmsnnet.stitching.checkpoint.read_checkpoint` reads, checkpoints of mmengine's runner with
    their loss history included. Weights that lie in the file as they are come under ``state_dict``, where hooks of
    mmengine look for them, with an empty ``meta``, which mmseg reads; a config in ``meta`` is left out. Tensors are on
    the CPU.

    Raises:
        FileNotFoundError: there is no such file, or no weights in the folder.
        ValueError: the file cannot be read, or asks for more than weights and records.
    """
    checkpoint = read_checkpoint(source, HISTORY_GLOBALS)
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint, "meta": {}}
    if isinstance(checkpoint.get("meta"), dict):
        # Checkpoints of mmcv's runner have their config here, which mmengine would run as a program when it resumes.
        checkpoint["meta"].pop("config", None)
    return checkpoint


# mmengine's log names a loader by what follows "load_from_".
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A file or a folder. ``map_location`` is for loaders that mmengine calls alike: tensors stay on the CPU, where
    loading them into a model finds them."""
    return read_model_checkpoint(filename)


def load_from_remote(filename: str, map_location: Any = None) -> dict[str, Any]:
    """A URL or ``hf-hub:owner/name``: fetched by the first process, then found by the others where it was put."""
    try:
        if dist.is_main_process():
            return read_model_checkpoint(filename)
    finally:
        dist.barrier()
    return read_model_checkpoint(filename)


def load_from_storage(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Refuses what mmengine's loaders would read without care."""
    raise ValueError(f"checkpoint {filename!r}: mmsnnet reads none from this kind of storage; copy it to a local file")


CheckpointLoader.register_scheme("", load_from_local, force=True)
CheckpointLoader.register_scheme(["http://", "https://", "hf-hub:"], load_from_remote, force=True)
CheckpointLoader.register_scheme(["pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://"], load_from_storage, force=True)


def model_weights(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights in a checkpoint, under the names that mmengine's runner would load them by."""
    weights = checkpoint.get("state_dict", checkpoint)
    return {re.sub(r"^module\.", "", name): value for name, value in weights.items()}


def check_weights(model: nn.Module, checkpoint: Mapping[str, Any], source: str | os.PathLike[str]) -> None:
    """Holds the weights in a checkpoint against a model, by name and shape. The number of draws, which training alone
    needs, may be there or not.

    Raises:
        ValueError: a tensor is missing, is not of the model, or has another shape; the message lists them.
    """
    if is_model_wrapper(model):
        model = model.module
    given = {name: _shape(value) for name, value in model_weights(checkpoint).items() if not _counts_draws(name)}
    wanted = {name: _shape(value) for name, value in model.state_dict().items() if not _counts_draws(name)}
    problems = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in given],
        "not in the model": [f"{name} {shape}" for name, shape in given.items() if name not in wanted],
        "of another shape": [
            f"{name} {given[name]}, in the model {shape}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(f"{what}: {_listed(names)}" for what, names in problems.items() if names)
        raise ValueError(
            f"checkpoint {os.fspath(source)!r} is not one of the model that the config describes. {listing}"
        )


def _counts_draws(name: str) -> bool:
    return name.rpartition(".")[2] == DRAWS


def _shape(value: object) -> object:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(names[:MOST_LISTED]) + more
