from __future__ import annotations

import os
import traceback
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmsnnet.datasets.folders import LOADERS
from mmsnnet.errors import MissingFileError, SettingError

# What to install for the toolbox that a config's default_scope names.
TOOLBOXES = {
    "mmseg": (("mmcv", "mmseg"), "pip install 'mmsnnet[mminstall]'"),
    "mmdet": (("mmcv", "mmdet"), "pip install 'mmsnnet[mminstall,det]'"),
}

# mmseg's segmentors that mmsnnet has for images of any size, under the same names.
SEGMENTORS = ("EncoderDecoder", "CascadeEncoderDecoder", "DepthEstimator")

# The settings in which paths to data are.
READERS = (*LOADERS, "val_evaluator", "test_evaluator")

SUFFIXES = (".py", ".yml", ".yaml", ".json")


def load_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Reads a config, applies overrides, and makes ready the toolbox that it is for.

    Args:
        path: of the config file.
        options: dotted keys and their values, as ``--cfg-options`` gives them.

    ``data_root`` is the root of the config's data sets, wherever it is set: in a base, a child of a child, in JSON or
    YAML, as an option. Paths that lie in the ``data_root`` of a base move to the config's own; paths that a config puts
    elsewhere stay there.

    ``~`` in paths stands for the user's folder.

    mmseg's segmentors become those of mmsnnet, which are right for images that are not whole patches.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its name ends as no config's does, or ``data_root`` is none of the data sets'.
        ImportError: the toolbox of the config's ``default_scope`` is not installed; the message says what to install.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no config {str(path)!r} (working folder {Path.cwd()})")
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f"{str(path)!r} is no config: the name of one ends in {', '.join(SUFFIXES)}")
    config = _parsed(path)
    _move_data(config, str(path), _inherited(Path(path)))
    if options:
        before = _Roots.of(config)
        config.merge_from_dict(dict(options))
        if "data_root" in options:
            _move_data(config, "--cfg-options", before)
    _use_own_segmentor(config)
    _expand_home(config)
    scope = config.get("default_scope", "mmseg")
    packages, command = TOOLBOXES.get(scope, ((), ""))
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(f"{path} is a config for {scope}, and {' and '.join(missing)} is missing: {command}")
    config.default_scope = scope
    init_default_scope(scope)
    return config


def _parsed(path: str | Path) -> Config:
    try:
        return Config.fromfile(path)
    except OSError as error:
        raise MissingFileError(f"config {str(path)!r} cannot be read: {error}") from error
    except ImportError:
        raise
    except Exception as error:  # a config is a program, and may raise anything
        place = (
            "" if isinstance(error, SyntaxError) else f", line {_line_of(error, path)}" * bool(_line_of(error, path))
        )
        text = " ".join(str(error).split())
        raise SettingError(f"config {str(path)!r} cannot be read ({type(error).__name__}: {text}{place})") from error


