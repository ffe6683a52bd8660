from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch import Tensor

from mmsnnet.apis.config import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.models import StitchedViT, check_weights, find_stitched_backbone, model_weights
from mmsnnet.models.checkpoint import DRAWS
from mmsnnet.version import __version__

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.py", "README.md"

MODEL_CARD = """\
---
library_name: mmsnnet
---
# {title}

A stitched vision transformer (SN-Netv2, [arXiv 2307.00154](https://arxiv.org/abs/2307.00154)) in {stitches}.

Anchors, smallest first: {anchors}.

```python
from mmsnnet.apis import build_model, load_config

model = build_model(load_config("FOLDER/{config}"), checkpoint="FOLDER")
{choice}```

`python tools/test.py FOLDER/{config} FOLDER` evaluates every stitch. `load_from="FOLDER"` in a config fine-tunes.
Made with mmsnnet {version}.
"""
CHOICE = 'model.backbone.set_stitch("{stitch}")  # or another of model.backbone.space\n'


@dataclass(frozen=True)
class Published:
    """What :func:`publish_model` or :func:`mmsnnet.apis.extract_stitch` wrote: the file of weights, its size in bytes,
    and its SHA-256."""

    weights: Path
    size: int
    sha256: str


def publish_model(config: Config, checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> Published:
    """Writes a model as a folder in the Hugging Face hub's layout: ``model.safetensors`` with the weights alone,
    ``config.py``, which builds the model from nothing but itself, and a short ``README.md``. The folder appears as a
    whole or not at all.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: the model's, from wherever :func:`mmsnnet.apis.build_model` takes one.
        out: the folder, which must not exist or be empty.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: ``out`` is a file or has something in it; the checkpoint cannot be read, would run code, or does
            not fit the config's model.
    """
    out = new_folder(out)
    model = build_without_weights(config)
    found = CheckpointLoader.load_checkpoint(os.fspath(checkpoint))
    check_weights(model, found, checkpoint)
    return write_folder(out, config, find_stitched_backbone(model), model_weights(found))


def new_folder(out: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder to be made.

    Raises:
        ValueError: it is a file, or has something in it.
    """
    out = Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} exists: give a folder that does not, or an empty one")
    return out


def write_folder(out: Path, config: Config, backbone: StitchedViT, weights: Mapping[str, Tensor]) -> Published:
    """Writes the weights of a config's model, whose backbone this is, as :func:`publish_model` describes."""
    # A copy of each: safetensors takes no two tensors that share memory, as tied layers do.
    weights = {
        name: tensor.contiguous().clone() for name, tensor in weights.items() if name.rpartition(".")[2] != DRAWS
    }
    card = MODEL_CARD.format(
        title=out.name,
        stitches=f"one stitch, {backbone.stitch}" if len(backbone.space) == 1 else f"{len(backbone.space)} stitches",
        anchors=", ".join(
            f"`{anchor.model.pretrained_cfg['architecture']}` ({anchor.depth} blocks, width {anchor.width})"
            for anchor in backbone.network.anchors
        ),
        choice="" if len(backbone.space) == 1 else CHOICE.format(stitch=backbone.stitch.name),
        config=CONFIG,
        version=__version__,
    )
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        metadata = {"format": "pt", "mmsnnet_version": __version__}
        safetensors.torch.save_file(weights, temporary / WEIGHTS, metadata)
        published_config(config).dump(str(temporary / CONFIG))
        (temporary / CARD).write_text(card, encoding="utf-8")
        check_weights(build_without_weights(load_config(temporary / CONFIG)), weights, out)
        published = Published(out / WEIGHTS, (temporary / WEIGHTS).stat().st_size, _sha256(temporary / WEIGHTS))
        os.replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return published


def published_config(config: Config) -> Config:
    """A config without what is of the place where it was made: pretrained weights of parts of the model (those of the
    whole replace them), checkpoints, the work folder."""
    settings = config.to_dict()
    for key in ("work_dir", "load_from", "resume", "launcher"):
        settings.pop(key, None)
    settings["model"] = _without_sources(settings["model"])
    # So that mmseg's and mmdet's own tools find what is registered here.
    imports = settings.setdefault("custom_imports", dict(imports=[]))
    if "mmsnnet" not in imports["imports"]:
        imports["imports"] = ["mmsnnet", *imports["imports"]]
    return Config(settings)


def _without_sources(setting: Any) -> Any:
    """A setting of the model, without ``pretrained`` and ``init_cfg=dict(type='Pretrained')`` anywhere below it."""
    if isinstance(setting, Mapping):
        return {
            key: None if key == "pretrained" or _is_source(value) else _without_sources(value)
            for key, value in setting.items()
        }
    if isinstance(setting, list | tuple):
        return type(setting)(_without_sources(inner) for inner in setting if not _is_source(inner))
    return setting


def _is_source(setting: Any) -> bool:
    return isinstance(setting, Mapping) and setting.get("type") == "Pretrained"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
