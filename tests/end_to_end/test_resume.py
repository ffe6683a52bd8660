"""A run that was killed while it saved a checkpoint goes on, as a user of the tools has it."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

CONFIG = "configs/quickstart/vit-s_setr_shapes-64x64.py"


def test_a_run_whose_newest_checkpoint_is_cut_off_goes_on(tool: Callable, quickstart: Callable, tmp_path: Path) -> None:
    """Where a killed write has left something, too."""
    options = ("--work-dir", tmp_path, *quickstart(3, default_hooks__checkpoint__interval=1))
    done = tool("train", CONFIG, *options)
    assert done.returncode == 0, done.stderr
    last = tmp_path / "iter_3.pth"
    whole = torch.load(last, weights_only=False)
    os.truncate(last, last.stat().st_size // 2)
    (tmp_path / ".0123456789abcdef.tmp").touch()
    done = tool("train", CONFIG, "--resume", *options)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"checkpoint {last} is passed over: it is cut short" in said
    assert f"Load checkpoint from {tmp_path / 'iter_2.pth'}" in said and "Iter(train) [2/3]" not in said
    again = torch.load(last, weights_only=False)
    assert again["meta"]["iter"] == 3 and again["optimizer"].keys() == whole["optimizer"].keys()
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole["state_dict"].items())
    left = sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".pth", ".tmp"))
    assert left == [f"iter_{n}.pth" for n in (1, 2, 3)]
