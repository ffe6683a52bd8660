"""A trained model as a folder in the Hugging Face hub's layout."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from huggingface_hub.utils.sha import sha_fileobj
from mmengine.config import Config
from torch import Tensor

from mmsnnet.apis.config import load_config
from mmsnnet.apis.model import build_without_weights
from mmsnnet.apis.overlay import Overlay, overlay_of
from mmsnnet.evaluation import OperatingPoints, compact_front
from mmsnnet.files.writing import new_folder
from mmsnnet.models import StitchedBackbone, check_weights, find_stitched_backbone, read_weights
from mmsnnet.models.backbones.budget import check_points
from mmsnnet.models.checkpoint_reading import CLASSES
from mmsnnet.models.model_weights import DRAWS
from mmsnnet.version import __version__

WEIGHTS, CONFIG, CARD, FRONT = "model.safetensors", "config.py", "README.md", "front.json"

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
BUDGET = 'model.backbone.set_budget("FOLDER/{front}", max_gflops={gflops:.3g})  # or the best under a budget\n'


@dataclass(frozen=True)
class Published:
    """The file of weights of a published model, its size in bytes, and its SHA-256."""

    weights: Path
    size: int
    sha256: str


def publish_model(
    config: Config,
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    points: str | os.PathLike[str] | None = None,
    metric: str | None = None,
) -> Published:
    """Write a model as a folder in the Hugging Face hub's layout.

    The folder has ``model.safetensors``, a self-contained ``config.py``, a short ``README.md``, and ``classes.json``
    with the names and colours of the test set's classes, for the toolboxes' inferencers; with ``points`` also
    ``front.json``, for :meth:`StitchedBackbone.set_budget`. It is written as a whole or not at all.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: of the model, as for :func:`mmsnnet.apis.build_model`.
        out: the folder; it must not exist, or be empty.
        points: a file of the model's operating points; their Pareto front is published.
        metric: of that front; default: the task's main metric.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no such file of operating points.
        OSError: ``out`` cannot be written, or another process is writing it.
        ValueError: ``out`` is a file or is not empty; the checkpoint cannot be read, would run code, or does not fit
            the config's model; the operating points belong to another stitch space, or have no front.
    """
    out = Path(out).absolute()
    with new_folder(out, "OUT") as folder:
        model = build_without_weights(config)
        backbone = find_stitched_backbone(model)
        front = None if points is None else compact_front(OperatingPoints.load(points), metric)
        if front is not None:
            check_points(front, backbone.space)
        return write_folder(folder, out, config, backbone, read_weights(model, checkpoint), front)


def write_folder(
    folder: Path,
    out: Path,
    config: Config,
    backbone: StitchedBackbone,
    weights: Mapping[str, Tensor],
    front: OperatingPoints | None = None,
) -> Published:
    """Write a folder as :func:`publish_model` describes it.

    Args:
        folder: to write to, as :func:`mmsnnet.files.writing.new_folder` yields it.
        out: the name that it will have.
        config: of the model.
        backbone: of the model.
        weights: of the model.
        front: the operating points to publish with it.
    """
    # Copies: safetensors refuses tensors that share memory, as tied layers do.
    weights = {
        name: tensor.contiguous().clone() for name, tensor in weights.items() if name.rpartition(".")[2] != DRAWS
    }
    choice = "" if len(backbone.space) == 1 else CHOICE.format(stitch=backbone.stitch.name)
    if front is not None:
        flops = sorted(point.flops for point in front)
        # One percent more than the stitch needs: the card shows a rounded number.
        choice += BUDGET.format(front=FRONT, gflops=1.01 * flops[len(flops) // 2] / 1e9)
    card = MODEL_CARD.format(
        title=out.name,
        stitches=f"one stitch, {backbone.stitch}" if len(backbone.space) == 1 else f"{len(backbone.space)} stitches",
        anchors=", ".join(
            f"`{anchor.model.pretrained_cfg['architecture']}` ({anchor.depth} blocks, width {anchor.widths[-1]})"
            for anchor in map(backbone.network.anchor, range(len(backbone.network.anchors)))
        ),
        choice=choice,
        config=CONFIG,
        version=__version__,
    )
    # Only one key of metadata: safetensors writes several in random order, and the SHA-256 would change.
    try:
        safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})
    except safetensors.SafetensorError as error:  # of an operating system's error it has the text alone
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
    published_config(config).dump(str(folder / CONFIG))
    if config.get("test_dataloader") and (overlay := overlay_of(config, "")).classes:
        write_classes(folder, overlay)
    # safetensors writes files that only the owner can read; give this one the permissions of the others.
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
    (folder / CARD).write_text(card, encoding="utf-8")
    if front is not None:
        # Tools that add to these points compare the config's name.
        replace(front, config=CONFIG, checkpoint=WEIGHTS).save(folder / FRONT)
    check_weights(build_without_weights(load_config(folder / CONFIG)), weights, out)
    with (folder / WEIGHTS).open("rb") as file:
        return Published(out / WEIGHTS, (folder / WEIGHTS).stat().st_size, sha_fileobj(file).hex())


def write_classes(folder: Path, overlay: Overlay) -> None:
    """Write the names of the classes, and a colour for each, as the toolboxes' inferencers need them."""
    classes = dict(classes=overlay.classes, palette=overlay.colors(len(overlay.classes)).tolist())
    (folder / CLASSES).write_text(json.dumps(classes) + "\n", encoding="utf-8")


def published_config(config: Config) -> Config:
    """A config without paths of this machine.

    Pretrained weights of parts of the model, checkpoints and the work folder are left out. The points of a budget are
    replaced by their front.
    """
    settings = config.to_dict()
    for key in ("work_dir", "load_from", "resume", "launcher"):
        settings.pop(key, None)
    settings["model"] = _standalone(settings["model"])
    # mmseg's and mmdet's tools, too, must find the modules of mmsnnet.
    imports = settings.setdefault("custom_imports", dict(imports=[]))
    names = [imports["imports"]] if isinstance(imports["imports"], str) else imports["imports"]
    imports["imports"] = names if "mmsnnet.safe_loading" in names else ["mmsnnet.safe_loading", *names]
    return Config(settings)


def _standalone(setting: Any) -> Any:
    """A setting of the model without ``pretrained`` and ``init_cfg=dict(type='Pretrained')``.

    The file of points of a ``budget`` is replaced by its front. ``draw_from``, which may name a file, is for training.
    """
    if isinstance(setting, Mapping):
        standalone = {
            key: None if key == "pretrained" or _loads_weights(value) else _standalone(value)
            for key, value in setting.items()
        }
        standalone.pop("draw_from", None)
        budget = standalone.get("budget")
        if isinstance(budget, dict) and isinstance(budget.get("points"), str):
            front = compact_front(OperatingPoints.load(budget["points"]), budget.get("metric"))
            budget["points"] = [point.to_json() for point in front]
        return standalone
    if isinstance(setting, list | tuple):
        return type(setting)(_standalone(inner) for inner in setting if not _loads_weights(inner))
    return setting


def _loads_weights(setting: Any) -> bool:
    return isinstance(setting, Mapping) and setting.get("type") == "Pretrained"
