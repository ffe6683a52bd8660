from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmsnnet.cli.console import import_toolbox, with_short_console
from mmsnnet.cli.launching import prepare_launch
from mmsnnet.engine import ProgressHook
from mmsnnet.engine.latest_checkpoint import choose_checkpoint
from mmsnnet.errors import SettingError
from mmsnnet.models import find_stitched_backbone


def build_runner(
    config: Config, launcher: str = "none", work_dir: str | None = None, quiet: bool = False
) -> Runner | FlexibleRunner:
    """mmengine's runner for a config: a ``FlexibleRunner`` where ``runner_type`` names it. One that is to resume
    has found from what (:func:`mmsnnet.engine.latest_checkpoint.choose_checkpoint`), and does without the anchors'
    ``pretrained``.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        work_dir: for logs and checkpoints; by default the config's, or else ``work_dirs/<name of the config>``.
        quiet: show one line of progress on the console in place of the log, which the log file has.

    Raises:
        OSError: the work folder cannot be written to.
    """
    prepare_launch(config, launcher)
    path = Path(config.filename)
    name = path.resolve().parent.name if path.name == "config.py" else path.stem  # of a published model, its folder's
    default = config.get("work_dir") or str(Path("work_dirs") / name)
    config.work_dir = os.path.expanduser(work_dir or default)
    _check_work_folder(config.work_dir)
    import_toolbox(config)
    name = config.get("runner_type", "Runner")
    kind = RUNNERS.get(name) if isinstance(name, str) else name
    if kind is None:
        raise SettingError(f"there is no runner_type {name!r}: leave it out, or set 'FlexibleRunner'")
    runner = with_short_console(kind, quiet).from_cfg(config)
    if quiet:
        runner.register_hook(ProgressHook())
    choose_checkpoint(runner)
    if runner._resume and runner._load_from is not None:
        _leave_out_pretrained(runner.model)
    return runner


def _check_work_folder(folder: str) -> None:
    """Tries the folder that the runner is about to write into."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"the work folder {folder} cannot be written to ({error.strerror}): make it a folder that can be written "
            "to, or give another one by --work-dir",
        ) from error


def _leave_out_pretrained(model: nn.Module | dict[str, Any]) -> None:
    """Keeps anchors from being loaded, where a checkpoint is to bring all weights: their files may be gone by then."""
    if isinstance(model, nn.Module):
        backbone = find_stitched_backbone(model)
        backbone.pretrained = [None] * len(backbone.pretrained)
    else:  # a FlexibleRunner's, which is built when it trains
        for anchor in model["backbone"]["anchors"]:
            anchor["pretrained"] = None
