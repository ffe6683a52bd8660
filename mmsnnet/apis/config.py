"""Configs: read, with options of the command line, and prepared for their toolbox."""

from __future__ import annotations

import copy
import os
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsnnet.datasets.folders import LOADERS
from mmsnnet.errors import MissingFileError, MissingPackageError, SettingError

# The packages of the toolbox that default_scope names, and the command that installs them.
TOOLBOXES = {
    "mmseg": (("mmcv", "mmseg"), "pip install 'mmsnnet[mminstall]'"),
    "mmdet": (("mmcv", "mmdet"), "pip install 'mmsnnet[mminstall,det]'"),
}
# The segmentors of mmseg that mmsnnet has under the same names, for images of any size.
SEGMENTORS = ("EncoderDecoder", "CascadeEncoderDecoder", "DepthEstimator")
# The settings with paths to data.
READERS = (*LOADERS, "val_evaluator", "test_evaluator")
SUFFIXES = (".py", ".yml", ".yaml", ".json")

StrPath = str | os.PathLike[str]


def load_config(path: StrPath, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config, apply overrides, and import its toolbox.

    The top-level ``data_root`` is the root of the config's data sets. A config or an option that sets it moves the
    paths of loaders and evaluators that lie in the ``data_root`` of a base.

    ``~`` in paths stands for the home folder. A stitched backbone gets mmsnnet's segmentors in place of mmseg's.

    Args:
        path: of the config file.
        options: dotted keys and their values, as ``--cfg-options`` gives them.

    Raises:
        FileNotFoundError: there is no such file.
        SettingError: the file cannot be read, has another suffix than a config, or sets a ``data_root`` in which no
            data set lies; or an option names a part of something that is neither a dict nor a list of dicts.
        ImportError: the toolbox of the config's ``default_scope`` is not installed; the message tells what to install.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no config {str(path)!r} (working folder {Path.cwd()})")
    if path.suffix not in SUFFIXES:
        raise SettingError(f"{str(path)!r} is no config: the name of a config ends in {', '.join(SUFFIXES)}")
    config, roots = _read(path)
    _move_data(config, roots, str(path))
    if options:
        if "data_root" in options:
            old_root = config.get("data_root")
            config.data_root = options["data_root"]
            _move_data(config, set() if old_root is None else {old_root}, "--cfg-options")
        _merge(config, options)
    _use_our_segmentor(config)
    _expand_home(config)
    scope = config.get("default_scope", "mmseg")
    packages, command = TOOLBOXES.get(scope, ((), ""))
    if missing := [package for package in packages if find_spec(package) is None]:
        raise MissingPackageError(f"{path} needs {scope}, and {' and '.join(missing)} is missing: {command}")
    config.default_scope = scope
    init_default_scope(scope)
    return config


def _merge(config: Config, options: Mapping[str, Any]) -> None:
    """Set options in a config.

    Raises:
        SettingError: an option names a part of something that is neither a dict nor a list of dicts.
    """

    def fails(some: Mapping[str, Any]) -> bool:
        try:
            copy.deepcopy(config).merge_from_dict(copy.deepcopy(dict(some)))
        except (AttributeError, KeyError, TypeError):
            return True
        return False

    if not fails(options):
        return config.merge_from_dict(dict(options))
    wrong = [path for path, value in options.items() if fails({path: value})] or list(options)
    raise SettingError(
        f"--cfg-options: the config has no place for {', '.join(wrong)}: a key leads through dicts, and through lists "
        "of dicts by numbers from 0; set a list of anything else as a whole"
    )


def _read(path: Path) -> tuple[Config, set[StrPath]]:
    """A config, and the ``data_root`` of each of its bases."""
    try:
        roots = _base_roots(path)  # first: it refuses YAML whose tags would run code in mmengine
        return Config.fromfile(path), roots
    except OSError as error:
        raise MissingFileError(f"config {str(path)!r} cannot be read: {error}") from error
    except (ImportError, SettingError):
        raise
    except Exception as error:  # a config is a program, which can raise any error
        entries = traceback.extract_tb(error.__traceback__)
        lines = [entry.lineno for entry in entries if Path(entry.filename).name == path.name]
        place = f", line {lines[-1]}" if lines and not isinstance(error, SyntaxError) else ""
        text = " ".join(str(error).split())
        raise SettingError(f"config {str(path)!r} cannot be read ({type(error).__name__}: {text}{place})") from error


def _base_roots(path: Path) -> set[StrPath]:
    """The ``data_root`` of each base of a config; refuse YAML with code."""
    with TemporaryDirectory() as folder:
        text = Path(folder, path.name)  # with the values of mmengine's variables, such as {{ fileDirname }}
        Config._substitute_predefined_vars(os.path.abspath(path), text)
        Config._substitute_env_variables(text, text)
        Config._pre_substitute_base_vars(text, text)
        try:
            if text.suffix in (".yml", ".yaml"):
                yaml.safe_load(text.read_text("utf-8"))
        except yaml.MarkedYAMLError as error:
            place = f"config {str(path)!r}, line {error.problem_mark.line + 1}"
            raise SettingError(f"{place}: {error.problem}; YAML is read as plain data, which runs no code") from error
        names = Config._get_base_files(str(text))
    roots: set[StrPath] = set()
    for name in names:
        base = Path(Config._get_cfg_path(name, str(path))[0])
        roots |= _base_roots(base) | {Config.fromfile(base, import_custom_modules=False).get("data_root")}
    return roots - {None}


def _move_data(config: Config, old_roots: set[StrPath], source: str) -> None:
    """Move the paths that lie in an old root to the config's ``data_root``.

    Raises:
        SettingError: ``source`` sets a new root, and no data set lies in it.
    """
    root = config.get("data_root")
    if root is None or not PurePath(root).parts:
        return
    # All relative paths lie in the working folder, PurePath(): a root there tells nothing.
    others = {PurePath(old) for old in old_roots} - {PurePath(), PurePath(root)}

    def moved(text: StrPath) -> StrPath:
        for old in sorted(others, key=lambda old: len(old.parts), reverse=True):
            if PurePath(text).is_relative_to(old):
                return os.path.join(root, *PurePath(text).relative_to(old).parts)
        return text

    settings = {name: _map_texts(config[name], moved) for name in READERS if name in config}
    for name in settings if others else ():
        config[name] = settings[name]
    if not _has_key(settings, "data_root") or any(PurePath(text).is_relative_to(root) for text in _texts(settings)):
        return
    if root in old_roots:
        config.pop("data_root")  # set by a base, whose data sets now lie elsewhere
        return
    raise SettingError(
        f"{source}: data_root={os.fspath(root)!r} is not the root of any data set: set data_root of "
        "train_dataloader.dataset and the like, or leave it out"
    )


def _map_texts(setting: Any, change: Callable[[StrPath], StrPath | None]) -> Any:
    """A setting with each text and path in it changed."""
    if isinstance(setting, dict):
        return type(setting)({key: _map_texts(value, change) for key, value in setting.items()})
    if isinstance(setting, list | tuple):
        return type(setting)(_map_texts(value, change) for value in setting)
    return change(setting) if isinstance(setting, str | os.PathLike) else setting


def _texts(setting: Any) -> list[StrPath]:
    """The texts and paths in a setting."""
    texts: list[StrPath] = []
    _map_texts(setting, texts.append)
    return texts


def _has_key(setting: Any, key: str) -> bool:
    inner = setting.values() if isinstance(setting, dict) else setting if isinstance(setting, list | tuple) else ()
    return (isinstance(setting, dict) and key in setting) or any(_has_key(value, key) for value in inner)


def _expand_home(config: Config) -> None:
    """Replace ``~`` in the paths of a config by the home folder."""
    for name in (*READERS, "work_dir", "load_from"):
        if any(os.fspath(text).startswith("~") for text in _texts(config.get(name))):
            config[name] = _map_texts(config[name], os.path.expanduser)


def _use_our_segmentor(config: Config) -> None:
    """Set mmsnnet's segmentor around a stitched backbone: it equals mmseg's, and takes images of any size."""
    model = config.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("backbone"), dict):
        return
    segmentor, backbone = model.get("type"), model["backbone"].get("type")
    scope, name = str(config.get("default_scope", "mmseg")), str(segmentor).removeprefix("mmseg.")
    if isinstance(segmentor, type):  # in a config of mmengine's new style
        scope, name = segmentor.__module__.partition(".")[0], segmentor.__name__
    stitched = any(name in str(backbone) for name in ("StitchedBackbone", "StitchedViT"))
    if scope == "mmseg" and name in SEGMENTORS and stitched:
        model["type"] = f"mmsnnet.{name}"
