"""The manifest of an export: what a program without torch needs to know to run it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mmsnnet.errors import DataError, MissingFileError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ExportedStitch:
    """One stitch of an export.

    Attributes:
        id, name, kind: of the stitch.
        file: its graph, in the folder of the manifest.
        flops: multiply-accumulates for one image of the backbone's ``img_size``; ``params``: the weights that it uses.
        metrics: its figures in the operating points that were given, which PyTorch measured.
        difference: the largest difference between an output of the export and of PyTorch on the images that were
            compared, as a share of the largest output where that exceeds 1.
        agreement: the share of pixels, or images, with the same class; None where an output has no classes.
    """

    id: int
    name: str
    kind: str
    file: str
    flops: int
    params: int
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    difference: float = 0.0
    agreement: float | None = None


@dataclass(frozen=True)
class Manifest:
    """A folder of exported stitches.

    Attributes:
        task: ``'segmentation'``, ``'depth'``, ``'classification'`` or ``'detection'``.
        format: ``'onnx'`` or ``'torch-export'``.
        precision: of the weights: ``'fp32'``, ``'fp16'`` or ``'int8'``.
        image_size: height and width of the graphs' images; None if they take any size.
        stitches: the exported stitches.
        outputs: the names of the graphs' outputs.
        preprocessing: what turns a picture into the graphs' input (:func:`preprocessing`).
        inference: what the toolbox does around a graph: ``mode``, ``crop_size`` and ``stride`` of mmseg's ``test_cfg``,
            ``align_corners``, the ``threshold`` of a head with one output channel, ``iou_threshold`` and
            ``most_boxes`` of NMS.
        metric: the metric that compares stitches, None without operating points; ``higher``: whether more is better.
        classes: names of the classes; ``palette`` their colours (R, G, B).
        weights: the file of weights that all graphs share; None for ``'torch-export'``. ``weights_digest``: its
            BLAKE2b digest.
        heads: the graphs of heads behind RoIAlign, by name.
        checkpoint: the digest of the weights (:func:`mmsnnet.models.model_weights.weights_digest`).
        versions: of the packages that made it.
    """

    task: str
    format: str
    precision: str
    image_size: tuple[int, int] | None
    stitches: tuple[ExportedStitch, ...]
    outputs: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    inference: Mapping[str, Any]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    weights: str | None = None
    weights_digest: str = ""
    heads: Mapping[str, str] = field(default_factory=dict)
    metric: str | None = None
    higher: bool = True
    checkpoint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    schema: ClassVar[int] = 1

    def __getitem__(self, stitch: int | str) -> ExportedStitch:
        """The exported stitch with this id or name.

        Raises:
            MissingFileError: the export lacks it.
        """
        for exported in self.stitches:
            if stitch in (exported.id, exported.name, str(exported.id)):
                return exported
        names = ", ".join(exported.name for exported in self.stitches)
        raise MissingFileError(f"the export has no stitch {stitch!r}; it has {names}")

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the manifest names."""
        graphs = (stitch.file for stitch in self.stitches)
        return (*graphs, *self.heads.values(), *filter(None, [self.weights]))

    def to_json(self) -> str:
        return json.dumps(dict(schema=self.schema) | asdict(self), indent=1) + "\n"

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest of a folder, and check that its files are there.

        Raises:
            MissingFileError: the folder has no manifest, or lacks a file that it names.
            DataError: the manifest cannot be read, or the file of weights is another.
        """
        path = folder / MANIFEST
        try:
            document = json.loads(path.read_bytes())
            if not isinstance(document, dict) or document.pop("schema", None) != cls.schema:
                raise ValueError(f"expected an object of schema {cls.schema}")
            document["stitches"] = tuple(ExportedStitch(**stitch) for stitch in document["stitches"])
            for name in ("outputs", "classes", "palette", "image_size"):
                document[name] = document[name] and tuple(document[name])
            document["palette"] = tuple(map(tuple, document["palette"]))
            manifest = cls(**document)
            if not manifest.stitches:
                raise ValueError("it has no stitches")
            for file in manifest.files:
                if not isinstance(file, str) or Path(file).name != file:
                    raise ValueError(f"{file!r} is not the name of a file in the folder")
        except (FileNotFoundError, NotADirectoryError):
            raise MissingFileError(
                f"{folder} is no export: it has no {MANIFEST}; tools/deployment/export.py writes one"
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is no manifest of an export: {error}; export again") from None
        for file in manifest.files:
            if not (folder / file).is_file():
                raise MissingFileError(f"{folder} lacks {file}, which its {MANIFEST} names: export again")
        if manifest.weights is not None and file_digest(folder / manifest.weights) != manifest.weights_digest:
            raise DataError(f"{folder / manifest.weights} is not the file that was exported: export again")
        return manifest


def file_digest(path: Path) -> str:
    """The BLAKE2b digest of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
