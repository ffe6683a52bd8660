"""Export graphs to ONNX or torch.export, and compare them with PyTorch."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmsnnet.deployment.comparison import Difference, compare
from mmsnnet.deployment.graphs import IMAGES, Graph
from mmsnnet.errors import SettingError

FORMATS = {"onnx": ".onnx", "torch-export": ".pt2"}
# The largest difference from PyTorch, as a share of the largest output where that exceeds 1; and the smallest share of
# pixels, or images, with the same class.
TOLERANCES = {"fp32": (1e-4, 0.9999), "fp16": (2e-2, 0.99), "int8": (0.25, 0.9)}
OPSET = 20
WEIGHTS = "weights.bin"


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
        tolerance: the largest difference from PyTorch, whatever share of classes is equal; default: ``TOLERANCES``.
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
        if self.image_size is not None and min(self.image_size) < 1:
            raise SettingError(f"image_size is a positive height and width, got {self.image_size}")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise SettingError(f"tolerance is a number of at least 0, got {self.tolerance}")
        if self.precision == "int8" and self.format != "onnx":
            raise SettingError("int8 is for ONNX graphs: leave out the format, or the quantisation")
        if self.calibration_images is not None and self.precision != "int8":
            raise SettingError(f"calibration images are for int8, and the precision is {self.precision}")


class Exporter:
    """Exports graphs to a folder and compares them.

    Args:
        settings: of the export.
        images: (N, C, H, W), normalised.
        folder: to write to.
    """

    def __init__(self, settings: ExportSettings, images: Tensor, folder: Path) -> None:
        from mmsnnet.deployment.weight_file import WeightFile

        self.settings, self.folder = settings, folder
        self.images = images[: settings.num_images]
        self._calibration = None if settings.calibration_images is None else images[: settings.calibration_images]
        self.outputs: tuple[str, ...] = ()
        self._weights = WeightFile(folder / WEIGHTS) if settings.format == "onnx" else None

    def close(self) -> None:
        if self._weights is not None:
            self._weights.close()

    def export(self, graph: Graph, name: str) -> tuple[str, Difference]:
        """Export the graph of a stitch, and compare it; returns its file."""
        self.outputs = tuple(graph(self.images[:1]))
        return self._write(graph, name, self.images, self.settings.dynamic_size, self.settings.precision)

    def export_head(self, name: str, graph: Graph, shape: tuple[int, ...]) -> str:
        """Export a head behind RoIAlign; returns its file."""
        regions = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        precision = "fp16" if self.settings.precision == "fp16" else "fp32"  # few images have regions to calibrate on
        return self._write(graph, name, regions, False, precision)[0]

    def _write(
        self,
        graph: Graph,
        name: str,
        example: Tensor,
        dynamic_size: bool,
        precision: str,
    ) -> tuple[str, Difference]:
        file = f"{name}{FORMATS[self.settings.format]}"
        # 0 and 1 are special sizes to torch.export.
        example = example if len(example) > 1 else example.repeat(2, 1, 1, 1)
        written = copy.deepcopy(graph).half() if precision == "fp16" else graph
        axes = (0, 2, 3) if dynamic_size else (0,)
        with _quiet(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels' strides differ from those of its parts
            try:
                written(example)  # fills caches, which an export would fill with tensors without values
                program = torch.export.export(
                    written, (example,), dynamic_shapes=({axis: torch.export.Dim.DYNAMIC for axis in axes},)
                )
                self._save(program, file, tuple(written(example[:1])), precision)
            except (RuntimeError, ValueError, TypeError) as error:  # torch's errors for what it cannot export
                raise ExportError(_reason(name, error, dynamic_size)) from error
        return file, self._compare(graph, file, name, example, dynamic_size)

    def _save(self, program: torch.export.ExportedProgram, file: str, outputs: Sequence[str], precision: str) -> None:
        if self._weights is None:
            for node in program.graph_module.graph.nodes:
                node.meta.pop("stack_trace", None)  # this machine's paths
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
        with _quiet():
            run = loaded(self.folder / file, tuple(graph(example[:1])))
        differences = [compare(run(batch), graph(batch)) for batch in batches]
        worst = Difference.worst(differences)
        tolerance, agreement = TOLERANCES[self.settings.precision]
        if self.settings.tolerance is not None:
            tolerance, agreement = self.settings.tolerance, 0.0
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
