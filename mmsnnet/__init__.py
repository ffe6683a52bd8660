"""Stitched vision transformers (SN-Net, SN-Netv2) for OpenMMLab.

``import mmsnnet`` loads neither torch nor mmengine. mmengine imports a module of ours when a config names it
(``mmsnnet.StitchedViT``), by the ``locations`` of the registries. :mod:`mmsnnet.stitching` works without OpenMMLab.
Every other package then raises an ImportError that names what to install.
"""

from importlib import import_module
from types import ModuleType

from mmsnnet.version import __version__

__all__ = ["__version__"]

PACKAGES = ("apis", "datasets", "engine", "evaluation", "models", "registry", "stitching", "visualization")


def __getattr__(name: str) -> ModuleType:
    if name in PACKAGES:
        return import_module(f"mmsnnet.{name}")
    raise AttributeError(f"module 'mmsnnet' has no attribute {name!r}")
