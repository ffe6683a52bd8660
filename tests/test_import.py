"""What importing the package pulls in, what it needs, and which of its parts may import which."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "mmsnnet"
TOOLBOXES = {"mmengine", "mmcv", "mmseg", "mmdet"}

# Each part may import those named here; the root and the registry import no part, but for what the root registers.
ORDER = (
    *("files", "stitching", "evaluation", "datasets", "models", "engine", "visualization", "deployment", "apis"),
    *("converters", "cli", "demo", "serving"),
)
MAY_IMPORT = {part: {*ORDER[:place], "registry"} for place, part in enumerate(ORDER)}
MAY_IMPORT["files"] = set()
MAY_IMPORT["stitching"] = {"files"}
MAY_IMPORT["visualization"] -= {"models", "engine", "registry"}

# Makes packages look as if they were not installed: neither importable nor to be found.
WITHOUT = """
import importlib.util, json, sys

class Missing:
    packages = {packages!r}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.packages:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return None

find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.partition(".")[0] in Missing.packages else find(name, package)
)
sys.meta_path.insert(0, Missing())
"""
# What OpenMMLab brings, and all that mmsnnet itself depends on beside torch, torchvision, timm, numpy and safetensors.
DEPENDENCIES = ("cv2", "rich", "matplotlib", "plotly", "fvcore", "iopath", "scipy", "terminaltables", "gradio")
MISSING = (*sorted(TOOLBOXES), *DEPENDENCIES)


def python(code: str) -> Any:
    """Runs code in a process of its own; returns the last line that it prints, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_importing_a_part_imports_no_more() -> None:
    imported = "print(json.dumps([name for name in ('torch', 'timm', 'mmengine') if name in sys.modules]))"
    assert python(f"import json, sys, mmsnnet; {imported}") == []
    assert python(f"import json, sys, mmsnnet.stitching; {imported}") == ["torch", "timm"]


@pytest.mark.slow
def test_registries_find_our_modules_by_their_scope() -> None:
    """Without an import of ours."""
    heavy, names = python("""
import json, sys
from mmengine.registry import HOOKS, LOOPS, MODEL_WRAPPERS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
wanted = [(MODELS, "StitchedViT"), (HOOKS, "StitchInitHook"), (HOOKS, "StitchLogHook"), (LOOPS, "StitchTestLoop"),
          (LOOPS, "StitchValLoop"), (LOOPS, "StitchIterBasedTrainLoop"), (HOOKS, "ConsistencyHook"),
          (MODEL_WRAPPERS, "StitchedDataParallel"), (OPTIM_WRAPPER_CONSTRUCTORS, "StitchOptimWrapperConstructor")]
names = {name: [registry.get(f"mmsnnet.{name}").__module__, name in registry.module_dict] for registry, name in wanted}
unwanted = ("mmseg", "mmdet", "mmcv.ops", "matplotlib", "plotly", "gradio", "fvcore")
print(json.dumps([[name for name in unwanted if name in sys.modules], names]))
""")
    assert heavy == []
    constructor = "mmsnnet.engine.optimizers.stitch_optim_wrapper_constructor"
    assert names == {
        "StitchedViT": ["mmsnnet.models.backbones.stitched_backbone", False],
        "StitchInitHook": ["mmsnnet.engine.hooks.stitch_init_hook", False],
        "StitchLogHook": ["mmsnnet.engine.hooks.stitch_log_hook", False],
        "ConsistencyHook": ["mmsnnet.engine.hooks.consistency_hook", False],
        "StitchIterBasedTrainLoop": ["mmsnnet.engine.runner.train_loops", False],
        "StitchedDataParallel": ["mmsnnet.models.wrappers.stitched_data_parallel", False],
        "StitchOptimWrapperConstructor": [constructor, False],
        "StitchTestLoop": ["mmsnnet.engine.runner.stitch_loops", False],
        "StitchValLoop": ["mmsnnet.engine.runner.stitch_loops", False],
    }


@pytest.mark.slow
def test_nothing_of_mmengine_is_replaced_but_by_safe_loading() -> None:
    """Each loader and file backend is the object that it was before the import."""
    code = f"""
import json
from importlib import import_module
from mmengine.fileio import FileClient
from mmengine.fileio.backends import backends, prefix_to_backends
from mmengine.runner import CheckpointLoader

def tables():
    return dict(
        loaders=dict(CheckpointLoader._schemes), backends=dict(backends), prefixes=dict(prefix_to_backends),
        clients=dict(FileClient._backends), client_prefixes=dict(FileClient._prefix_to_backends),
    )

before, changed = tables(), dict()
for part in {["", *(f".{part}" for part in ORDER), ".safe_loading"]}:
    import_module("mmsnnet" + part)
    for name, now in tables().items():
        if [key for key in now.keys() | before[name].keys() if now.get(key) is not before[name].get(key)]:
            changed.setdefault(part, []).append(name)
print(json.dumps(changed))
"""
    assert python(code) == {".safe_loading": ["loaders"]}


