"""The result of a prediction: a data sample, and its picture."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from mmsnnet.apis.overlay import Overlay
from mmsnnet.errors import SettingError
from mmsnnet.files.writing import write_atomically

PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class FailedImage:
    """An image that could not be read, and why, in one line.

    Attributes:
        source: the path of the image; None for an image in memory.
        reason: the error, which names the image.
    """

    source: str | None
    reason: str


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model predicts for one image.

    Attributes:
        source: the path of the image; None for an image in memory.
        image: (H, W, 3) uint8 in RGB, rotated by its EXIF orientation.
        data_sample: the task's own, on the CPU: mmseg's ``SegDataSample`` (``pred_sem_seg``, or ``pred_depth_map``),
            mmdet's ``DetDataSample`` (``pred_instances``), or a ``BaseDataElement`` with ``logits`` and ``pred_label``.
        stitch: the name of the stitch that computed it.
        ms: milliseconds of the model for the image: the copy to the device, normalisation, the network and
            post-processing (resizing to the image, NMS). In a batch, the batch's time over its images. Reading and
            resizing the file are not included.
        gflops: 1e9 multiply-accumulates of the stitch, from its operating point; None without one.
        overlay: draws the picture.
    """

    source: str | None
    image: np.ndarray = field(repr=False)
    data_sample: BaseDataElement = field(repr=False)
    stitch: str
    ms: float
    gflops: float | None
    overlay: Overlay = field(repr=False)

    def picture(self, labels: bool = True) -> np.ndarray:
        """The prediction drawn on the image, uint8 in RGB; see :meth:`mmsnnet.apis.overlay.Overlay.draw`."""
        return self.overlay.draw(self.image, self.data_sample, labels)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the picture to a file, completely or not at all; create its folder.

        Raises:
            SettingError: the name does not end in ``.png``, ``.jpg`` or ``.jpeg``.
            OSError: the file cannot be written.
        """
        check_picture_name(path)
        bgr = cv2.cvtColor(self.picture(), cv2.COLOR_RGB2BGR)
        _, encoded = cv2.imencode(Path(path).suffix.lower(), bgr)
        write_atomically(path, encoded.tobytes())

    def show(self) -> Any:
        """Show the picture in a window until it is closed; in a notebook, return it as a figure.

        Raises:
            SettingError: there is neither a window system nor a notebook.
        """
        from matplotlib import pyplot
        from matplotlib.figure import Figure

        in_notebook = "ipykernel" in sys.modules
        if not in_notebook and pyplot.get_backend().lower() == "agg":
            raise SettingError("there is no window system to show the picture: write it with save('prediction.png')")
        figure = Figure() if in_notebook else pyplot.figure()
        axes = figure.subplots()
        axes.imshow(self.picture())
        axes.set_axis_off()
        axes.set_title(f"{self.stitch}, {self.ms:.1f} ms")
        if in_notebook:
            return figure
        pyplot.show()
        return None


def check_picture_name(path: str | os.PathLike[str]) -> None:
    """Raise SettingError unless a path ends in a suffix of ``PICTURES``."""
    if Path(path).suffix.lower() not in PICTURES:
        raise SettingError(f"{os.fspath(path)!r}: the name of a picture ends in {', '.join(PICTURES)}")
