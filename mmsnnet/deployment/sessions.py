"""ONNX Runtime's sessions of exported graphs."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch

from mmsnnet.errors import DataError


def open_session(path: Path, threads: int | None = None, shared: bool = True) -> onnxruntime.InferenceSession:
    """A session of a graph on the CPU.

    Constants are not folded: folding would copy weights that sessions share, and expand each block's table of relative
    positions to a bias for all pairs of patches.

    Args:
        path: of the graph; its weights lie beside it.
        threads: of one operator; default: as many as torch has.
        shared: let sessions share the file of weights in memory. Otherwise each has a copy, packed for its matrix
            products, which is faster.

    Raises:
        DataError: the file, or the file of weights, is damaged.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, too
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if shared:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False  # each session would keep the memory of its activations
    try:
        return onnxruntime.InferenceSession(
            path, options, ["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
    except Exception as error:  # ONNX Runtime's errors have no common class
        raise DataError(f"{path} cannot be loaded: {str(error).splitlines()[0][:300]}; export again") from error
