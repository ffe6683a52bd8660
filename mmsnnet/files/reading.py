"""Read checkpoints from disk, URLs and the hub, without running their code."""

from __future__ import annotations

import argparse
import errno
import hashlib
import os
import pickle
import re
import zipfile
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

# File names of weights in the layout of the Hugging Face hub, in the order of the search.
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

# The keys under which training programs put weights in a checkpoint.
WRAPPERS = ("state_dict", "model", "module")
PARAMETERS = (".weight", ".bias", ".gamma", "_token", "pos_embed", "bias_table", "lora_A", "lora_B")  # Ends of names.
MOST_SHARED = 64  # The tensors of a file are at most this many times as large as the memory that they share.
MOST_HEADER = 2**20  # The header of a safetensors file has at most so many bytes, or is a hundredth of the file.
# The most names that a message lists.
MOST_LISTED = 20

# What training programs save beside weights: NumPy's arrays and scalars (under the module names of NumPy 1 and 2) and
# command-line arguments. None of these can run code from the file.
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
    """Read a checkpoint onto the CPU.

    Pickles are read with ``weights_only=True``: they may contain tensors, plain Python data, and the classes in
    ``HARMLESS``.

    Args:
        source: one of

            - a ``.safetensors`` file, or any other file that ``torch.save`` wrote;
            - a folder in the layout of the Hugging Face hub, which has one of ``HUB_FILES``;
            - an ``http(s)://`` URL of a file; the download is kept in the folder of ``torch.hub``;
            - ``hf-hub:owner/name`` for one of ``HUB_FILES`` there, or ``hf-hub:owner/name/file``; both may end in
              ``@revision``.
        safe_globals: more classes and functions that a pickle may name, as ``torch.serialization.safe_globals`` takes
            them.

    Raises:
        MissingFileError: the file does not exist or cannot be downloaded.
        DataError: the file is damaged, is no checkpoint, unfolds to more than its size, names other classes or
            functions, or has weights that are no dense floats; or this kind of storage (``s3://``) is not supported.
        OSError, MemoryError: reading failed; the message names the source.
    """
    source = os.fspath(source)
    if not isinstance(source, str):
        raise TypeError(f"a checkpoint should be a path, a URL or 'hf-hub:owner/name', got {source!r}")
    if source.startswith("hf-hub:"):
        path = _from_hub(source)
    elif re.match(r"https?://", source):
        path = _from_url(source)
    elif re.match(r"[^/]+://", source):
        raise DataError(
            f"checkpoint {source!r}: this kind of storage is not supported; copy the file and give its path, or name "
            "weights on the Hugging Face hub: 'hf-hub:owner/name'"
        )
    else:
        path = _from_disk(source)
    where = f"checkpoint {source!r}" + (
        "" if Path(source).expanduser() == path else f", kept as {path} (delete it to download it again),"
    )
    content = _read(path, where, safe_globals)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        kind = "dict whose keys are not strings" if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{where} should be a dict of weights by name, got a {kind}")
    return content


def extract_weights(file: Mapping[str, Any], where: str, wrappers: Sequence[str] = WRAPPERS) -> dict[str, Any]:
    """Find the weights in a checkpoint, by name.

    Args:
        file: the value of :func:`read_checkpoint`.
        where: the source, for messages.
        wrappers: the keys under which weights may lie; they may be nested.

    Raises:
        DataError: there are no weights, or they have no names.
    """
    weights: Any = file
    for _ in wrappers:
        inner = [weights[name] for name in wrappers if isinstance(weights.get(name), dict)]
        weights = inner[0] if inner else weights
    if "state_dict" in weights:
        kind = type(weights["state_dict"]).__name__
        raise DataError(f"{where} has a {kind} as 'state_dict'; it should be a dict of weights by name")
    if others := [repr(name) for name in weights if not isinstance(name, str)]:
        raise DataError(f"{where} should have weights by name, got keys that are not strings: {join_names(others)}")
    if not any(isinstance(value, Tensor | dict) for value in weights.values()):
        raise DataError(f"{where} has no weights")
    return dict(weights)


def describe_mismatch(saved: Mapping[str, object], expected: Mapping[str, object], *, most: int = MOST_LISTED) -> str:
    """List the differences between two sets of tensor shapes, if any.

    Args:
        saved: the shape of each tensor in a checkpoint, as :func:`tensor_shapes` gives it.
        expected: the shape of each tensor of the model.
        most: the most names in each list.
    """
    lists = {
        "missing": [f"{name} {shape}" for name, shape in expected.items() if name not in saved],
        "left over": [f"{name} {shape}" for name, shape in saved.items() if name not in expected],
        "of another shape": [
            f"{name} {saved[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in saved and saved[name] != shape and type(saved[name]) is type(shape)
        ],
        "of another kind": [
            f"{name} {saved[name]} in place of {shape}"
            for name, shape in expected.items()
            if type(saved.get(name, shape)) is not type(shape)
        ],
    }
    return "; ".join(f"{fault}: {join_names(names, most)}" for fault, names in lists.items() if names)


