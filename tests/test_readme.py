"""What the README shows must be true."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmsnnet.apis import build_space, load_config
from mmsnnet.models import StitchedDataParallel
from mmsnnet.registry import HOOKS, MODEL_WRAPPERS
from mmsnnet.stitching import StitchSpace
from tests.apis.tiny_models import publish_tiny

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def test_the_config_to_copy_builds_at_its_real_size(tmp_path: Path) -> None:
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "EncoderDecoder" in code)
    path = tmp_path / "config.py"
    path.write_text('default_scope = "mmseg"\n' + re.sub(r"_base_ = \[.*?\]\n", "", block, flags=re.S))
    config = load_config(path)
    assert MODEL_WRAPPERS.get(config.model_wrapper_cfg.type) is StitchedDataParallel
    assert all(HOOKS.get(hook.type) is not None for hook in config.custom_hooks)
    assert build_space(config) == StitchSpace.two_way((12, 24))
    with torch.device("meta"):
        from mmseg.registry import MODELS

        model = MODELS.build(config.model)
    assert len(model.auxiliary_head) == 3
    assert model.backbone.out_indices[model.decode_head.in_index] == 23
    assert [model.backbone.out_indices[head.in_index] for head in model.auxiliary_head] == [9, 14, 19]


def test_the_first_tensor_has_the_shape_that_its_comment_states() -> None:
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "create_stitched" in code)
    names: dict[str, Any] = {}
    with torch.device("meta"):  # the shapes alone: the real weights would take 1.3 GB
        exec(block, names)
    assert [tuple(one.shape) for one in names["maps"]] == [(1, 1024, 14, 14)] and "one map (1, 1024, 14, 14)" in block
    assert names["net"].space["L7-S4-L20"].id == 57


def test_the_three_lines_that_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "Predictor(" in code)
    assert len([line for line in block.splitlines() if line]) == 3
    publish_tiny("segmentation", tmp_path).rename(tmp_path / "FOLDER")
    shutil.copy(next((tmp_path / "data/images/validation").iterdir()), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(block, names)
    with Image.open("prediction.png") as picture:
        assert picture.size == (64, 64) and len(picture.getcolors(4096)) > 10
    assert names["predict"].set_budget(max_gflops=0.1).flops <= 0.1e9


def test_files_that_the_pages_name_exist() -> None:
    """Paths from the repository or, as architecture.md shortens them, from the package or ``stitching/``."""
    pages = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("**/*.md")]
    path_in_ticks = re.compile(r"`([a-z][\w.]*/[\w./]+\.py)`")
    named = {(page.name, path) for page in pages for path in path_in_ticks.findall(page.read_text())}
    roots = [REPOSITORY, REPOSITORY / "mmsnnet", REPOSITORY / "mmsnnet/stitching"]
    assert len(named) > 40
    assert {(page, path) for page, path in named if not any((root / path).exists() for root in roots)} == set()


def test_linked_files_exist() -> None:
    for page in REPOSITORY.glob("**/*.md"):
        if ".venv" in page.parts or "work_dirs" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
