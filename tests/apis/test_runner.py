from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner

from mmsnnet.apis import build_runner, load_config

REPOSITORY = Path(__file__).parents[2]
# Its anchors have been trained alone before, in work_dirs/.
CONFIG = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("runner_type", ["Runner", "FlexibleRunner"])
def test_a_resumed_run_does_without_the_anchors_files(
    runner_type: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be gone by then; a run that finds nothing to resume from begins with them."""
    monkeypatch.chdir(tmp_path)
    if there:
        torch.save({}, tmp_path / "iter_8.pth")
    config = load_config(CONFIG, {"resume": True, "experiment_name": f"{runner_type}-{there}"})
    if runner_type == "FlexibleRunner":
        config.runner_type = runner_type
    runner = build_runner(config, work_dir=str(tmp_path))
    if isinstance(runner, Runner):
        pretrained = runner.model.backbone.pretrained
    else:
        pretrained = [anchor["pretrained"] for anchor in runner.model["backbone"]["anchors"]]
    assert [source is None for source in pretrained] == [there, there]
