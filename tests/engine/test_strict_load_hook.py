"""The hook that refuses a checkpoint that does not fit, where a runner alone would load what fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from torch import Tensor

MakeBackbone = Callable[..., Any]
NAME = "network.anchors.0.model.blocks.1.norm1.weight"


def load(model: Any, checkpoint: Path, *hooks: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of a model after a runner has loaded a checkpoint."""
    runner = Runner(
        model,
        str(checkpoint.parent / "work"),
        custom_hooks=list(hooks),
        load_from=str(checkpoint),
        cfg=dict(load_from=str(checkpoint)),
        experiment_name=f"{checkpoint.stem} {len(hooks)}",
        default_scope="mmsnnet",
        log_level="ERROR",
    )
    runner.load_or_resume()
    return runner.model.state_dict()


def test_what_lacks_a_tensor_is_refused_before_any_is_loaded(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    weights = make_backbone().state_dict()
    whole, lacking = tmp_path / "whole.pth", tmp_path / "lacking.pth"
    torch.save({"state_dict": weights}, whole)
    torch.save({"state_dict": {name: tensor for name, tensor in weights.items() if name != NAME}}, lacking)
    strict = dict(type="mmsnnet.StrictLoadHook")

    model = make_backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"lacking\.pth.*missing: {NAME} \(32,\)$"):
        load(model, lacking, strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # Without the hook what is there is loaded, as fine-tuning wants it; with it, what is whole.
    for loaded, left in ((load(model, lacking), {NAME}), (load(make_backbone(), whole, strict), set())):
        assert {name for name, tensor in loaded.items() if not torch.equal(tensor, weights[name])} == left


def test_the_file_is_named_when_a_runner_finds_it_by_itself(make_backbone: MakeBackbone, tmp_path: Path) -> None:
    """resume=True without load_from: the last checkpoint of the work folder."""
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": {}}, tmp_path / "iter_8.pth")
    (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_8.pth"))
    hook = dict(type="mmsnnet.StrictLoadHook")
    settings = dict(experiment_name="found", default_scope="mmsnnet", log_level="ERROR")
    runner = Runner(make_backbone(), str(tmp_path), custom_hooks=[hook], resume=True, cfg=dict(resume=True), **settings)
    with pytest.raises(ValueError, match=r"checkpoint '\S+iter_8\.pth' is not one of the model"):
        runner.load_or_resume()
