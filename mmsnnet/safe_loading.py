"""Make mmengine load checkpoints without running code in them.

mmengine reads a checkpoint with ``weights_only=True`` and, where torch refuses that, once more without: then any code
in the file runs. Importing this module registers our loaders with mmengine's ``CheckpointLoader``, for the whole
process: ``load_from``, ``resume`` and ``init_cfg=dict(type='Pretrained')`` then accept weights and plain data only.
They also accept ``.safetensors`` files, folders in the layout of the Hugging Face hub, and ``hf-hub:owner/name``.

Our tools import this module, and our configs name it::

    custom_imports = dict(imports=["mmsnnet.safe_loading"])

To have mmengine's behaviour back in a program of your own, delete that line from the config.
"""

from __future__ import annotations

from typing import Any

from mmengine import dist
from mmengine.runner import CheckpointLoader

from mmsnnet.models.checkpoint_reading import read_model_checkpoint

# The other kinds of storage that mmengine has loaders for. Most of those read pickles with their code; ours refuse.
OTHER_STORAGE = (
    *("pavi://", r"(\S+\:)?s3://", r"(\S+\:)?petrel://"),
    *("torchvision://", "modelzoo://", "open-mmlab://", "openmmlab://", "mmcls://"),
)


# mmengine's log names a loader by the part of its name after "load_from_".
def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a file or a folder onto the CPU; refuse other storage."""
    return read_model_checkpoint(filename)


def load_from_remote(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a URL or ``hf-hub:owner/name`` that rank 0 downloads for all."""
    try:
        if dist.is_main_process():
            return read_model_checkpoint(filename)
    finally:
        dist.barrier()
    return read_model_checkpoint(filename)


CheckpointLoader.register_scheme(["", *OTHER_STORAGE], load_from_local, force=True)
CheckpointLoader.register_scheme(["http://", "https://", "hf-hub:"], load_from_remote, force=True)
