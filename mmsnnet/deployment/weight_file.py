"""One file of weights for several ONNX graphs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO

import onnx_ir as ir

# ONNX Runtime maps files into memory by pages.
ALIGNMENT = 4096
# Smaller tensors, such as shapes, stay in the graphs.
SMALLEST = 1024


class WeightFile:
    """Writes tensors to a file, equal ones once.

    Args:
        path: of the file, which lies in the folder of the graphs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[bytes] = path.open("xb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        """Let other readers see all weights."""
        self._file.flush()

    def take(self, model: ir.Model) -> None:
        """Move the weights of a graph into the file; the graph then refers to it."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= SMALLEST and not isinstance(tensor, ir.ExternalTensor):
                offset, length = self._place(tensor)
                value.const_value = ir.ExternalTensor(
                    self.path.name,
                    offset,
                    length,
                    tensor.dtype,
                    shape=tensor.shape,  # type: ignore[arg-type]
                    name=tensor.name or value.name or "",
                    base_dir=self.path.parent,
                )

    def _place(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        data = tensor.tobytes()
        digest = hashlib.blake2b(data, digest_size=16).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % ALIGNMENT))
            self._places[digest] = self._file.tell(), len(data)
            self._file.write(data)
        return self._places[digest]
