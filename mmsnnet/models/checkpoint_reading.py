"""Read checkpoints of whole models, with the loss history of mmengine's runner."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterable
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any

from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmsnnet.errors import DataError
from mmsnnet.files.reading import SafeGlobal, extract_weights, read_checkpoint

# The file of a published folder with its classes and their colours.
CLASSES = "classes.json"
# The methods whose names a pickled HistoryBuffer holds: those that compute its statistics.
STATISTICS = {name for name, _ in getmembers(HistoryBuffer, isfunction) if not name.startswith("_")}


class PickledHistory:
    """Stand-in that takes the numbers of a pickled ``HistoryBuffer``.

    A real ``HistoryBuffer`` would take methods from the pickle too, and share them with every other one.
    """

    buffer: HistoryBuffer | None = None

    def __init__(self, *arguments: Any) -> None:  # the deferred log of version 0.1.0 pickled a call of the class
        self.buffer = HistoryBuffer(*arguments)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.buffer = HistoryBuffer(state["_log_history"], state["_count_history"], state["max_length"])


def _ignore_statistic(owner: Any, name: Any) -> None:
    """Stand-in for ``getattr`` in a pickle: accept methods of a history."""
    if owner is not PickledHistory or name not in STATISTICS:
        raise pickle.UnpicklingError(f"WeightsUnpickler error: Unsupported global: GLOBAL builtins.getattr of {name!r}")


# What ``torch.load(weights_only=True)`` has to allow for a checkpoint of mmengine's runner, in which the loss history
# is a HistoryBuffer.
HISTORY_GLOBALS = (
    (PickledHistory, f"{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}"),
    (_ignore_statistic, "builtins.getattr"),
)


def read_model_checkpoint(source: str | os.PathLike[str], safe_globals: Iterable[SafeGlobal] = ()) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, in the form that mmengine expects.

    Bare weights come under ``state_dict``, because mmengine's hooks look for them there. The classes of a published
    folder come as ``dataset_meta``, which the toolboxes' inferencers draw with. Beside a ``state_dict`` there
    is always a ``meta``, because mmseg reads it. A config in ``meta`` is left out, because mmengine would run it as a
    program.

    Args:
        source, safe_globals: as of :func:`mmsnnet.files.reading.read_checkpoint`.

    Raises:
        MissingFileError: the file does not exist, or the folder has no weights.
        DataError: the file cannot be read, its pickle asks for more than weights and plain data, or it has something
            else where mmengine looks for those.
    """
    where = f"checkpoint {os.fspath(source)!r}"
    checkpoint = read_checkpoint(source, (*HISTORY_GLOBALS, *safe_globals))
    if checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"state_dict": checkpoint, "meta": _dataset_meta(source)}
    if "state_dict" in checkpoint:
        extract_weights(checkpoint, where, ("state_dict",))
    meta = checkpoint.get("meta", {})
    if not isinstance(meta, dict):
        raise DataError(f"{where} has a {type(meta).__name__} as 'meta'; it should be a dict")
    if "meta" in checkpoint or "state_dict" in checkpoint:
        # mmcv's runner saved its config here.
        checkpoint["meta"] = {key: value for key, value in meta.items() if key != "config"}
    _restore_histories(checkpoint)
    return checkpoint


def _dataset_meta(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The classes and colours beside the weights of a published model."""
    path = Path(source)
    if not (path.is_dir() or path.suffix == ".safetensors"):
        return {}
    known = read_classes(path if path.is_dir() else path.parent)
    return {} if known is None else {"dataset_meta": known}


def read_classes(folder: Path) -> dict[str, Any] | None:
    """The ``classes`` and the ``palette`` (or None) of a published folder; None if it has no file of classes.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / CLASSES
    if not file.is_file():
        return None
    try:
        classes, palette = map(json.loads(file.read_bytes()).get, ("classes", "palette"))
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class is no name")
        if palette is not None and not all(len(color) == 3 for color in palette):
            raise ValueError("a colour has not three values")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is no list of classes ({error}): publish the model again") from None
    return {"classes": classes, "palette": palette}


def _restore_histories(checkpoint: dict[str, Any]) -> None:
    """Replace the stand-ins in the loss history of mmengine's runner."""
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, dict) else None
    if isinstance(scalars, dict):
        scalars.update({name: one.buffer for name, one in scalars.items() if isinstance(one, PickledHistory)})
