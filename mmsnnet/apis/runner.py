from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import FlexibleRunner, Runner

from mmsnnet.apis.launch import prepare_launch
from mmsnnet.engine.latest_checkpoint import choose_checkpoint


def build_runner(config: Config, launcher: str = "none", work_dir: str | None = None) -> Runner | FlexibleRunner:
    """mmengine's runner for a config: a ``FlexibleRunner`` where ``runner_type`` names it. One that is to resume
    has found from what: see :func:`mmsnnet.engine.latest_checkpoint.choose_checkpoint`.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        work_dir: for logs and checkpoints; by default the config's, or else ``work_dirs/<name of the config>``.
    """
    prepare_launch(config, launcher)
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work_dirs") / Path(config.filename).stem)
    runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
    choose_checkpoint(runner)
    return runner
