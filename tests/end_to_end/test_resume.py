"""A run that was killed while it saved a checkpoint goes on, as a user of the tools has it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

CONFIG = "configs/quickstart/vit-s_setr_shapes-64x64.py"
HOOK = dict(default_hooks__checkpoint__type="mmsnnet.AtomicCheckpointHook", default_hooks__checkpoint__interval=1)


@pytest.fixture(scope="module")
def work(tool: Callable, quickstart: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a run of three iterations, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("resume") / "work"
    done = tool("train", CONFIG, "--work-dir", folder, *quickstart(3, **HOOK))
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_whose_newest_checkpoint_is_cut_off_goes_on(
    tool: Callable, quickstart: Callable, work: Path, tmp_path: Path
) -> None:
    """In a copy of the work folder, with what a killed write has left there."""
    copy = Path(shutil.copytree(work, tmp_path / "copy"))
    whole = torch.load(copy / "iter_3.pth", weights_only=False)
    os.truncate(copy / "iter_3.pth", (copy / "iter_3.pth").stat().st_size // 2)
    (copy / ".0123456789abcdef.tmp").touch()
    done = tool("train", CONFIG, "--work-dir", copy, "--resume", *quickstart(3, **HOOK))
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert f"checkpoint {copy / 'iter_3.pth'} is passed over: it is cut short" in said
    assert f"Load checkpoint from {copy / 'iter_2.pth'}" in said and "Iter(train) [2/3]" not in said
    again = torch.load(copy / "iter_3.pth", weights_only=False)
    assert again["meta"]["iter"] == 3 and again["optimizer"].keys() == whole["optimizer"].keys()
    assert sorted(path.name for path in copy.iterdir() if path.suffix in (".pth", ".tmp")) == [
        f"iter_{n}.pth" for n in (1, 2, 3)
    ]


def test_a_run_without_a_whole_checkpoint_says_so(
    tool: Callable, quickstart: Callable, work: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(work, tmp_path / "copy"))
    for path in copy.glob("*.pth"):
        os.truncate(path, 100)
    done = tool("train", CONFIG, "--work-dir", copy, "--resume", *quickstart(3, **HOOK))
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert f"none of the checkpoints in {copy} is whole" in said and "leave out --resume" in said
