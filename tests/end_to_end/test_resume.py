"""A run that was killed while it saved a checkpoint goes on, as a user of the tools has it; another run does not."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import Tool

CONFIG = "configs/quickstart/vit-s_setr_shapes-64x64.py"


@pytest.fixture(scope="module")
def run(tool: Tool, quickstart: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three iterations, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("run") / "work"
    tool("train", CONFIG, "--work-dir", folder, *quickstart(3, default_hooks__checkpoint__interval=1))
    return folder


def test_a_run_whose_newest_checkpoint_is_cut_off_goes_on(
    run: Path, tool: Tool, quickstart: Callable, tmp_path: Path
) -> None:
    """Where a killed write has left something, too."""
    options = ("--work-dir", tmp_path, *quickstart(3, default_hooks__checkpoint__interval=1))
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "iter_3.pth"
    whole = torch.load(last, weights_only=False)
    os.truncate(last, last.stat().st_size // 2)
    (tmp_path / ".iter_3.pth.tmp").touch()
    done = tool("train", CONFIG, "--resume", *options)
    said = done.stdout + done.stderr
    assert f"checkpoint {last} is skipped: it is cut short" in said
    assert f"Load checkpoint from {tmp_path / 'iter_2.pth'}" in said and "Iter(train) [2/3]" not in said
    assert "goes on with" not in said and "is kept" not in said
    again = torch.load(last, weights_only=False)
    assert again["meta"]["iter"] == 3 and again["optimizer"].keys() == whole["optimizer"].keys()
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole["state_dict"].items())
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".pth", ".tmp"))
    assert left == [f"iter_{n}.pth" for n in (1, 2, 3)]


def test_a_run_of_other_classes_ends_in_one_line(run: Path, tool: Tool, quickstart: Callable) -> None:
    classes = dict(model__decode_head__num_classes=150, model__auxiliary_head__num_classes=150)
    said = tool.error("train", CONFIG, "--resume", "--work-dir", run, *quickstart(6, **classes))
    assert "the checkpoint's decode_head.conv_seg is for 8 classes, the config's for 150" in said
    assert f"load_from='{run / 'iter_3.pth'}' without --resume starts a new run" in said
