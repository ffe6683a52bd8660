"""What holds of the package's files: their length, their classes, their imports, and the words that they may use."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mmsnnet"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if ".mim" not in path.parts)
MOST_LINES, MOST_MEMBERS = 400, 20
# How features lie in memory is known by features.py and by the anchors; these files run routes on any features.
KNOW_NO_GEOMETRY = ("network", "least_squares", "cost", "prefix", "compilation")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports anywhere in it, for type checking too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name in MODULES and name != module_name(path)}


def test_no_file_is_too_long() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES} == {}


def test_no_class_has_too_many_public_members() -> None:
    crowded = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                members = {n.name for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
                if len(members) > MOST_MEMBERS:
                    crowded[f"{path.relative_to(PACKAGE)}: {node.name}"] = len(members)
    assert crowded == {}


def test_no_two_files_import_each_other() -> None:
    """Nor do more of them in a circle. A package's ``__init__`` only lists names, and counts as no file."""
    graph = {
        name: {other for other in imported(path) if MODULES[other].name != "__init__.py"}
        for name, path in MODULES.items()
        if path.name != "__init__.py"
    }
    waiting: dict[str, set[str]] = defaultdict(set, {name: set(others) for name, others in graph.items()})
    while free := [name for name, others in waiting.items() if not others & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert {name: sorted(others & waiting.keys()) for name, others in waiting.items()} == {}


@pytest.mark.parametrize("name", KNOW_NO_GEOMETRY)
def test_what_runs_routes_knows_no_geometry(name: str) -> None:
    text = (PACKAGE / "stitching" / f"{name}.py").read_text(encoding="utf-8")
    words = r"grid|window|position" + ("" if name == "prefix" else r"|prefix(?! reuse)")
    assert re.findall(rf"\w*(?:{words})\w*", text, re.IGNORECASE) == []


def test_the_words_are_found() -> None:
    """The test above would see them: the file that may use them has them all."""
    text = (PACKAGE / "stitching" / "features.py").read_text(encoding="utf-8")
    assert all(word in text for word in ("grid", "window", "prefix"))
