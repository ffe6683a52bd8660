"""What the README shows must be true."""

import re
from pathlib import Path

import torch

from mmsnnet.apis import build_space, load_config
from mmsnnet.models import StitchedDataParallel
from mmsnnet.registry import HOOKS, MODEL_WRAPPERS
from mmsnnet.stitching import StitchSpace

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


def test_linked_files_exist() -> None:
    for page in REPOSITORY.glob("**/*.md"):
        if ".venv" in page.parts or "work_dirs" in page.parts:
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"
