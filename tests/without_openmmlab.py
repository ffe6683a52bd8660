"""A pytest plugin that hides every package that mmsnnet does not need without its extras.

``pytest -p tests.without_openmmlab tests/stitching`` runs as if ``pip install mmsnnet pytest scipy`` had
filled the environment: no OpenMMLab, no OpenCV.
"""

import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from types import ModuleType

from packaging.requirements import Requirement

# The package without extras, and what its tests use.
ROOTS = ("mmsnnet", "pytest", "pytest-xdist", "pytest-cov", "scipy")


def normalise(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def needed_distributions() -> set[str]:
    """The roots and all that they require, directly and indirectly, without extras."""
    needed: set[str] = set()
    unread = [Requirement(root) for root in ROOTS]
    while unread:
        name = normalise(unread.pop().name)
        if name in needed:
            continue
        needed.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue
        requirements = [Requirement(line) for line in lines]
        unread += [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return needed


def hidden_packages() -> set[str]:
    """The names of installed packages that none of the needed distributions brings."""
    needed = needed_distributions()
    installed = packages_distributions().items()
    return {name for name, owners in installed if needed.isdisjoint(map(normalise, owners))} - {"tests"}


class NeededPathFinder(PathFinder):
    """Finds modules on ``sys.path``, except those of hidden packages."""

    hidden = hidden_packages()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = NeededPathFinder
