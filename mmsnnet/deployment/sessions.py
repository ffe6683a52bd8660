"""ONNX Runtime's sessions of exported graphs."""

from __future__ import annotations

import os
from pathlib import Path

import onnxruntime

from mmsnnet.errors import DataError


def open_session(path: Path, threads: int | None = None, device: str = "cpu") -> onnxruntime.InferenceSession:
    """A session of a graph.

    Constants are not folded: folding would copy weights that sessions share, and expand each block's table of relative
    positions to a bias for all pairs of patches.

    Args:
        path: of the graph; its weights lie beside it.
        threads: of one operator; default: ``OMP_NUM_THREADS``, or all cores.
        device: ``'cpu'`` or ``'cuda'``.

    Raises:
        DataError: the file, or the file of weights, is damaged.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    options.intra_op_num_threads = threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
    providers = ["CPUExecutionProvider"] if device == "cpu" else ["CUDAExecutionProvider", "CPUExecutionProvider"]
    try:
        return onnxruntime.InferenceSession(path, options, providers, disabled_optimizers=["ConstantFolding"])
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise DataError(f"{path} cannot be loaded: {str(error).splitlines()[0][:300]}; export again") from error
