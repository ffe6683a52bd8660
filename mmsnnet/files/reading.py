"""Checkpoints: what a file, a folder, a URL or the Hugging Face hub holds, read without running what is in it."""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlparse

import numpy as np
import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from mmsnnet.errors import DataError, MissingFileError

SafeGlobal = Callable[..., Any] | tuple[Callable[..., Any], str]

# The names that weights have in the Hugging Face hub's layout, in the order in which they are looked for.
HUB_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)

# Where training programs put weights in a checkpoint.
WRAPPERS = ("state_dict", "model", "module")
# How many names a list has at most.
MOST_LISTED = 20

# What training programs keep beside weights: arrays and scalars of NumPy, whose functions have other names since
# NumPy 2, and command-line arguments. Making any of them runs no code of the file's.
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]
_SCALAR: Any = np.float64(0).__reduce__()[0]
HARMLESS: tuple[SafeGlobal, ...] = (
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.ndarray,
    np.dtype,
    *sorted({type(np.dtype(code)) for code in "?bBhHiIlLqQefdgFDG"}, key=str),
    slice,
    argparse.Namespace,
)


def read_checkpoint(source: str | os.PathLike[str], safe_globals: Iterable[SafeGlobal] = ()) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU. Pickles are read with ``weights_only=True``: tensors, plain Python data, and
    the classes of ``HARMLESS``.

    Args:
        source: a ``.safetensors`` file; any other file as ``torch.save`` wrote it; a folder in the layout of the
            Hugging Face hub (one of ``HUB_FILES``); an ``http(s)://`` URL of a file, which is kept in ``torch.hub``'s
            folder; ``hf-hub:owner/name``, one of ``HUB_FILES`` there, or ``hf-hub:owner/name/file``, either with
            ``@revision`` at its end.
        safe_globals: more classes and functions that a pickle may ask for, as ``torch.serialization.safe_globals``
            takes them.

    Raises:
        MissingFileError: there is no such file, or it cannot be fetched.
        DataError: the file is cut short, is no checkpoint, or asks for other classes or functions; or the source is of
            another kind, ``s3://`` say.
        OSError, MemoryError: as reading raises them, with the source named.
    """
    source = os.fspath(source)
    if not isinstance(source, str):
        raise TypeError(f"a checkpoint is named by a path, a URL or 'hf-hub:owner/name', got {source!r}")
    if source.startswith("hf-hub:"):
        path = _from_hub(source)
    elif re.match(r"https?://", source):
        path = _from_url(source)
    elif re.match(r"[^/]+://", source):
        raise DataError(
            f"checkpoint {source!r}: this kind of storage is not read; copy the file and give its path, or name "
            "weights on the Hugging Face hub: 'hf-hub:owner/name'"
        )
    else:
        path = _from_disk(source)
    where = f"checkpoint {source!r}" + (
        "" if Path(source).expanduser() == path else f", kept as {path} (delete it to fetch it anew),"
    )
    content = _read(path, where, safe_globals)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "a dict whose keys are no names" if isinstance(content, dict) else f"one {type(content).__name__}"
        raise DataError(f"{where} holds no weights by name, but {kind}")
    return content


def unwrapped(file: Mapping[str, Any], where: str, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Any]:
    """The weights in a checkpoint, out of what they are wrapped in.

    Args:
        file: what :func:`read_checkpoint` returned.
        where: the source, as a message names it.
        wrappers: the names under which weights may lie, one within the other too.

    Raises:
        DataError: there are none, or not by name.
    """
    weights: Any = file
    for _ in wrappers:
        inner = [weights[name] for name in wrappers if isinstance(weights.get(name), dict)]
        weights = inner[0] if inner else weights
    if "state_dict" in weights:
        raise DataError(f"{where} has one {type(weights['state_dict']).__name__} as 'state_dict', no weights by name")
    if others := [repr(name) for name in weights if not isinstance(name, str)]:
        raise DataError(f"{where} has weights under what is no name: {listed(others)}")
    if not any(isinstance(value, Tensor | dict) for value in weights.values()):
        raise DataError(f"{where} holds no weights")
    return dict(weights)


def misfits(given: Mapping[str, object], wanted: Mapping[str, object], *, most: int = MOST_LISTED) -> str:
    """What keeps weights from fitting, in words; nothing where they fit.

    Args:
        given: the shape of each tensor that there is, by name.
        wanted: the shape of each that there should be.
        most: the number of names that each list has at most.
    """
    lists = {
        "missing": [f"{name} {shape}" for name, shape in wanted.items() if name not in given],
        "left over": [f"{name} {shape}" for name, shape in given.items() if name not in wanted],
        "of another shape": [
            f"{name} {given[name]} instead of {shape}"
            for name, shape in wanted.items()
            if name in given and given[name] != shape
        ],
    }
    return "; ".join(f"{what}: {listed(names, most)}" for what, names in lists.items() if names)


def shapes(weights: Mapping[str, Any]) -> dict[str, object]:
    """The shape of each tensor, and what else there is instead of one."""
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        for name, value in weights.items()
    }


def not_finite(weights: Mapping[str, Any]) -> list[str]:
    """The names of tensors that have NaN or infinity in them."""

    def finite(tensor: Tensor) -> bool:
        # Floats of eight bits cannot be tested themselves.
        return bool(torch.isfinite(tensor.float() if tensor.itemsize == 1 else tensor).all())

    floats = {name: one for name, one in weights.items() if isinstance(one, Tensor) and one.is_floating_point()}
    return [name for name, tensor in floats.items() if not finite(tensor)]


def listed(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Join names with commas; show at most ``most`` and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _from_disk(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"checkpoint {source!r}: there is no such file (working folder {Path.cwd()})")
    found = [path / name for name in HUB_FILES if (path / name).is_file()]
    if not found:
        raise MissingFileError(
            f"checkpoint {source!r} is a folder without weights: looked for {', '.join(HUB_FILES)}; give the path of "
            "the file itself"
        )
    return found[0]


def _from_url(url: str) -> Path:
    name = PurePosixPath(urlparse(url).path).name
    if not name:
        raise DataError(f"checkpoint {url!r} is a URL without the name of a file")
    # A folder for each URL: files of many models are named alike (model.safetensors).
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:  # besides OSError, http.client raises errors of its own
            raise _not_fetched(url, error) from error
    return path


def _from_hub(source: str) -> Path:
    named, _, revision = source.removeprefix("hf-hub:").partition("@")
    match = re.fullmatch(r"([^/]+/[^/]+)(?:/(.+))?", named)
    if match is None:
        raise DataError(f"checkpoint {source!r} should be 'hf-hub:owner/name', with '/file' or '@revision' if needed")
    names = (match[2],) if match[2] else HUB_FILES
    for name in names:
        try:
            return Path(hf_hub_download(match[1], name, revision=revision or None))
        except LocalEntryNotFoundError as error:  # the hub is out of reach, and this name was not fetched before
            unreachable = error.__cause__ or error
            break
        except EntryNotFoundError:
            continue
        except HFValidationError as error:
            raise DataError(f"checkpoint {source!r}: {_in_one_line(error)}") from error
        except Exception as error:  # requests fail in many ways: no such repository or revision, no access, ...
            raise _not_fetched(source, error) from error
    else:
        raise MissingFileError(f"checkpoint {source!r}: looked there for {', '.join(names)}; name the file behind it")
    for name in names:
        try:
            return Path(hf_hub_download(match[1], name, revision=revision or None, local_files_only=True))
        except LocalEntryNotFoundError:
            continue
    raise _not_fetched(source, unreachable) from unreachable


def _not_fetched(source: str, error: BaseException) -> MissingFileError:
    return MissingFileError(
        f"checkpoint {source!r} cannot be fetched ({type(error).__name__}: {_in_one_line(error)}). Check the name and "
        "the network, or fetch the file elsewhere and give its path"
    )


def _read(path: Path, where: str, safe_globals: Iterable[SafeGlobal]) -> Any:
    # Leaving the context takes its globals off the list again: those that were on it before must not be in it.
    before = torch.serialization.get_safe_globals()
    allowed = [one for one in (*HARMLESS, *safe_globals) if one not in before]
    try:
        with path.open("rb") as file:
            try:
                if path.suffix == ".safetensors":
                    return safetensors.torch.load_file(path)
                with torch.serialization.safe_globals(allowed):
                    content = torch.load(path, map_location="cpu", weights_only=True)
            except (MemoryError, OSError):
                raise
            except Exception as error:  # a damaged file makes the readers raise almost anything
                if refused := _refused(file, error):
                    raise DataError(
                        f"{where} is refused: {refused}, which could run code. If you trust the file, re-save its "
                        "weights where you made it: torch.save(model.state_dict(), ...), or safetensors"
                    ) from error
                reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
                raise DataError(f"{where} cannot be read: it is cut short or no checkpoint ({reason})") from error
    except MemoryError as error:
        raise MemoryError(f"{where} cannot be read: {_in_one_line(error)}") from error
    except OSError as error:  # made anew with its number, it is of the same class
        raise OSError(error.errno, f"{where} cannot be read: {error.strerror or _in_one_line(error)}") from error
    _take_attributes(content)
    return content


def _take_attributes(content: Any) -> None:
    """Takes from all dicts and tensors what a pickle gave them as attributes, which may stand before their methods. The
    versions of modules, which torch keeps so, stay."""
    seen: set[int] = set()
    rest = [content]
    while rest:
        value = rest.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        attributes = vars(value) if isinstance(value, dict | Tensor) and hasattr(value, "__dict__") else {}
        for name in set(dict.keys(attributes)) - {"_metadata"}:
            del attributes[name]
        rest += dict.values(attributes)
        if isinstance(value, dict):
            rest += dict.values(value)
        elif isinstance(value, list | tuple):
            rest += value


def _refused(file: BinaryIO, error: Exception) -> str | None:
    """What a whole file holds beside weights, or None where it is a damaged one. torch's own message, which advises to
    unpickle it all the same, is not shown."""
    message = str(error)
    if "TorchScript" in message:
        return "it is a TorchScript archive, a program with its weights"
    start = file.read(2)
    file.seek(max(file.seek(0, os.SEEK_END) - 256, 0))
    end = file.read()
    if not isinstance(error, pickle.UnpicklingError) or not (start == b"PK" or start[:1] == pickle.PROTO):
        return None
    if asked := re.search(r"GLOBAL (\S+)", message):
        name = asked[1].rpartition(".")[2]
        # A whole pickle goes on behind a name; where it does not, the name is cut short, and torch drops its last byte.
        cut = not name or name.encode() in end[-len(name) - 1 :]
        return None if cut else f"its pickle asks for {asked[1]}"
    reason = message.split("\n\nCheck the documentation")[0].splitlines()[-1]
    return f"its pickle holds other things than torch.save writes for weights ({reason})"


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
