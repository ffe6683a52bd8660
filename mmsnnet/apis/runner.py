from __future__ import annotations

from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner


def build_runner(config: Config, launcher: str = "none", work_dir: str | None = None) -> Runner:
    """mmengine's runner for a config.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        launcher: ``none``, ``pytorch``, ``slurm`` or ``mpi``.
        work_dir: for logs and checkpoints; by default the config's, or else ``work_dirs/<name of the config>``.
    """
    config.launcher = launcher
    config.work_dir = work_dir or config.get("work_dir") or str(Path("work_dirs") / Path(config.filename).stem)
    return Runner.from_cfg(config)
