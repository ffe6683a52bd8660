"""A small procedural set for the tools to work on, and settings that cut a run down to seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mmsnnet.datasets import write_shapes

TRAIN_IMAGES, VAL_IMAGES = 8, 4


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of 64 x 64, made as the quickstart's."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", "shapes", TRAIN_IMAGES, VAL_IMAGES, (64, 64))


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
