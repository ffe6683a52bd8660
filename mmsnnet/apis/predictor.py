"""Prediction for images: one model, any stitch, any source of images."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import FUNCTIONS
from mmengine.structures import BaseDataElement

from mmsnnet.apis.config import load_config
from mmsnnet.apis.devices import checked_device
from mmsnnet.apis.images import ImageLike, ImageLoader, LoadedImage, batches, list_images, source_of
from mmsnnet.apis.model import build_model, deployed
from mmsnnet.apis.overlay import overlay_of
from mmsnnet.apis.prediction import FailedImage, Prediction
from mmsnnet.apis.publish import CONFIG, FRONT
from mmsnnet.deployment.manifest import MANIFEST
from mmsnnet.errors import MissingFileError, SettingError, UserError, needs_extra
from mmsnnet.evaluation import OperatingPoint, OperatingPoints
from mmsnnet.models import find_stitched_backbone
from mmsnnet.models.backbones.budget import check_points
from mmsnnet.stitching import Stitch, StitchSpace

MAX_PIXELS = 100_000_000

StrPath = str | os.PathLike[str]


class Predictor:
    """Predicts for images with a stitched model: segmentation, depth, classification or detection.

    ``Predictor("FOLDER")("image.jpg").save("out.png")`` is all that a folder of ``publish_model.py`` or
    ``extract_stitch.py`` needs. Images are loaded and preprocessed as in the config's test pipeline, so a prediction
    equals what ``tools/test.py`` evaluates. Low-rank updates are merged. Calls from several threads run in turn.

    Args:
        model: a folder with ``config.py`` and ``model.safetensors``, or the path of a config; or a folder of
            ``export.py``, whose graphs then run in ONNX Runtime.
        checkpoint: for a config: as for :func:`mmsnnet.apis.build_model`.
        device: such as ``'cpu'`` or ``'cuda:1'``; by default a GPU if there is one. An export runs on the CPU.
        stitch: the id or name of the stitch to run; by default the config's.
        max_gflops, max_latency_ms: a budget, in place of ``stitch``, as for :meth:`set_budget`.
        metric: compares stitches under a budget; by default the task's main metric.
        batch_size: images in a batch.
        points: a file of operating points; by default ``front.json`` in the folder, if it is there.
        max_pixels: an image with more pixels is refused before it is decoded.
        keep_logits: keep ``seg_logits`` in data samples of segmentation. They take as much memory as the image times
            the number of classes.

    Attributes:
        model: the model, in evaluation mode.
        config: its config.
        space: its stitch space.
        task: ``'segmentation'``, ``'depth'``, ``'classification'`` or ``'detection'``.
        points: its operating points, or None.
        metric: the metric that compares stitches; None for the task's main metric.
        device: where it runs.
        backend: ``'torch'`` or ``'onnxruntime'``.
        overlay: draws predictions.

    Raises:
        MissingFileError: there is no such folder, config, checkpoint or file of operating points.
        ValueError: a file is damaged, the checkpoint does not fit the model, the space lacks the stitch, or the budget
            is below the cheapest stitch.
    """

    def __init__(
        self,
        model: StrPath,
        checkpoint: StrPath | None = None,
        *,
        device: str | torch.device | None = None,
        stitch: int | str | None = None,
        max_gflops: float | None = None,
        max_latency_ms: float | None = None,
        metric: str | None = None,
        batch_size: int = 1,
        points: StrPath | None = None,
        max_pixels: int | None = MAX_PIXELS,
        keep_logits: bool = False,
    ) -> None:
        config, checkpoint = _find_model(model, checkpoint)
        self.config = load_config(config)
        is_export = Path(checkpoint, MANIFEST).is_file()
        self.backend = "onnxruntime" if is_export else "torch"
        default = "cuda" if torch.cuda.is_available() and not is_export else "cpu"
        self.device = checked_device(default if device is None else device)
        if is_export and self.device.type != "cpu":
            raise SettingError(f"{os.fspath(checkpoint)} is an export, which runs on the CPU: leave out device")
        self.batch_size = _checked_batch_size(batch_size)
        self.keep_logits = keep_logits
        self.metric = metric
        self._load = ImageLoader(self.config, max_pixels)
        self._collate = _collate_function(self.config)
        self._lock = threading.RLock()
        self.task = self._load.task
        self.points = _read_front(points, checkpoint)
        build = _build_exported_model if is_export else _build_model
        self.model = build(self.config, checkpoint, self.device)
        self._backbone = find_stitched_backbone(self.model)
        self.space: StitchSpace = self._backbone.space
        if self.points is not None:
            check_points(self.points, self.space)
        self.overlay = overlay_of(self.config, self.task)
        chosen = self.choose(stitch, max_gflops=max_gflops, max_latency_ms=max_latency_ms)
        if chosen is not None:
            self.set_stitch(chosen)

    @property
    def stitch(self) -> Stitch:
        """The stitch that runs."""
        return self._backbone.stitch

    def set_stitch(self, stitch: int | str | Stitch) -> None:
        """Run this stitch from now on, by id or name.

        Raises:
            UnknownStitchError: the space has no such stitch.
        """
        with self._lock:
            self._backbone.set_stitch(stitch)

    def set_budget(self, *, max_gflops: float | None = None, max_latency_ms: float | None = None) -> OperatingPoint:
        """Run the best stitch within a budget from now on, and return its operating point.

        Args:
            max_gflops, max_latency_ms: as for :func:`mmsnnet.evaluation.select_stitch`; set one of the two.

        Raises:
            ValueError: there are no operating points to choose from, their latencies are of another backend, or the
                budget is below the cheapest stitch.
        """
        timed = self.points is not None and any(point.latency_ms is not None for point in self.points)
        measured = self.points.benchmark.get("backend", "torch") if self.points and timed else self.backend
        if max_latency_ms is not None and self.points is not None and not timed and self.backend != "torch":
            folder = Path(self.config.filename).parent
            raise SettingError(
                f"the export has no latencies: tools/analysis_tools/benchmark.py {folder / 'config.py'} --backend onnx "
                f"{folder} --out {folder / FRONT} measures them"
            )
        if max_latency_ms is not None and measured != self.backend:
            raise SettingError(
                f"the latencies of the operating points are of {measured}, and this model runs in {self.backend}: "
                "measure them with tools/analysis_tools/benchmark.py, or set max_gflops"
            )
        with self._lock:
            return self._backbone.set_budget(
                self.points, self.metric, max_gflops=max_gflops, max_latency_ms=max_latency_ms
            )

    def __call__(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        stitch: int | str | None = None,
        max_gflops: float | None = None,
        max_latency_ms: float | None = None,
        batch_size: int | None = None,
    ) -> Any:
        """Predict for images: a :class:`Prediction` for one image, a list of them for several.

        Args:
            images: one image, or a list, a folder or a glob pattern. An image is a path, an array (H, W, 3) uint8 in
                OpenCV's order (blue, green, red) or (H, W), an image of Pillow, or the content of a file as bytes.
                Arrays of other types or numbers of channels need a config whose ``LoadImage`` accepts them.
            stitch, max_gflops, max_latency_ms: of this call alone.
            batch_size: of this call alone.

        Raises:
            MissingFileError: a file does not exist, or a folder has no pictures.
            DataError: an image cannot be read; the message names it.
            ValueError: as of :meth:`set_budget`.
        """
        listed, is_single = list_images(images)
        chosen = self.choose(stitch, max_gflops=max_gflops, max_latency_ms=max_latency_ms)
        predictions = []
        for _, result in self._run(listed, chosen, batch_size, numbered=not is_single):
            if isinstance(result, UserError):
                raise result
            predictions.append(result)
        return predictions[0] if is_single else predictions

    def stream(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        stitch: int | str | None = None,
        max_gflops: float | None = None,
        max_latency_ms: float | None = None,
        batch_size: int | None = None,
    ) -> Iterator[Prediction | FailedImage]:
        """Yield the prediction of each image in order, or a :class:`FailedImage` for one that cannot be read.

        Images are loaded a batch at a time. Arguments and errors of the arguments are as of a call.
        """
        listed, is_single = list_images(images)
        chosen = self.choose(stitch, max_gflops=max_gflops, max_latency_ms=max_latency_ms)
        results = self._run(listed, chosen, batch_size, numbered=not is_single)
        return (
            FailedImage(source_of(image), str(result)) if isinstance(result, UserError) else result
            for image, result in results
        )

    def choose(
        self,
        stitch: int | str | None = None,
        *,
        max_gflops: float | None = None,
        max_latency_ms: float | None = None,
    ) -> Stitch | None:
        """The stitch that a call with these arguments runs; None without any. The stitch that runs stays.

        Raises:
            ValueError: as of a call.
        """
        given = dict(stitch=stitch, max_gflops=max_gflops, max_latency_ms=max_latency_ms)
        names = [name for name, value in given.items() if value is not None]
        if len(names) > 1:
            raise SettingError(f"{' and '.join(names)} each choose the stitch: set one of them")
        if stitch is not None:
            return self.space[stitch]
        if not names:
            return None
        with self._lock:
            before = self.stitch
            chosen = self.set_budget(max_gflops=max_gflops, max_latency_ms=max_latency_ms)
            self.set_stitch(before)
        return self.space[chosen.id]

    def load(self, image: ImageLike, number: int | None = None) -> LoadedImage:
        """Read and preprocess an image, as the config's test pipeline does. Several threads can do so at the same time.

        Args:
            image: as of a call.
            number: of the image among several, for messages.

        Raises:
            MissingFileError, DataError, TypeError: as of a call.
        """
        shown, packed = self._load(image, number)
        return LoadedImage(source_of(image), shown, packed)

    def predict(self, images: Sequence[LoadedImage], stitch: Stitch | None = None) -> list[Prediction]:
        """The predictions for a batch of loaded images of one shape.

        Args:
            images: at least one.
            stitch: to run; by default the current one.
        """
        samples, name, ms = self._forward([image.packed for image in images], stitch)
        return [
            Prediction(image.source, image.image, sample, name, ms, self._gflops(name), self.overlay)
            for image, sample in zip(images, samples, strict=True)
        ]

    def _run(
        self, images: Iterable[ImageLike], stitch: Stitch | None, batch_size: int | None, numbered: bool
    ) -> Iterator[tuple[ImageLike, Prediction | UserError]]:
        """Each image with its prediction, or with the error of reading it; the batch size is checked at once."""
        size = self.batch_size if batch_size is None else _checked_batch_size(batch_size)
        return self._results(images, stitch, size, numbered)

    def _results(
        self, images: Iterable[ImageLike], stitch: Stitch | None, batch_size: int, numbered: bool
    ) -> Iterator[tuple[ImageLike, Prediction | UserError]]:
        for batch in batches(images, batch_size):
            results: dict[int, Prediction | UserError] = {}
            # Toolboxes refuse batches of different sizes, or pad them, which changes predictions.
            groups: dict[tuple[int, ...], list[tuple[int, LoadedImage]]] = {}
            for number, image in batch:
                try:
                    loaded = self.load(image, number if numbered else None)
                except UserError as error:
                    results[number] = error
                else:
                    groups.setdefault(loaded.shape, []).append((number, loaded))
            for group in groups.values():
                numbers, inputs = zip(*group, strict=True)
                results |= zip(numbers, self.predict(inputs, stitch), strict=True)
            yield from ((image, results[number]) for number, image in batch)

    def _forward(self, inputs: list[dict[str, Any]], stitch: Stitch | None) -> tuple[list[BaseDataElement], str, float]:
        """The data samples of a batch, the name of the stitch that ran, and the milliseconds for each image."""
        batch = self._collate(inputs)
        with self._lock:
            before = self.stitch
            self._backbone.set_stitch(before if stitch is None else stitch)
            try:
                name = self.stitch.name
                start = self._now()
                with torch.no_grad():
                    samples = self.model.test_step(batch)
                ms = 1000 * (self._now() - start) / len(inputs)
            finally:
                self._backbone.set_stitch(before)
        if not self.keep_logits:
            for sample in samples:
                if "_seg_logits" in sample:  # where mmseg's data sample stores them
                    del sample.seg_logits
        return [sample.cpu() for sample in samples], name, ms

    def _now(self) -> float:
        """The time when the device has done all work, in seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _gflops(self, name: str) -> float | None:
        return next((point.flops / 1e9 for point in self.points or () if point.name == name), None)


