from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config import DictAction as MMEngineDictAction
from mmengine.registry import init_default_scope

from mmsnnet.datasets.folders import LOADERS

__all__ = ["DictAction", "load_config"]

# What to install for the toolbox that a config's default_scope names.
TOOLBOXES = {
    "mmseg": (("mmcv", "mmseg"), "pip install 'mmsnnet[mminstall]'"),
    "mmdet": (("mmcv", "mmdet"), "pip install 'mmsnnet[mminstall,det]'"),
}

SUFFIXES = (".py", ".yml", ".yaml", ".json")


class DictAction(MMEngineDictAction):
    """mmengine's ``KEY=VALUE`` options, with a command line's answer to what is none."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if not re.match("[^=]+=", value):
                raise argparse.ArgumentError(self, f"{value!r} is not KEY=VALUE")
        try:
            super().__call__(parser, namespace, values, option_string)
        except AssertionError as error:  # of brackets that do not match
            raise argparse.ArgumentError(self, str(error)) from error


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads a config, applies overrides, and makes ready the toolbox that it is for.

    Args:
        path: of the config file.
        options: dotted keys and their values, as ``--cfg-options`` gives them.

    A ``data_root`` among the options moves every data set that lies in the config's ``data_root``; one in a config file
    moves every data set that lies in that of its bases.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends as no config's does, or ``data_root`` is among the options, and moves no data set.
        ImportError: the toolbox of the config's ``default_scope`` is not installed; the message says what to install.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config {str(path)!r} (working folder {Path.cwd()})")
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is no config: the name of one ends in {', '.join(SUFFIXES)}")
    config = Config.fromfile(path)
    _follow_data_root(config, Path(path))
    if options:
        old_root = config.get("data_root")
        config.merge_from_dict(dict(options))
        if "data_root" in options:
            moved = sum(_move(config.get(loader), old_root, options["data_root"]) for loader in LOADERS)
            if not moved and any(config.get(loader) for loader in LOADERS):
                raise ValueError(
                    f"data_root={options['data_root']!r} moves no data set, for none lies in the config's data_root, "
                    f"{old_root!r}: set train_dataloader.dataset.data_root and the like"
                )
    scope = config.get("default_scope", "mmseg")
    packages, command = TOOLBOXES.get(scope, ((), ""))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{path} is a config for {scope}, and {' and '.join(missing)} is missing: {command}")
    config.default_scope = scope
    init_default_scope(scope)
    return config


def _follow_data_root(config: Config, path: Path) -> None:
    """Moves the data sets of a config's bases to the ``data_root`` that the file itself sets: each base has written its
    own into them before."""
    if path.suffix != ".py" or "data_root" not in _assigned(path):
        return
    for base in Config._get_base_files(str(path)):
        old_root = Config.fromfile(path.parent / base, import_custom_modules=False).get("data_root")
        if old_root is not None:
            for loader in LOADERS:
                _move(config.get(loader), old_root, config.data_root)


def _assigned(path: Path) -> set[str]:
    """The names that a Python file assigns at its top level."""
    statements = ast.parse(path.read_text(encoding="utf-8")).body
    targets = (target for statement in statements if isinstance(statement, ast.Assign) for target in statement.targets)
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _move(setting: Any, old_root: str | None, new_root: str) -> int:
    """Gives every data set below a setting, those inside wrappers included, the new root in place of the old one;
    returns how many there were."""
    if isinstance(setting, Mapping):
        moved = sum(_move(inner, old_root, new_root) for inner in setting.values())
        if old_root is not None and setting.get("data_root") == old_root:
            setting["data_root"] = new_root
            moved += 1
        return moved
    return sum(_move(inner, old_root, new_root) for inner in setting) if isinstance(setting, list | tuple) else 0
