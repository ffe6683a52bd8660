"""Export stitches: each a graph of its own, and all ONNX graphs share one file of weights."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmsnnet.apis.model import build_model, deployed
from mmsnnet.apis.overlay import overlay_of
from mmsnnet.apis.preprocessing import comparison_images, preprocessing
from mmsnnet.apis.publish import FRONT, published_config
from mmsnnet.deployment.comparison import Difference, compare
from mmsnnet.deployment.graphs import IMAGES, Graph, graph_class, roi_graphs, stitch_graph
from mmsnnet.deployment.manifest import MANIFEST, ExportedStitch, Manifest
from mmsnnet.errors import SettingError, needs_extra
from mmsnnet.evaluation import OperatingPoints, compact_front
from mmsnnet.files.writing import new_folder, write_atomically
from mmsnnet.models import find_stitched_backbone, model_costs
from mmsnnet.models.backbones.budget import check_points
from mmsnnet.stitching import Stitch

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
# The largest difference from PyTorch, as a share of the largest output where that exceeds 1; and the smallest share of
# pixels, or images, with the same class.
TOLERANCES = {"fp32": (1e-4, 0.9999), "fp16": (2e-2, 0.99), "int8": (0.25, 0.9)}
OPSET = 20
WEIGHTS = "weights.bin"
CONFIG = "config.py"


class ExportError(SettingError):
    """A model, or a setting of it, cannot be exported, or its export computes other values."""


@dataclass(frozen=True)
class ExportSettings:
    """How stitches are exported.

    Args:
        format: ``'onnx'`` or ``'torch-export'``.
        precision: ``'fp32'``; ``'fp16'`` for half as large weights; or ``'int8'`` for matrix products of 8-bit
            integers, in ONNX graphs for CPUs. Images and outputs stay float32.
        image_size: height and width; by default the window of slide inference, or the backbone's ``img_size``.
        dynamic_size: let the graphs take images of any size.
        tolerance: the largest difference from PyTorch; default: ``TOLERANCES``.
        num_images: real images for the comparison.
        calibration_images: of ``'int8'``: this many images fix the ranges of activations. None computes the ranges in
            each run.

    Raises:
        SettingError: a setting has an unknown value.
    """

    format: str = "onnx"
    precision: str = "fp32"
    image_size: tuple[int, int] | None = None
    dynamic_size: bool = False
    tolerance: float | None = None
    num_images: int = 2
    calibration_images: int | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise SettingError(f"format is one of {', '.join(FORMATS)}; got {self.format!r}")
        if self.precision not in TOLERANCES:
            raise SettingError(f"precision is one of {', '.join(TOLERANCES)}; got {self.precision!r}")
        for number in (self.num_images, self.calibration_images):
            if number is not None and number < 1:
                raise SettingError(f"an export is compared and calibrated on at least 1 image, got {number}")
        if self.precision == "int8" and self.format != "onnx":
            raise SettingError("int8 is for ONNX graphs: leave out the format, or the quantisation")
        if self.calibration_images is not None and self.precision != "int8":
            raise SettingError(f"calibration images are for int8, and the precision is {self.precision}")


def export_stitches(
    config: Config,
    checkpoint: str | os.PathLike[str],
    stitches: str | Sequence[int | str],
    out: str | os.PathLike[str],
    settings: ExportSettings | None = None,
    *,
    points: str | os.PathLike[str] | OperatingPoints | None = None,
    images: str | os.PathLike[str] | None = None,
    done: Callable[[ExportedStitch], object] = lambda stitch: None,
) -> Manifest:
    """Write a folder with a graph for each stitch, one file of weights, a manifest and the model's config.

    Each export runs at once, in ONNX Runtime or as a loaded program, on real images, alone and as a batch, and is
    compared with PyTorch. If one differs by more than the tolerance, nothing is written.

    Args:
        config: as :func:`mmsnnet.apis.load_config` returns it.
        checkpoint: of the model, as for :func:`mmsnnet.apis.build_model`.
        stitches: as for :meth:`mmsnnet.stitching.StitchSpace.select`, or ``'front'``: those of the Pareto front of
            ``points``.
        out: the folder; it must not exist, or be empty.
        settings: default: ``ExportSettings()``.
        points: the model's operating points, for ``'front'`` and the manifest. Their front goes into the folder.
        images: a folder of images for the comparison; default: those of the test set.
        done: called after each stitch.

    Raises:
        ExportError: the model cannot be exported, or an export differs from PyTorch.
        SettingError, MissingFileError, DataError, OutputError: an argument is wrong, or a file.
        MissingPackageError: an export needs packages of the extra ``onnx``.
    """
    settings, out = settings or ExportSettings(), Path(out).absolute()
    with needs_extra("onnx"):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    with new_folder(out, "--out") as folder, torch.no_grad():
        model = _let_sizes_vary(deployed(build_model(config, checkpoint)))
        backbone = find_stitched_backbone(model)
        front = None if points is None else _front(points, model)
        chosen = _choose(stitches, front, model)
        size = settings.image_size or _window(config) or backbone.img_size
        number = max(settings.num_images, settings.calibration_images or 0)
        compared = comparison_images(config, model, images, number, size)
        costs = model_costs(model)
        exporter = _Exporter(model, settings, compared, folder)
        exported = []
        try:
            heads = {name: exporter.export_head(name, *graph) for name, graph in roi_graphs(model).items()}
            for stitch in chosen:
                backbone.set_stitch(stitch)
                file, difference = exporter.export(stitch_graph(model), stitch.name)
                metrics = next((point.metrics for point in front or () if point.id == stitch.id), {})
                cost = costs[stitch.id]
                exported.append(
                    ExportedStitch(
                        stitch.id,
                        stitch.name,
                        stitch.kind,
                        file,
                        cost.flops,
                        cost.params,
                        {name: value if value == value else None for name, value in metrics.items()},
                        *difference,
                    )
                )
                done(exported[-1])
        finally:
            exporter.close()
        overlay = overlay_of(config, graph_class(model).task)
        manifest = Manifest(
            task=overlay.task,
            format=settings.format,
            precision=settings.precision,
            image_size=None if settings.dynamic_size else size,
            stitches=tuple(exported),
            outputs=exporter.outputs,
            preprocessing=preprocessing(config),
            inference=_inference(config),
            classes=overlay.classes,
            palette=overlay.palette,
            weights=WEIGHTS if settings.format == "onnx" else None,
            heads=heads,
            config=str(config.filename),
            checkpoint=os.fspath(checkpoint),
            versions={name: version(name) for name in ("mmsnnet", "torch", "onnx", "onnxscript", "onnxruntime")},
        )
        write_atomically(folder / MANIFEST, manifest.to_json().encode())
        published_config(config).dump(str(folder / CONFIG))
        if front is not None:
            replace(front, config=CONFIG).save(folder / FRONT)
        return manifest


class _Exporter:
    """Exports graphs to a folder and compares them.

    Args:
        model: the graphs' model, of fp32.
        settings: of the export.
        images: (N, C, H, W), normalised.
        folder: to write to.
    """

    def __init__(self, model: BaseModel, settings: ExportSettings, images: Tensor, folder: Path) -> None:
        from mmsnnet.deployment.weight_file import WeightFile

        self.model, self.settings, self.folder = model, settings, folder
        self.images = images[: settings.num_images]
        self._calibration = None if settings.calibration_images is None else images[: settings.calibration_images]
        self.outputs: tuple[str, ...] = ()
        self._weights = WeightFile(folder / WEIGHTS) if settings.format == "onnx" else None

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()

    def export(self, graph: Graph, name: str) -> tuple[str, Difference]:
        """Export the graph of a stitch, and compare it; returns its file."""
        expected = graph(self.images)
        self.outputs = tuple(expected)
        return self._write(graph, name, self.images, expected, self.settings.dynamic_size, self.settings.precision)

    def export_head(self, name: str, graph: Graph, shape: tuple[int, ...]) -> str:
        """Export a head behind RoIAlign; returns its file."""
        regions = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        precision = "fp16" if self.settings.precision == "fp16" else "fp32"  # few images have regions to calibrate on
        return self._write(graph, name, regions, graph(regions), False, precision)[0]

    def _write(
        self,
        graph: Graph,
        name: str,
        example: Tensor,
        expected: Mapping[str, Tensor],
        dynamic_size: bool,
        precision: str,
    ) -> tuple[str, Difference]:
        file = f"{name}{FORMATS[self.settings.format]}"
        half = precision == "fp16"
        # 0 and 1 are special sizes to torch.export.
        example = example if len(example) > 1 else example.repeat(2, 1, 1, 1)
        axes = (0, 2, 3) if dynamic_size else (0,)
        with _quiet(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels' strides differ from those of its parts
            try:
                if half:
                    self.model.half()
                    graph.half()
                graph(example)  # fills caches, which an export would fill with tensors without values
                program = torch.export.export(
                    graph, (example,), dynamic_shapes=({axis: torch.export.Dim.DYNAMIC for axis in axes},)
                )
                self._save(program, file, tuple(expected), precision)
            except (RuntimeError, ValueError, TypeError) as error:  # torch's errors for what it cannot export
                raise ExportError(_reason(name, error, dynamic_size)) from error
            finally:
                if half:
                    self.model.float()
                    graph.float()
        return file, self._compare(graph, file, name, example, dynamic_size)

    def _save(self, program: torch.export.ExportedProgram, file: str, outputs: Sequence[str], precision: str) -> None:
        if self._weights is None:
            torch.export.save(program, self.folder / file)
            return
        import onnx_ir as ir

        with redirect_stdout(io.StringIO()):
            converted = torch.onnx.export(program, dynamo=True, opset_version=OPSET, output_names=list(outputs))
        assert converted is not None
        graph = converted.model
        for node in ir.traversal.RecursiveGraphIterator(graph.graph):
            node.metadata_props.clear()  # tracebacks with this machine's paths
        if precision == "int8":
            from mmsnnet.deployment.quantization import quantized

            graph = quantized(graph, self._calibration)
        self._weights.take(graph)
        ir.save(graph, self.folder / file)

    def _compare(self, graph: Graph, file: str, name: str, example: Tensor, dynamic_size: bool) -> Difference:
        batches = [example, example[:1]]
        if dynamic_size:
            height, width = example.shape[-2:]
            batches.append(nn.functional.interpolate(example, size=(height + 32, width + 64), mode="bilinear"))
        if self._weights is not None:
            self._weights.flush()
        run = loaded(self.folder / file, tuple(graph(example[:1])))
        differences = [compare(run(batch), graph(batch)) for batch in batches]
        worst = Difference.worst(differences)
        tolerance, agreement = TOLERANCES[self.settings.precision]
        tolerance = self.settings.tolerance if self.settings.tolerance is not None else tolerance
        if not worst.difference <= tolerance or (worst.agreement is not None and worst.agreement < agreement):
            raise ExportError(
                f"the export of {name} differs from PyTorch by {worst.difference:.2g} of its largest output"
                + ("" if worst.agreement is None else f", and has {worst.agreement:.4%} of the classes")
                + f" (allowed: {tolerance:g} and {agreement:.2%}): nothing is written; --tolerance allows more"
            )
        return worst


def loaded(path: Path, outputs: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """The function of an exported graph: images (B, C, H, W) give its outputs by name."""
    if path.suffix == FORMATS["torch-export"]:
        module = torch.export.load(path).module()
        return lambda images: module(images)
    from mmsnnet.deployment.sessions import open_session

    session = open_session(path)
    return lambda images: {
        name: torch.from_numpy(array)
        for name, array in zip(outputs, session.run(list(outputs), {IMAGES: images.numpy()}), strict=True)
    }


def _let_sizes_vary(model: BaseModel) -> BaseModel:
    """Replace mmseg's upsampling, which computes sizes in Python: an export would keep those of its example."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            scale = getattr(child, "scale_factor", None)
            if type(child).__module__.startswith("mmseg.") and type(child).__name__ == "Upsample" and scale:
                setattr(module, name, nn.Upsample(None, scale, child.mode, child.align_corners))
    return model


