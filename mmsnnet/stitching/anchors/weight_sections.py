"""Sections of a weights file that may hold a model: nested dicts, and prefixes of names.

Training programs nest a model in different ways, for example ``{'teacher': {'backbone.cls_token': ...}}``. A section is
the set of weights below one address, here ``teacher.backbone.``.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mmsnnet.stitching.anchors.positions import GRID

# The depth to which nested dicts and prefixes are searched. A pickle can nest and share dicts without end, so each dict
# is visited once, and each name is counted for at most this many prefixes.
MOST_DICTS = 3
MOST_PREFIXES = 8
# torch.compile, FSDP and activation checkpointing insert these into the names of modules that they wrap.
INSERTED = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The prefix of an anchor's model in a state dict of StitchedBackbone.
ANCHOR_MODEL = re.compile(r"(?:.*\.)?anchors\.(\d+)\.model\.")


@dataclass(frozen=True, eq=False)
class Section:
    """The weights below one address of a file.

    Attributes:
        dicts: the keys that lead to the dict of the weights.
        prefix: the common prefix of their names.
        weights: the tensors, by their names without the prefix. I-JEPA's files have dicts of tensors here, which timm's
            filter flattens.
        grid: the value that a :class:`PlainAnchor` records as ``grid`` beside its model.
    """

    dicts: tuple[str, ...]
    prefix: str
    weights: dict[str, Any]
    grid: Any = None

    @property
    def address(self) -> str:
        """The path from the root of the file, ``teacher.backbone.``; empty for the root."""
        return "".join(f"{key}." for key in self.dicts) + self.prefix

    def lies_in(self, other: Section) -> bool:
        """Whether this section is a part of ``other``."""
        return self.dicts == other.dicts and self.prefix != other.prefix and self.prefix.startswith(other.prefix)

    def without(self, part: Section) -> Section:
        """A copy of this section without ``part``."""
        below = part.prefix.removeprefix(self.prefix)
        return replace(self, weights={key: value for key, value in self.weights.items() if not key.startswith(below)})


def find_sections(file: Mapping[str, Any], least: int) -> list[Section]:
    """Find the sections of a file that may hold a model, outer ones first.

    Args:
        file: the result of :func:`mmsnnet.files.reading.read_checkpoint`.
        least: the least number of tensors of a section. Sections with an empty prefix are returned at any size.
    """
    sections = []
    for dicts, table in _tables(file):
        weights = _tensors(table)
        by_prefix: dict[str, dict[str, Any]] = {prefix: {} for prefix in _stem_prefixes(weights)}
        for name, value in weights.items():
            for prefix in _prefixes(name):
                if prefix in by_prefix:
                    by_prefix[prefix][name[len(prefix) :]] = value
        for prefix, below in by_prefix.items():
            if prefix == "" or len(below) >= least:
                owner = prefix.removesuffix("model.")
                sections.append(Section(dicts, prefix, below, None if owner == prefix else weights.get(owner + GRID)))
    return sections


def anchors_in(section: Section) -> set[str]:
    """The indices of a stitched network's anchors within a section."""
    return {match[1] for name in section.weights if (match := ANCHOR_MODEL.match(section.prefix + name))}


def tensors_of(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a section by name; the names of a nested dict start with its key."""
    tensors = {}
    for key, value in weights.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        else:
            tensors |= {f"{key}.{name}": tensor for name, tensor in value.items()}
    return tensors


def _tables(file: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield each dict of a file that has weights, outer ones first, with the keys that lead to it."""
    seen = {id(file)}
    rest: deque[tuple[tuple[str, ...], Mapping[str, Any]]] = deque([((), file)])
    while rest:
        dicts, table = rest.popleft()
        if _is_ijepa(table) or any(isinstance(value, Tensor) for value in table.values()):
            yield dicts, table
        for key, value in table.items():
            if len(dicts) < MOST_DICTS and isinstance(key, str) and isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                rest.append(((*dicts, key), value))


def _is_ijepa(table: Mapping[str, Any]) -> bool:
    return isinstance(table.get("encoder"), dict)


def _tensors(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a dict by name, without the insertions of wrapping modules."""
    tensors: dict[str, Any] = {}
    for name, value in table.items():
        if not isinstance(name, str):
            continue
        if isinstance(value, Tensor):
            bare = INSERTED.sub("", name)
            tensors[name if bare in table else bare] = value
        elif isinstance(value, dict) and _is_ijepa(table):
            inner = {key: one for key, one in value.items() if isinstance(one, Tensor)}
            tensors[name] = _tensors(inner)
    return tensors


def _stem_prefixes(weights: Mapping[str, Any]) -> list[str]:
    """The prefixes below which there is a patch embedding, and the empty prefix."""
    prefixes = {"": None}
    for name, value in weights.items():
        if isinstance(value, Tensor) and (value.ndim == 4 or "patch_embed" in name):
            prefixes |= dict.fromkeys(_prefixes(name))
    return list(prefixes)


def _prefixes(name: str) -> list[str]:
    """``['', 'a.', 'a.b.']`` for ``a.b.c``."""
    parts = name.split(".", MOST_PREFIXES)[:-1]
    return ["".join(f"{part}." for part in parts[:count]) for count in range(len(parts) + 1)]