@pytest.mark.slow
def test_our_configs_make_any_tool_load_safely() -> None:
    code = """
import json
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
Config.fromfile("configs/quickstart/vit-s_setr_shapes-64x64.py")
print(json.dumps(CheckpointLoader._get_checkpoint_loader("a.pth").__module__))
"""
    assert python(code) == "mmsnnet.safe_loading"


@pytest.mark.slow
def test_stitching_works_without_openmmlab() -> None:
    code = """
import mmsnnet.stitching as stitching
import torch

anchors = [stitching.create_anchor("deit3_small_patch16_224", 32, embed_dim=width, depth=depth, num_heads=2)
           for width, depth in ((32, 2), (48, 4))]
network = stitching.StitchedNetwork(anchors, stitching.StitchSpace.two_way((2, 4)), rank=2).eval()
with torch.no_grad():
    maps = [network(torch.zeros(1, 3, 32, 32), stitch, (3,))[0] for stitch in network.space]
print(json.dumps([mmsnnet_version, len(maps), sorted({tuple(m.shape) for m in maps}), sorted(
    name for name in sys.modules if name.partition(".")[0] in Missing.packages)]))
""".replace("mmsnnet_version", "__import__('mmsnnet').__version__")
    version, stitches, shapes, imported = python(WITHOUT.format(packages=MISSING) + code)
    # S, L, SL: 1, LS: 1 and no group left to change back.
    assert (stitches, shapes, imported) == (4, [[1, 48, 2, 2]], [])
    assert version


def test_all_else_says_what_to_install_without_openmmlab() -> None:
    code = """
import importlib
import mmsnnet

said = {}
for name in ("models", "engine", "registry", "apis"):
    for how, fetch in (("attribute", lambda: getattr(mmsnnet, name)),
                       ("import", lambda: importlib.import_module(f"mmsnnet.{name}"))):
        try:
            fetch()
            said[f"{name}, {how}"] = "nothing"
        except Exception as error:
            said[f"{name}, {how}"] = f"{'ImportError' if isinstance(error, ImportError) else type(error)}: {error}"
try:
    mmsnnet.nonsense
except AttributeError as error:
    said["nonsense"] = str(error)
print(json.dumps(said))
"""
    said = python(WITHOUT.format(packages=MISSING) + code)
    assert "nonsense" in said.pop("nonsense") and len(said) == 8
    unhelpful = {
        key: text
        for key, text in said.items()
        if not (text.startswith("ImportError: ") and "pip install 'mmsnnet[mminstall]'" in text)
    }
    assert unhelpful == {}


def imports(path: Path, *, at_import: bool = False) -> set[str]:
    """The modules that a file imports, relative ones made absolute; names imported from a package count as modules.

    With ``at_import`` only what is imported when the file itself is: nothing inside a function.
    """
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    found: set[str] = set()
    nodes = [ast.parse(path.read_text())] if at_import else list(ast.walk(ast.parse(path.read_text())))
    while nodes:
        node = nodes.pop()
        if at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def files(part: str) -> list[Path]:
    found = sorted((PACKAGE / part).rglob("*.py"))
    assert found, f"mmsnnet/{part} has no files"
    return found


def test_every_part_has_its_place_in_the_order() -> None:
    parts = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert parts == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_those_above_it(part: str) -> None:
    allowed = {part, "version", "errors", *MAY_IMPORT[part]}
    wrong = {
        f"{path.relative_to(REPOSITORY)}: {name}"
        for path in files(part)
        for name in imports(path)
        if name.startswith("mmsnnet.") and name.split(".")[1] not in allowed
    }
    assert wrong == set()


def test_stitching_knows_nothing_of_openmmlab() -> None:
    wrong = {
        f"{path.name}: {name}"
        for path in files("stitching")
        for name in imports(path)
        if name.partition(".")[0] in TOOLBOXES
    }
    assert wrong == set()


def test_stitching_is_imported_with_torch_and_timm_alone() -> None:
    needed = {
        name.partition(".")[0]
        for path in files("stitching")
        for name in imports(path, at_import=True)
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "mmsnnet"}
    }
    assert {"torch", "timm"} <= needed <= {"torch", "torchvision", "timm", "numpy", "safetensors", "huggingface_hub"}


def test_the_imports_of_a_file_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPOSITORY", tmp_path)
    path = tmp_path / "mmsnnet" / "stitching" / "one.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn as nn\nfrom mmsnnet import models\nfrom ..engine import hooks\nfrom . import two\n"
        "def f():\n    import mmcv\n"
    )
    at_import = {"torch.nn", "mmsnnet", "mmsnnet.models", "mmsnnet.engine", "mmsnnet.engine.hooks"}
    at_import |= {"mmsnnet.stitching", "mmsnnet.stitching.two"}
    assert imports(path, at_import=True) == at_import
    assert imports(path) == at_import | {"mmcv"}