def _front(points: str | os.PathLike[str] | OperatingPoints, model: BaseModel) -> OperatingPoints:
    front = compact_front(points if isinstance(points, OperatingPoints) else OperatingPoints.load(points))
    check_points(front, find_stitched_backbone(model).space)
    # Latencies of PyTorch are not those of the export.
    return replace(front, points=tuple(replace(p, latency_ms=None, throughput=None) for p in front), benchmark={})


def _choose(stitches: str | Sequence[int | str], front: OperatingPoints | None, model: BaseModel) -> tuple[Stitch, ...]:
    space = find_stitched_backbone(model).space
    if stitches != "front":
        return space.select(stitches)
    if front is None:
        raise SettingError(
            "'front' needs the operating points of the model: set --points to a file that tools/test.py --out wrote, "
            "or publish the model with them"
        )
    return space.select([point.id for point in front])


def _window(config: Config) -> tuple[int, int] | None:
    inference = _inference(config)
    if inference.get("mode") not in ("slide", "slide_flip"):
        return None
    height, width = inference["crop_size"]
    return height, width


def _inference(config: Config) -> dict[str, Any]:
    settings = config.model.get("test_cfg") or {}
    if settings.get("mode") == "slide" and "DepthEstimator" in str(config.model.type):
        return dict(mode="whole")  # mmseg's depth estimators run whole images then
    return {key: settings[key] for key in ("mode", "crop_size", "stride") if key in settings}


def _reason(name: str, error: Exception, dynamic_size: bool) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    cure = "; leave out --dynamic-size: a fixed size may work" if dynamic_size else ""
    return f"stitch {name} cannot be exported: {first.strip()[:300]}{cure}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' warnings and log off the console; errors stay."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
