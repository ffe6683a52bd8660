"""Stitched vision transformers (SN-Netv2) for OpenMMLab.

Importing the package registers its modules with mmengine, under the scope ``mmsnnet``. Where OpenMMLab's packages are
missing, :mod:`mmsnnet.stitching` works all the same; anything else says what to install.
"""

from importlib.util import find_spec
from typing import Any

from mmsnnet.version import __version__

__all__ = ["__version__"]

if find_spec("mmengine") is not None:
    from mmsnnet import engine, models

    __all__ += ["engine", "models"]
else:

    def __getattr__(name: str) -> Any:
        if name in ("engine", "models", "registry", "apis"):
            from mmsnnet.registry import MODELS  # noqa: F401  raises the error that says what to install
        raise AttributeError(f"module 'mmsnnet' has no attribute {name!r}")
