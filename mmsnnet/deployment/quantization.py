"""Quantise an ONNX graph to 8-bit integers with ONNX Runtime's own tools."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import Tensor

from mmsnnet.deployment.graphs import IMAGES


def quantized(graph: ir.Model, calibration: Tensor | None) -> ir.Model:
    """A graph whose matrix products with weights are of 8-bit integers, one scale for each output channel.

    Args:
        graph: of float32; it stays as it is.
        calibration: normalised images (N, C, H, W) that fix the ranges of activations (static quantisation). None
            computes the ranges in each run (dynamic quantisation).
    """
    logger = logging.getLogger()
    level = logger.level
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        ir.save(graph, source, external_data="float.bin")
        logger.setLevel(logging.ERROR)  # it logs to the root logger
        try:
            if calibration is None:
                quantize_dynamic(
                    source,
                    target,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    use_external_data_format=True,
                )
            else:
                quantize_static(
                    source,
                    target,
                    _Images(calibration.numpy()),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=["MatMul"],
                    per_channel=True,
                    weight_type=QuantType.QInt8,
                    activation_type=QuantType.QUInt8,
                    use_external_data_format=True,
                    extra_options={"MatMulConstBOnly": True},
                )
        finally:
            logger.setLevel(level)
        result = ir.load(target)
        for value in result.graph.initializers.values():  # the files are about to go
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
        return result


class _Images(CalibrationDataReader):
    """Gives images one by one."""

    def __init__(self, images: np.ndarray) -> None:
        self._images: Iterator[np.ndarray] = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self._images, None)
        return None if image is None else {IMAGES: image[None]}
