"""The runner that the tools train and test with."""

from __future__ import annotations

import os
from contextlib import ExitStack
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
from mmsnnet.engine.mmengine_private import load_from, resumes
from mmsnnet.engine.ranks import fail_together
from mmsnnet.errors import SettingError
from mmsnnet.files.locking import locked
from mmsnnet.files.writing import check_output
from mmsnnet.models import find_stitched_backbone


def build_runner(
    config: Config,
    launcher: str = "none",
    work_dir: str | None = None,
    quiet: bool = False,
    locks: ExitStack | None = None,
) -> Runner | FlexibleRunner:
    """Build mmengine's runner for a config: a ``FlexibleRunner`` if ``runner_type`` names it.

    A runner that resumes has chosen its checkpoint (:func:`mmsnnet.engine.latest_checkpoint.choose_checkpoint`), and
    does not read the anchors' ``pretrained`` files.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        launcher: ``none``, ``pytorch`` or ``slurm``.
        work_dir: for logs and checkpoints; default: the config's, or else ``work_dirs/<name of the config>``.
        quiet: show one line of progress on the console instead of the log, which the log file has.
        locks: of a run that trains: gets the lock of the work folder.

    Raises:
        SettingError: there is no such runner, or the launcher has not started this process.
        OutputError: the work folder cannot be written to.
        LockedError: another run trains in the work folder.
    """
    prepare_launch(config, launcher)
    path = Path(config.filename)
    name = path.resolve().parent.name if path.name == "config.py" else path.stem  # a published model: its folder
    config.work_dir = os.path.expanduser(work_dir or config.get("work_dir") or str(Path("work_dirs") / name))
    with fail_together():
        check_output(config.work_dir, "--work-dir", is_folder=True)
        # Not is_main_process: with GPUs, the runner starts the process group.
        if locks is not None and (launcher == "none" or os.environ["RANK"] == "0"):
            locks.enter_context(locked(config.work_dir, 0, "--work-dir", inside=True))
    import_toolbox(config)
    runner_type = config.get("runner_type", "Runner")
    runner_class = RUNNERS.get(runner_type) if isinstance(runner_type, str) else runner_type
    if runner_class is None:
        raise SettingError(f"there is no runner_type {runner_type!r}: leave it out, or set 'FlexibleRunner'")
    runner = with_short_console(runner_class, quiet).from_cfg(config)
    if quiet:
        runner.register_hook(ProgressHook())
    choose_checkpoint(runner)
    if resumes(runner) and load_from(runner) is not None:
        _leave_out_pretrained(runner.model)
    return runner


def _leave_out_pretrained(model: nn.Module | dict[str, Any]) -> None:
    """Set ``pretrained=None`` of all anchors: a checkpoint brings all weights, and the files may be gone."""
    if isinstance(model, nn.Module):
        backbone = find_stitched_backbone(model)
        backbone.pretrained = [None] * len(backbone.pretrained)
    else:  # a FlexibleRunner builds the model when it trains
        for anchor in model["backbone"]["anchors"]:
            anchor["pretrained"] = None