def _line_of(error: Exception, path: str | Path) -> int | None:
    """The line of a config at which it raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename).name == Path(path).name), None)


@dataclass(frozen=True)
class _Roots:
    """The ``data_root`` of one or several configs, and what their loaders and metrics have as text."""

    roots: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    has_data: bool = False

    @classmethod
    def of(cls, config: Config) -> _Roots:
        root = config.get("data_root")
        texts = frozenset(text for name in READERS for text in _texts(config.get(name)) if text)
        has_data = any(config.get(loader) for loader in LOADERS)
        return cls(frozenset() if root is None else frozenset({os.fspath(root)}), texts, has_data)

    def __or__(self, other: _Roots) -> _Roots:
        return _Roots(self.roots | other.roots, self.texts | other.texts, self.has_data or other.has_data)


def _inherited(path: Path) -> _Roots:
    """The roots and texts of all configs that a config inherits from, as they are after merging."""
    found = _Roots()
    if Config._is_lazy_import(str(path)):  # its bases are modules, whose values it has imported
        return found
    for name in Config._get_base_files(str(path)):
        base = Path(Config._get_cfg_path(name, str(path))[0])
        if base.is_file():  # a name with variables, which mmengine alone fills in, is no file
            found |= _inherited(base) | _Roots.of(Config.fromfile(base, import_custom_modules=False))
    return found


def _move_data(config: Config, source: str, before: _Roots) -> None:
    """Moves paths that a config has from ``before``, and that lie in one of its roots, to the config's ``data_root``.

    Raises:
        SettingError: no data set lies in ``data_root``, though ``source`` sets it.
    """
    if config.get("data_root") is None:
        return
    root = os.fspath(config.data_root)
    moved = {text: new for text in before.texts if (new := _in_new_root(text, before.roots, root)) is not None}
    for name in READERS if moved else ():
        if name in config:
            config[name] = _replaced(config[name], moved)
    found = sorted({data_root for loader in LOADERS for data_root in _data_roots(config.get(loader))})
    if not found and before.has_data and root not in before.roots:
        raise SettingError(
            f"{source}: data_root={root!r} moves no data set, for none has a data_root: set data_root of "
            "train_dataloader.dataset and the like to it"
        )
    if not found or any(_lies_in(text, root) for name in READERS for text in _texts(config.get(name)) if text):
        return
    if root not in before.roots:
        raise SettingError(
            f"{source}: data_root={root!r} is none of the data sets', which lie in {', '.join(map(repr, found))}: set "
            "data_root of train_dataloader.dataset and the like to it, or leave data_root out"
        )
    # A base's root that nothing reads any more would be wrong in the file that the config is written to.
    if len(found) == 1:
        config.data_root = found[0]
    else:
        del config._cfg_dict["data_root"]


def _in_new_root(text: str, old_roots: Collection[str], new_root: str) -> str | None:
    """A path in one of the old roots as a path in the new one; None for any other text."""
    for root in sorted(old_roots, key=len, reverse=True):
        if os.path.normpath(root) != "." and _lies_in(text, root):  # all relative paths lie in the working folder
            rest = os.path.relpath(text, root)
            return new_root if rest == "." else os.path.join(new_root, rest)
    return None


def _lies_in(path: str, folder: str) -> bool:
    path, folder = os.path.normpath(path), os.path.normpath(folder)
    return path == folder or (folder not in (".", "/") and path.startswith(f"{folder}/"))


def _replaced(setting: Any, replacements: Mapping[str, str]) -> Any:
    """A setting with some texts in it replaced, also inside wrappers."""
    if isinstance(setting, Mapping):
        return type(setting)({key: _replaced(value, replacements) for key, value in setting.items()})
    if isinstance(setting, list | tuple):
        return type(setting)(_replaced(value, replacements) for value in setting)
    return replacements.get(os.fspath(setting), setting) if isinstance(setting, str | os.PathLike) else setting


def _texts(setting: Any) -> Iterator[str]:
    if isinstance(setting, str | os.PathLike):
        yield os.fspath(setting)
    inside = setting.values() if isinstance(setting, Mapping) else setting
    for inner in inside if isinstance(setting, Mapping | list | tuple) else ():
        yield from _texts(inner)


def _data_roots(setting: Any) -> Iterator[str]:
    """The roots of all data sets below a setting."""
    if isinstance(setting, Mapping):
        if setting.get("data_root"):
            yield str(setting["data_root"])
        setting = list(setting.values())
    for inner in setting if isinstance(setting, list | tuple) else ():
        yield from _data_roots(inner)


def _expand_home(config: Config) -> None:
    """Replaces ``~`` in the paths of a config by the user's folder, as a shell does."""
    names = [name for name in (*READERS, "work_dir", "load_from") if config.get(name)]
    texts = {text for name in names for text in _texts(config[name]) if text.startswith("~")}
    for name in names if texts else ():
        config[name] = _replaced(config[name], {text: os.path.expanduser(text) for text in texts})


def _use_own_segmentor(config: Config) -> None:
    """Puts our segmentors in the place of mmseg's around a stitched backbone: the same for images of whole patches."""
    model = config.get("model")
    if not isinstance(model, Mapping) or not isinstance(model.get("backbone"), Mapping):
        return
    kind, backbone = model.get("type"), model["backbone"].get("type")
    if isinstance(kind, type):  # as new-style configs have it
        name = kind.__name__ if kind.__module__.startswith("mmseg.") else ""
    else:
        name = str(kind) if config.get("default_scope", "mmseg") == "mmseg" else ""
        name = name.removeprefix("mmseg.")
    if name in SEGMENTORS and any(name in str(backbone) for name in ("StitchedBackbone", "StitchedViT")):
        model["type"] = f"mmsnnet.{name}"
