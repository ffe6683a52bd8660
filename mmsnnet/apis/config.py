from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmsnnet.datasets.folders import LOADERS

__all__ = ["DictAction", "load_config"]

# What to install for the toolbox that a config's default_scope names.
TOOLBOXES = {
    "mmseg": (("mmcv", "mmseg"), "pip install 'mmsnnet[mminstall]'"),
    "mmdet": (("mmcv", "mmdet"), "pip install 'mmsnnet[mminstall,det]'"),
}


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads a config, applies overrides, and makes ready the toolbox that it is for.

    Args:
        path: of the config file.
        options: dotted keys and their values, as ``--cfg-options`` gives them. ``data_root`` moves every data set that
            lies in the config's ``data_root``.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the toolbox of the config's ``default_scope`` is not installed; the message says what to install.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config {str(path)!r} (working folder {Path.cwd()})")
    config = Config.fromfile(path)
    if options:
        old_root = config.get("data_root")
        config.merge_from_dict(dict(options))
        if "data_root" in options and old_root is not None:
            for loader in LOADERS:
                _move(config.get(loader), old_root, options["data_root"])
    scope = config.get("default_scope", "mmseg")
    packages, command = TOOLBOXES.get(scope, ((), ""))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{path} is a config for {scope}, and {' and '.join(missing)} is missing: {command}")
    config.default_scope = scope
    init_default_scope(scope)
    return config


def _move(setting: Any, old_root: str, new_root: str) -> None:
    """Gives every data set below a setting, those inside wrappers included, the new root in place of the old one."""
    if isinstance(setting, Mapping):
        if setting.get("data_root") == old_root:
            setting["data_root"] = new_root
        for inner in setting.values():
            _move(inner, old_root, new_root)
    elif isinstance(setting, list | tuple):
        for inner in setting:
            _move(inner, old_root, new_root)
