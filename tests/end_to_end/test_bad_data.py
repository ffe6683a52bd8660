"""A damaged data set, as a user of the tools meets it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.conftest import Tool

CONFIG = "configs/quickstart/vit-s_setr_shapes-64x64.py"


def test_a_label_map_with_a_class_too_many_ends_the_training_and_is_named(
    tool: Tool, quickstart: Callable, data: Path, tmp_path: Path
) -> None:
    """From a worker's process as well, and not as an index out of bounds somewhere in the loss."""
    root = Path(shutil.copytree(data, tmp_path / "data"))
    bad = root / "annotations/training/ADE_train_00000003.png"
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(bad)
    roots = {f"{split}_dataloader__dataset__data_root": root for split in ("train", "val", "test")}
    # All images in one batch.
    options = quickstart(2, train_dataloader__batch_size=8, train_dataloader__num_workers=1, **roots)
    done = tool.attempt("train", CONFIG, "--work-dir", tmp_path / "work_dir", *options)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if str(bad) in line]
    assert said and "1 to 8 for its 8 classes" in said[-1] and "found 9" in said[-1]
    assert not list((tmp_path / "work_dir").glob("*.pth"))
