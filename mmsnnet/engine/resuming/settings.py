from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from mmengine.config import Config

from mmsnnet.engine.resuming.difference import Difference, replaced

# Settings of a merged config that training reads and that leave no state of their own.
SECTIONS = ("model", "train_dataloader", "optim_wrapper")
# Keys in them that are compared elsewhere, by state, or that change nothing that is trained.
LEFT_OUT = (
    *("optimizer", "paramwise_cfg", "constructor", "accumulative_counts", "clip_grad", "batch_size", "sampler"),
    *("num_classes", "img_size", "flops_step", "seed", "init_cfg", "pretrained", "test_cfg", "budget", "stitch"),
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "with_cp", "compile"),
    *("data_root", "metainfo", "backend_args"),
)
# The length of a value in a message.
LONGEST = 60


def describe_settings(config: Config) -> dict[str, Any]:
    """Settings of a config that a checkpoint records, as plain values; how the config is written leaves no trace."""
    described = {section: _plain(config.get(section)) for section in SECTIONS}
    described["optim_wrapper"] = {
        # A type is compared by the state: a loss scaler is there or not.
        key: value
        for key, value in (described["optim_wrapper"] or {}).items()
        if key != "type"
    }
    return described


def compare_settings(config: Config, recorded: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare recorded settings with a config, which the run goes on with."""
    for section, own in describe_settings(config).items():
        if section in recorded:
            yield from _compare(section, recorded[section], own)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _type_name(inner) if key == "type" else _plain(inner)
            for key, inner in value.items()
            if key not in LEFT_OUT and not str(key).startswith("_")
        }
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return float(value) if isinstance(value, Real) else _type_name(value)


def _type_name(value: Any) -> str:
    """The name of a class or function, given as itself or by its path in whatever scope; of an object, its type's."""
    return str(value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)).rpartition(".")[2]


def _compare(path: str, given: Any, own: Any) -> Iterator[Difference]:
    if isinstance(given, Mapping) and isinstance(own, Mapping) and given.get("type") == own.get("type"):
        for key in dict.fromkeys((*given, *own)):
            yield from _compare(f"{path}.{key}", given.get(key), own.get(key))
    elif _are_alike(given, own):
        for index, pair in enumerate(zip(given, own, strict=True)):
            yield from _compare(f"{path}.{index}", *pair)
    elif given != own:
        yield replaced(path, _shown(given), _shown(own))


def _are_alike(given: Any, own: Any) -> bool:
    """Whether two lists have the same modules or transforms, so that each is compared with its counterpart."""
    if not isinstance(given, list) or not isinstance(own, list) or len(given) != len(own):
        return False
    pairs = list(zip(given, own, strict=True))
    return all(isinstance(a, Mapping) and isinstance(b, Mapping) and a.get("type") == b.get("type") for a, b in pairs)


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        value = ", ".join(str(inner.get("type", "dict")) for inner in value)
    elif isinstance(value, Mapping):
        value = value.get("type", value)
    text = repr(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