def tensor_shapes(weights: Mapping[str, Any]) -> dict[str, object]:
    """The shape of each tensor, as text and with its dtype unless it has floats; the type of any other value."""
    return {
        name: type(value).__name__
        if not isinstance(value, Tensor)
        else (tuple(value.shape) if value.is_floating_point() else f"{tuple(value.shape)} {str(value.dtype)[6:]}")
        for name, value in weights.items()
    }


def nonfinite_names(weights: Mapping[str, Any]) -> list[str]:
    """The names of tensors that contain NaN or infinity."""
    floats = {name: one for name, one in weights.items() if isinstance(one, Tensor) and one.is_floating_point()}
    # torch cannot test floats of eight bits themselves.
    return [name for name, one in floats.items() if not (one.float() if one.itemsize == 1 else one).isfinite().all()]


def join_names(names: Sequence[str], most: int = MOST_LISTED) -> str:
    """Join names with commas; show at most ``most`` and count the rest."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _from_disk(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise MissingFileError(f"checkpoint {source!r} does not exist (working folder {Path.cwd()})")
    file = next((path / name for name in HUB_FILES if (path / name).is_file()), None)
    if file is None:
        raise MissingFileError(
            f"checkpoint {source!r} is a folder that has none of {', '.join(HUB_FILES)}: give the path of the file"
        )
    return file


def _from_url(url: str) -> Path:
    name = PurePosixPath(urlparse(url).path).name
    if not name:
        raise DataError(f"checkpoint {url!r} should end in the name of a file")
    # A folder for each URL, because many models have files of one name (model.safetensors).
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path = folder / name
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:  # OSError, and whatever http.client raises
            raise _download_error(url, error) from error
    return path


def _from_hub(source: str) -> Path:
    named, _, revision = source.removeprefix("hf-hub:").partition("@")
    match = re.fullmatch(r"([^/]+/[^/]+)(?:/(.+))?", named)
    if match is None:
        raise DataError(f"checkpoint {source!r} should be 'hf-hub:owner/name', with '/file' or '@revision' if needed")
    names = (match[2],) if match[2] else HUB_FILES
    unreachable: BaseException | None = None
    for name in names:
        try:
            is_local = unreachable is not None
            return Path(hf_hub_download(match[1], name, revision=revision or None, local_files_only=is_local))
        except LocalEntryNotFoundError as error:  # the hub is out of reach, and the cache lacks this file
            unreachable = unreachable or error.__cause__ or error
        except EntryNotFoundError:
            continue
        except HFValidationError as error:
            raise DataError(f"checkpoint {source!r}: {_in_one_line(error)}") from error
        except Exception as error:  # requests fail in many ways: no such repository or revision, no access, ...
            raise _download_error(source, error) from error
    if unreachable is not None:
        raise _download_error(source, unreachable) from unreachable
    raise MissingFileError(
        f"checkpoint {source!r} has none of {', '.join(names)}: add the name of the file, hf-hub:owner/name/file"
    )


def _download_error(source: str, error: BaseException) -> MissingFileError:
    return MissingFileError(
        f"checkpoint {source!r} cannot be downloaded ({type(error).__name__}: {_in_one_line(error)}). Check the name "
        "and the network, or download the file elsewhere and give its path"
    )


def _read(path: Path, where: str, safe_globals: Iterable[SafeGlobal]) -> Any:
    # torch removes the context's globals from its list at the end, so those already on the list must not be in it.
    before = torch.serialization.get_safe_globals()
    allowed = [one for one in (*HARMLESS, *safe_globals) if one not in before]
    try:
        with path.open("rb") as file:
            try:
                _check_container(path, file)
                if path.suffix == ".safetensors":
                    content = safetensors.torch.load_file(path)
                else:
                    with torch.serialization.safe_globals(allowed):
                        content = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file makes the readers raise almost anything, or seek anywhere
                if isinstance(error, MemoryError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
                    raise
                if reason := _reason_for_refusal(file, error):
                    raise DataError(
                        f"{where} is refused: {reason}, which could run code. If you trust the file, re-save its "
                        "weights where you made it: torch.save(model.state_dict(), ...), or safetensors"
                    ) from error
                reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
                raise DataError(f"{where} cannot be read: it is cut short or no checkpoint ({reason})") from error
    except MemoryError as error:
        raise MemoryError(f"{where} cannot be read: {_in_one_line(error)}") from error
    except OSError as error:  # OSError picks the subclass by the number
        raise OSError(error.errno, f"{where} cannot be read: {error.strerror or _in_one_line(error)}") from error
    _check_unfolded(content, where)
    _check_tensors(_remove_attributes(content), where, path.stat().st_size)
    return content


def _check_container(path: Path, file: BinaryIO) -> None:
    """Compare checksums, and refuse a small file that unfolds to a large one. The readers do neither."""
    size, start = path.stat().st_size, file.read(8)
    if path.suffix == ".safetensors":
        if max(MOST_HEADER, size // 100) < (header := int.from_bytes(start, "little")) <= size:
            raise ValueError(f"its header takes {header:,} of its {size:,} bytes")
    elif start[:2] == b"PK":
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            sizes = {record.filename: record.file_size for record in records}
            if any(name.partition("/")[2] == "constants.pkl" for name in sizes):
                return  # torch refuses a TorchScript archive before it reads a record
            odd = any(one.compress_type or one.external_attr & 16 for one in records)  # torch leaves out a "folder"
            if odd or len(sizes) < len(records) or sum(sizes.values()) > size:
                raise ValueError("its records are compressed or overlap, which torch.save never does")
            # torch.serialization.set_crc32_options(False) writes zeros as checksums.
            if any(record.CRC for record in records) and (damaged := archive.testzip()):
                raise ValueError(f"the checksum of its record {damaged} is wrong")


def _check_unfolded(content: Any, where: str) -> None:
    """Refuse containers that hold one another so often that copying or printing them has no end."""
    pending, seen, distinct, entries = [content], set(), 0, 0
    while pending:
        value = pending.pop()
        if not isinstance(value, dict | list | tuple | set):
            continue
        entries += len(value)
        distinct += 0 if id(value) in seen else len(value)
        seen.add(id(value))
        if entries > 2**20 + MOST_SHARED * distinct:
            raise DataError(f"{where} has containers that unfold to more than its size")
        pending += dict.values(value) if isinstance(value, dict) else value


def _check_tensors(tensors: Sequence[tuple[str, Tensor]], where: str, size: int) -> None:
    """Refuse tensors that no model loads, before anything copies them or computes with them."""
    odd = []
    for name, value in tensors:
        layout = "meta" if value.is_meta else "nested" if value.is_nested else value.layout
        if layout != torch.strided or (name.endswith(PARAMETERS) and not value.is_floating_point()):
            kind = f"{layout} {value.dtype}".replace("torch.", "").removeprefix("strided ")
            odd.append(f"{name} {kind} in place of float32")
    if odd:
        raise DataError(f"{where} has weights of another kind: {join_names(odd)}")
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for _, value in tensors}
    if sum(storages.values()) > size:
        raise DataError(f"{where} has tensors that take more memory than the file")
    if sum(value.nbytes for _, value in tensors) > MOST_SHARED * sum(storages.values()):
        largest = max(tensors, key=lambda one: one[1].nbytes)[0]
        raise DataError(f"{where} has larger tensors than memory for them, such as {largest}: save clones of them")


def _remove_attributes(content: Any) -> list[tuple[str, Tensor]]:
    """Remove the attributes of dicts and tensors, which could hide methods; return the tensors with their keys.

    ``_metadata`` stays: torch keeps the versions of modules there.
    """
    seen: set[int] = set()
    pending: list[tuple[Any, Any]] = [("", content)]
    tensors = []
    while pending:
        key, value = pending.pop()
        if isinstance(value, Tensor):
            tensors.append((key if isinstance(key, str) else "", value))
        if id(value) in seen:
            continue
        seen.add(id(value))
        attributes = vars(value) if isinstance(value, dict | Tensor) and hasattr(value, "__dict__") else {}
        for name in set(dict.keys(attributes)) - {"_metadata"}:
            del attributes[name]
        pending += dict.items(attributes)
        if isinstance(value, dict):
            pending += dict.items(value)
        elif isinstance(value, list | tuple):
            pending += ((key, one) for one in value if isinstance(one, dict | list | tuple | Tensor))
    return tensors


def _reason_for_refusal(file: BinaryIO, error: Exception) -> str | None:
    """Say what a file contains beside weights; None if it is damaged.

    torch's own message advises to unpickle the file all the same, so the user does not see it.
    """
    message = str(error)
    if "TorchScript" in message:
        return "it is a TorchScript archive, a program with its weights"
    file.seek(0)
    start = file.read(2)
    file.seek(max(file.seek(0, os.SEEK_END) - 256, 0))
    end = file.read()
    if not isinstance(error, pickle.UnpicklingError) or not (start == b"PK" or start[:1] == pickle.PROTO):
        return None
    if asked := re.search(r"GLOBAL (\S+)", message):
        name = asked[1].rpartition(".")[2]
        # A complete pickle goes on after a name. A name at its end is cut short, and torch drops the last byte.
        cut = not name or name.encode() in end[-len(name) - 1 :]
        return None if cut else f"its pickle asks for {asked[1]}"
    reason = message.split("\n\nCheck the documentation")[0].splitlines()[-1]
    return f"its pickle contains more than torch.save writes for weights ({reason})"


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
