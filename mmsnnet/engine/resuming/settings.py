from __future__ import annotations

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from mmengine.config import Config

from mmsnnet.engine.resuming.difference import Difference, replaced

# Sections of a merged config that training reads and that leave no state.
SECTIONS = ("model", "train_dataloader", "optim_wrapper")
# Keys in those sections that are compared by state or recorded as facts, or do not change training.
LEFT_OUT = (
    *("optimizer", "paramwise_cfg", "constructor", "accumulative_counts", "clip_grad", "batch_size", "sampler"),
    *("num_classes", "img_size", "seed", "init_cfg", "pretrained", "test_cfg", "budget", "stitch"),
    *("flops_step", "draw_from"),
    *("num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "with_cp", "compile"),
    *("data_root", "metainfo", "backend_args"),
)
# The most characters of a value in a message.
LONGEST = 60


def describe_settings(config: Config) -> dict[str, Any]:
    """Settings as plain values that do not depend on the config's style."""
    settings = {section: _plain(config.get(section)) for section in SECTIONS}
    settings["train_cfg.distill"] = _plain((config.get("train_cfg") or {}).get("distill"))
    for hook in config.get("custom_hooks") or ():
        if isinstance(hook, Mapping) and _type_name(hook["type"]) == "NarrowDrawsHook":
            settings["custom_hooks.NarrowDrawsHook"] = _plain(hook)
    # The state shows the type: with mixed precision it has a loss scaler.
    settings["optim_wrapper"] = {
        key: value for key, value in (settings["optim_wrapper"] or {}).items() if key != "type"
    }
    return settings


def compare_settings(config: Config, recorded: Mapping[str, Any]) -> Iterator[Difference]:
    """Compare recorded settings with a config; the run uses the config's."""
    for section, configured in describe_settings(config).items():
        if section in recorded:
            yield from _compare(section, recorded[section], configured)


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
    """The name of a class, a function or an object's class."""
    name = str(value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)).rpartition(".")[2]
    return "StitchedViT" if name == "StitchedBackbone" else name  # one class under two names


def _compare(path: str, recorded: Any, configured: Any) -> Iterator[Difference]:
    if _have_one_type(recorded, configured):
        for key in dict.fromkeys((*recorded, *configured)):
            yield from _compare(f"{path}.{key}", recorded.get(key), configured.get(key))
    elif (
        isinstance(recorded, list)
        and isinstance(configured, list)
        and len(recorded) == len(configured)
        and all(map(_have_one_type, recorded, configured))
    ):
        for index, pair in enumerate(zip(recorded, configured, strict=True)):
            yield from _compare(f"{path}.{index}", *pair)
    elif recorded != configured:
        yield replaced(path, _shown(recorded), _shown(configured))


def _have_one_type(recorded: Any, configured: Any) -> bool:
    """Whether two settings are dicts of one ``type``, whose keys compare."""
    are_dicts = isinstance(recorded, Mapping) and isinstance(configured, Mapping)
    return are_dicts and recorded.get("type") == configured.get("type")


def _shown(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(inner, Mapping) for inner in value):
        value = ", ".join(str(inner.get("type", "dict")) for inner in value)
    elif isinstance(value, Mapping):
        value = value.get("type", value)
    text = repr(value) if isinstance(value, list | dict) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
