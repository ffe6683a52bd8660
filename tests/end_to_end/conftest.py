"""The tools, run as a user runs them, and a small procedural set for them to work on."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TRAIN_IMAGES, VAL_IMAGES = 8, 4


class Tool:
    """``tool(name, *arguments, cwd=...)`` runs ``tools/<name>.py`` in a process of its own, on one thread."""

    def __call__(self, name: str, *arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
        with self.start(name, *arguments, cwd=cwd) as process:
            try:
                output, errors = process.communicate(timeout=300)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def start(
        self, name: str, *arguments: object, cwd: Path = REPOSITORY, stdout: int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """The process, running."""
        return subprocess.Popen(
            [sys.executable, REPOSITORY / "tools" / f"{name}.py", *map(str, arguments)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture(scope="session")
def tool() -> Tool:
    return Tool()


@pytest.fixture(scope="session")
def data(tool: Tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of 64 x 64, made as the quickstart's."""
    out = tmp_path_factory.mktemp("shapes") / "data"
    options = ("--layout", "shapes", "--train", TRAIN_IMAGES, "--val", VAL_IMAGES, "--size", 64, 64)
    done = tool("dataset_converters/make_shapes", out, *options)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def quickstart(data: Path) -> Callable[..., list[str]]:
    """``quickstart(iterations, **settings)``: the ``--cfg-options`` that cut a quickstart config down to a run of a few
    iterations on ``data``, with every iteration logged as it is; a double underscore in ``settings`` stands for a dot.
    """

    def options(iterations: int, **settings: object) -> list[str]:
        chosen: dict[str, object] = {
            "train_cfg.max_iters": iterations,
            "train_cfg.val_interval": iterations,
            "train_dataloader.batch_size": 2,
            "default_hooks.checkpoint.interval": iterations,
            "default_hooks.checkpoint.max_keep_ckpts": -1,
            "default_hooks.logger.interval": 1,
            "log_processor.window_size": 1,
        }
        for split in ("train", "val", "test"):
            chosen[f"{split}_dataloader.dataset.data_root"] = data
            chosen[f"{split}_dataloader.num_workers"] = 0
            chosen[f"{split}_dataloader.persistent_workers"] = False
        chosen |= {key.replace("__", "."): value for key, value in settings.items()}
        return ["--cfg-options", *(f"{key}={value}" for key, value in chosen.items())]

    return options
