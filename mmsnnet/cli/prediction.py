"""Arguments that the demos share, and the predictor that they ask for."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout

import cv2

from mmsnnet.apis.config import StrPath
from mmsnnet.apis.predictor import Predictor
from mmsnnet.errors import SettingError


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the config and the checkpoint, what chooses the stitch, and the device."""
    parser.add_argument("config", type=os.path.expanduser, help="config file, or a published folder")
    parser.add_argument(
        "checkpoint",
        type=os.path.expanduser,
        nargs="?",
        help="checkpoint file, published folder, URL or hf-hub:owner/name; not needed if CONFIG is a published folder",
    )
    parser.add_argument("--stitch", help="id or name of the stitch, such as 57 or S4-L10 (default: the config's)")
    parser.add_argument("--max-gflops", type=float, metavar="X", help="run the best stitch within this budget")
    parser.add_argument("--max-latency-ms", type=float, metavar="X", help="run the best stitch within this budget")
    parser.add_argument(
        "--points",
        type=os.path.expanduser,
        metavar="FILE.json",
        help="operating points to choose from (default: front.json of the published folder)",
    )
    parser.add_argument("--metric", help="metric that compares stitches (default: the task's own)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: a GPU if there is one)")


def build_predictor(args: argparse.Namespace, **settings: object) -> Predictor:
    """The predictor of the arguments; ``settings`` are further ones of :class:`Predictor`, or others in their place."""
    cv2.setLogLevel(0)  # our errors name the file; OpenCV's lines beside them do not
    chosen: dict[str, object] = {
        name: getattr(args, name)
        for name in ("stitch", "max_gflops", "max_latency_ms", "points", "metric", "device")
        if getattr(args, name) is not None
    }
    model: StrPath = args.config
    with redirect_stdout(io.StringIO()):  # the toolboxes print that an optional package is missing
        return Predictor(model, args.checkpoint, **(chosen | settings))  # type: ignore[arg-type]


def check_outputs(inputs: Sequence[StrPath], outputs: Sequence[StrPath]) -> None:
    """Check that each input has an output of its own, which is none of the inputs.

    Raises:
        SettingError: two outputs are one file, or an output would replace an input.
    """
    given = {os.path.realpath(os.path.expanduser(path)): path for path in inputs}
    taken: dict[str, StrPath] = {}
    for path, out in zip(inputs, outputs, strict=True):
        real = os.path.realpath(out)
        if real in given:
            raise SettingError(f"{os.fspath(out)} would replace an input: set another --out")
        if real in taken:
            raise SettingError(
                f"{os.fspath(taken[real])} and {os.fspath(path)} would both be written to {os.fspath(out)}: rename "
                "one, or predict for them in two runs with two --out"
            )
        taken[real] = path