def _find_model(model: StrPath, checkpoint: StrPath | None) -> tuple[Path, StrPath]:
    """The config and the checkpoint of a folder, or of a config beside its checkpoint."""
    path = Path(model).expanduser()
    if not path.is_dir():
        if checkpoint is None and path.is_file():
            raise SettingError(f"{str(path)!r} is a config: give its checkpoint too, or a published folder alone")
        if checkpoint is None:
            raise MissingFileError(f"there is no folder or config {str(path)!r} (working folder {Path.cwd()})")
        return path, os.path.expanduser(os.fspath(checkpoint))
    if not (path / CONFIG).is_file():
        raise MissingFileError(
            f"folder {str(path)!r} has no {CONFIG}: expected one of publish_model.py, extract_stitch.py or export.py"
        )
    return path / CONFIG, path if checkpoint is None else os.path.expanduser(os.fspath(checkpoint))


def _read_front(points: StrPath | None, checkpoint: StrPath) -> OperatingPoints | None:
    """The operating points of a file, or those in the folder of a model."""
    front = Path(checkpoint, FRONT)
    if points is None and not front.is_file():
        return None
    return OperatingPoints.load(front if points is None else os.path.expanduser(os.fspath(points)))


def _build_model(config: Config, checkpoint: StrPath, device: torch.device) -> BaseModel:
    """The model that predicts, on its device."""
    return deployed(build_model(config, checkpoint)).to(device)


def _build_exported_model(config: Config, folder: StrPath, device: torch.device) -> BaseModel:
    """The model whose graphs an export has; its own weights are dropped."""
    with needs_extra("onnx"):
        from mmsnnet.deployment.exported_model import use_export
    model = build_model(config, device=device)
    use_export(model, Path(folder))
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


def _collate_function(config: Config) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    setting = dict(config.test_dataloader.get("collate_fn") or dict(type="pseudo_collate"))
    type_ = setting.pop("type")
    return partial(FUNCTIONS.get(type_) if isinstance(type_, str) else type_, **setting)


def _checked_batch_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise SettingError(f"batch_size is a whole number of at least 1, got {batch_size!r}")
    return batch_size
