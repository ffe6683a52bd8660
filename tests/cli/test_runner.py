import errno
import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner

from mmsnnet.apis import load_config
from mmsnnet.cli.runner import build_runner
from mmsnnet.files import writing
from mmsnnet.files.locking import LockedError, locked
from mmsnnet.files.writing import OutputError, check_output

REPOSITORY = Path(__file__).parents[2]
# It reads anchors that were trained alone, in work_dirs/.
CONFIG = REPOSITORY / "configs/quickstart/stitched-vit-s-l_setr_shapes-64x64.py"


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("runner_type", ["Runner", "FlexibleRunner"])
def test_a_resumed_run_does_not_read_the_anchors_files(
    runner_type: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files may be gone. A run without a checkpoint to resume from reads them."""
    monkeypatch.chdir(tmp_path)
    if there:
        torch.save({}, tmp_path / "iter_8.pth")
    config = load_config(CONFIG, {"resume": True, "experiment_name": f"{runner_type}-{there}"})
    if runner_type == "FlexibleRunner":
        config.runner_type = runner_type
    built = build_runner(config, work_dir=str(tmp_path))
    if isinstance(built, Runner):
        pretrained = built.model.backbone.pretrained
    else:
        pretrained = [anchor["pretrained"] for anchor in built.model["backbone"]["anchors"]]
    assert [source is None for source in pretrained] == [there, there]


def test_a_work_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is built."""

    def read_only(**kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").touch()
    for folder, why in ((tmp_path / "file/x", "Not a directory"), (tmp_path, "Read-only file system")):
        with pytest.raises(OutputError, match=rf"{folder} cannot be written \({why}\): .*--work-dir"):
            build_runner(load_config(CONFIG), work_dir=str(folder))
        monkeypatch.setattr(writing.tempfile, "TemporaryFile", read_only)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_one_training_run_in_a_work_folder(tmp_path: Path) -> None:
    """The second is refused before it writes anything. Evaluation in the folder stays possible."""
    (tmp_path / "config.py").write_text("the first run's")
    reading, writer = os.pipe()
    if (process := os.fork()) == 0:
        with locked(tmp_path, inside=True):
            os.write(writer, b".")
            time.sleep(60)
    os.read(reading, 1)
    config = load_config(CONFIG, {"experiment_name": "second"})
    with pytest.raises(LockedError, match=rf"{tmp_path} is in use by process {process} on .*another --work-dir"):
        build_runner(config, work_dir=str(tmp_path), locks=ExitStack())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.py"]
    check_output(tmp_path, is_folder=True)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
